"""A byte-level BPE, of tokenizer.json, as tokens of a GGUF file.

llama.cpp knows how a byte-level BPE splits text by a name, ``tokenizer.ggml.pre``, each with a pattern of its own
(``llm_tokenizer_bpe`` in src/llama-vocab.cpp). Its converter finds the name by a hash of the ids of a text, and so
refuses every tokenizer that it has not seen. Here the name follows from the pattern.

llama.cpp does not normalise text: NFC, which Qwen's tokenizers have, is left to whoever sends the text.
"""

from typing import Any

from checkpoints_convert.formats.gguf.tokens import Tokens, TokenType
from megatron_qwen.data.tokenizers.content import QWEN2_SPLIT, TokenizerContent
from megatron_qwen.errors import ConversionError, Problem

_QWEN35_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
# Llama 3's: digits in threes, else Qwen2's. "llama-bpe" has words of the vocabulary whole, whatever the merges
# (ignore_merges); "dbrx" has the same pattern without that.
_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PRE = {
    (QWEN2_SPLIT, False): "qwen2",
    (_QWEN35_SPLIT, False): "qwen35",
    (_LLAMA3_SPLIT, True): "llama-bpe",
    (_LLAMA3_SPLIT, False): "dbrx",
}
_GPT2 = "gpt-2"  # the pattern inside tokenizers' ByteLevel (use_regex)


def is_byte_level(content: TokenizerContent) -> bool:
    """Whether a tokenizer.json is a BPE on the letters that stand for bytes."""
    return content.model.get("type", "BPE") == "BPE" and any(
        part.get("type") == "ByteLevel" for part in _parts(content.pre_tokenizer)
    )


def byte_level_tokens(content: TokenizerContent) -> Tokens:
    """The tokens of a tokenizer.json.

    Raises:
        ConversionError: llama.cpp has no name for how it splits text, or no means for one of its rules.
    """
    problems = _problems(content)
    pre = _pre(content)
    if pre is None:
        fix = (
            "is split by a pattern that llama.cpp has no name for (it knows those of Qwen2, Qwen3.5, Llama 3 and GPT-2 "
            "here): its ids would differ. Retrain with Qwen2's pattern, as `mq data tokenizer train` does."
        )
        problems.append(Problem(f"{content.path}: pre_tokenizer", _shown(content.pre_tokenizer), fix))
    if problems or pre is None:
        raise ConversionError(problems)
    ids: dict[str, int] = {**content.model["vocab"], **content.added_ids}
    size = max(ids.values()) + 1
    names, types = [""] * size, [TokenType.UNUSED] * size
    for name, index in content.model["vocab"].items():
        names[index], types[index] = name, TokenType.NORMAL
    for token in content.added:
        name, index = str(token["content"]), int(token["id"])
        # As llama.cpp's converter has it: what looks like a token of control is one.
        control = token.get("special") or (name.startswith("<|") and name.endswith("|>"))
        names[index], types[index] = name, TokenType.CONTROL if control else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content.model.get("merges") or ()]
    return Tokens("gpt2", pre, names, types, merges=merges)


def _parts(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return pre_tokenizer.get("pretokenizers") or [pre_tokenizer]


def _pre(content: TokenizerContent) -> str | None:
    parts = _parts(content.pre_tokenizer)
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(parts) == 1 and last.get("use_regex", True) and not content.model.get("ignore_merges"):
        return _GPT2
    split = parts[0]
    if len(parts) != 2 or last.get("use_regex", True) or split.get("type") != "Split" or split.get("invert"):
        return None
    if split.get("behavior") != "Isolated":
        return None
    pattern = split.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    return _PRE.get((str(found), bool(content.model.get("ignore_merges"))))


def _problems(content: TokenizerContent) -> list[Problem]:
    found = []
    kind = (content.normalizer or {"type": "NFC"}).get("type")
    if kind != "NFC":
        fix = "changes text; llama.cpp does not, so its ids would differ."
        found.append(Problem(f"{content.path}: normalizer", str(kind), fix))
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if content.model.get(name):
            fix = "llama.cpp's byte-level BPE has no such rule."
            found.append(Problem(f"{content.path}: model.{name}", str(content.model[name]), fix))
    for token in content.added:
        for rule in ("lstrip", "rstrip", "single_word"):
            if token.get(rule):
                fix = f"the token has the rule {rule}, which llama.cpp does not apply to it."
                found.append(Problem(f"{content.path}: added_tokens", str(token["content"]), fix))
    return found


def _shown(value: Any) -> str:
    return str(value)[:120]
