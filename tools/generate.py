"""``mq generate``: text from an exported model."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem


def generate(directory: Path, prompts: Sequence[str], *, tokens: int, temperature: float, seed: int) -> list[str]:
    """Continuations of prompts by the model in a Hugging Face directory, prompts left out.

    Args:
        directory: as ``mq convert to-hf`` makes it.
        prompts: texts to go on from.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


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
    if not (options.directory / "config.json").is_file():
        raise ConfigError(
            Problem("directory", options.directory, "is no Hugging Face directory: it has no config.json.")
        )
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


if __name__ == "__main__":
    run_program(main)
