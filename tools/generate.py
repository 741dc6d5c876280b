"""``mq generate``: text from an exported model."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, ConversionError, DataError, Problem


def generate(directory: Path, prompts: Sequence[str], *, tokens: int, temperature: float, seed: int) -> list[str]:
    """Continuations of prompts by the model in a Hugging Face directory, prompts left out.

    Args:
        directory: as ``mq convert to-hf`` makes it.
        prompts: texts to go on from.
        tokens: most new tokens.
        temperature: 0 is greedy decoding (argmax).
        seed: of the sampling.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConversionError(
            Problem("mq generate", None, "needs transformers: pip install 'megatron_qwen[hf]'.")
        ) from None
    import torch

    from megatron_qwen.data.tokenizers.release import load_with

    logging.disable_progress_bar()
    try:
        tokenizer = load_with(_tokenizer_class(directory), directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
    except (ConversionError, DataError):
        raise
    except Exception as error:  # whatever a damaged directory makes transformers raise
        reason = str(error).splitlines()[0][:200]
        raise ConversionError(
            Problem(str(directory), None, f"cannot be loaded ({type(error).__name__}: {reason}).")
        ) from None
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


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


def main(arguments: Sequence[str]) -> int:
    """Prints a continuation for each prompt."""
    parser = Parser(
        "mq generate",
        description="Generates text from a Hugging Face directory.",
        examples=[
            'mq generate out/first-hf --prompt "def main("',
            'mq generate out/first-hf --prompt "import " --temperature 0',
        ],
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    _require_sensible(options)
    texts = generate(
        options.directory,
        options.prompt,
        tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    if options.json:
        print(
            json.dumps(
                [{"prompt": prompt, "text": text} for prompt, text in zip(options.prompt, texts, strict=True)], indent=2
            )
        )
    else:
        for prompt, text in zip(options.prompt, texts, strict=True):
            print(f"{prompt}{text}\n")
    return 0


def _require_sensible(options: argparse.Namespace) -> None:
    problems = []
    if not (options.directory / "config.json").is_file():
        fix = "is not a Hugging Face directory: it has no config.json."
        problems.append(Problem("directory", options.directory, fix))
    if not 0 <= options.temperature < math.inf:
        problems.append(Problem("--temperature", options.temperature, "must be 0 or more."))
    if options.max_new_tokens < 1:
        problems.append(Problem("--max-new-tokens", options.max_new_tokens, "must be at least 1."))
    if not 0 <= options.seed < 2**63:
        problems.append(Problem("--seed", options.seed, "must be from 0 to 2^63 - 1."))
    if not all(options.prompt):
        problems.append(Problem("--prompt", "''", "must hold text."))
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    run_program(main)
