"""The same by transformers: a second opinion on a Hugging Face directory."""

from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.errors import ConfigError, ConversionError, DataError, Problem
from megatron_qwen.hf import library
from megatron_qwen.inference.request import Sampling


def generate(directory: Path, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of prompts by the model in a Hugging Face directory, prompts left out.

    Args:
        directory: as ``mq convert to-hf`` makes it.
        prompts: texts to go on from.
        sampling: without penalties and stop strings.

    Raises:
        ConfigError: the source is no such directory, or an option is not passed on.
        ConversionError: transformers is missing, or does not load it.
    """
    _require(directory, sampling)
    try:
        transformers = library.transformers()
    except ImportError:
        raise ConversionError(
            Problem("mq generate", None, "needs transformers: pip install 'megatron_qwen[hf]'.")
        ) from None
    import torch

    from megatron_qwen.data.tokenizers.release import load_with

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = load_with(_tokenizer_class(directory), directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    except (ConversionError, DataError):
        raise
    except Exception as error:  # whatever a damaged directory makes transformers raise
        reason = str(error).splitlines()[0][:200]
        raise ConversionError(
            Problem(str(directory), None, f"cannot be loaded ({type(error).__name__}: {reason}).")
        ) from None
    torch.manual_seed(sampling.seed)
    how: dict[str, object] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        pad = {"pad_token_id": tokenizer.eos_token_id}
        out = model.generate(**inputs, max_new_tokens=sampling.max_new_tokens, **pad, **how)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def _require(directory: Path, sampling: Sampling) -> None:
    problems = []
    if not (directory / "config.json").is_file():
        fix = "is not a Hugging Face directory: it has no config.json. Export it (mq convert to-hf)."
        problems.append(Problem("--with transformers", directory, fix))
    if sampling.has_penalties or sampling.stop_strings or sampling.samples > 1:
        fix = "takes neither penalties nor stop strings nor several samples; omit them, or --with."
        problems.append(Problem("--with", "transformers", fix))
    if problems:
        raise ConfigError(problems)


def _tokenizer_class(directory: Path) -> str:
    """The class of transformers that gives the ids that tokenizer.json says."""
    from megatron_qwen.data.tokenizers.release import AUTO, loader_of
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    if not (directory / "tokenizer.json").is_file():
        return AUTO
    refusal = "cannot be used, because no class of transformers does what the tokenizer's files say"
    way_out = "Another version of transformers may; or export the model again with another tokenizer (--tokenizer)."
    reference = load_tokenizer(directory)
    return loader_of(directory, reference, where=directory, refusal=refusal, way_out=way_out).name or AUTO
