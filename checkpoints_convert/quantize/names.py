"""Names of formats and methods, and what a ``--format`` word means; imports no torch: --help answers at once."""

from dataclasses import dataclass

from megatron_qwen.errors import ConfigError, Problem, did_you_mean

# formats/registry.py has what they are.
SAFETENSORS_FORMATS = ("gptq-int4", "gptq-int8", "awq-int4", "w4a16", "w8a8", "fp8", "fp8-block")
GGUF = "gguf"
GGUF_KINDS = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
# ggml's encoders of these types take no importances (ggml-quants.c, quantize_q8_0).
UNWEIGHED_KINDS = ("F16", "BF16", "Q8_0")
NEAREST, GPTQ, AWQ, SMOOTHQUANT = "nearest", "gptq", "awq", "smoothquant"
METHODS = (NEAREST, GPTQ, AWQ, SMOOTHQUANT)
IMPORTANCE = "importance"  # of the inputs of every weight, which GGUF's encoders take
# What makes a format's values where nobody says it. FP8 is fine enough without data.
DEFAULT_METHODS = {
    "gptq-int4": GPTQ,
    "gptq-int8": GPTQ,
    "awq-int4": AWQ,
    "w4a16": GPTQ,
    "w8a8": SMOOTHQUANT,
    "fp8": NEAREST,
    "fp8-block": NEAREST,
}


@dataclass(frozen=True)
class Wanted:
    """What a command is to write.

    Args:
        formats: names of safetensors formats, in order.
        gguf_kinds: kinds of GGUF files, in order.
    """

    formats: tuple[str, ...]
    gguf_kinds: tuple[str, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether OUT is the release itself, not a folder of releases."""
        return len(self.formats) + bool(self.gguf_kinds) == 1


def wanted_formats(text: str) -> Wanted:
    """What ``--format`` names: ``gptq-int4,fp8``, ``gguf:Q8_0,Q4_K_M``, or both in any order.

    Words behind ``gguf:`` are kinds of GGUF files, up to the next name of a format.

    Raises:
        ConfigError: with every word that is unknown or repeated.
    """
    formats: list[str] = []
    kinds: list[str] = []
    problems: list[Problem] = []
    in_gguf = False
    for word in (part.strip() for part in text.split(",")):
        name, colon, kind = word.partition(":")
        if name.lower() == GGUF and colon:
            in_gguf, word = True, kind.strip()
        elif word.lower() in SAFETENSORS_FORMATS:
            in_gguf = False
        group, known = (kinds, GGUF_KINDS) if in_gguf else (formats, SAFETENSORS_FORMATS)
        exact = next((one for one in known if one.lower() == word.lower()), None)
        if exact is None:
            problems.append(_unknown(word, in_gguf=in_gguf))
        elif exact in group:
            problems.append(Problem("--format", exact, "is named twice; remove one."))
        else:
            group.append(exact)
    if problems:
        raise ConfigError(problems)
    return Wanted(tuple(formats), tuple(kinds))


def _unknown(word: str, *, in_gguf: bool) -> Problem:
    if word.lower() == GGUF:
        return Problem("--format", word, f"names no kind: write gguf:Q8_0,Q4_K_M or others of {', '.join(GGUF_KINDS)}.")
    if in_gguf:
        known = (*GGUF_KINDS, *SAFETENSORS_FORMATS)
        fix = f"is neither a kind of GGUF file ({', '.join(GGUF_KINDS)}) nor a format.{did_you_mean(word, known)}"
        return Problem("--format", word, fix)
    kind = next((one for one in GGUF_KINDS if one.lower() == word.lower()), None)
    if kind is not None:
        return Problem("--format", word, f"is a kind of GGUF file: write gguf:{kind}.")
    names = ", ".join((*SAFETENSORS_FORMATS, "gguf:KIND"))
    return Problem("--format", word, f"is no known format; there are {names}.{did_you_mean(word, SAFETENSORS_FORMATS)}")


def default_method(format_: str) -> str:
    """What makes the values of a format where nobody says it."""
    return DEFAULT_METHODS[format_]
