"""How the tokenizer of a model makes prompts of turns."""

from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.evaluation.harness import ChatFormat
from megatron_qwen.hf import library


def chat_format(tokenizer: Path | None) -> ChatFormat:
    """The chat template of a tokenizer directory, rendered as transformers does.

    Raises:
        ConfigError: there is none.
    """
    assert tokenizer is not None
    try:
        found: Any = library.transformers().AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise ConfigError(Problem("--chat", tokenizer, f"transformers cannot read this tokenizer: {told}")) from None
    if not found.chat_template:
        raise ConfigError(Problem("--chat", tokenizer, "the tokenizer has no chat template; omit --chat."))

    def render(turns: list[dict[str, str]], begin_answer: bool) -> str:
        text: str = found.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=begin_answer, continue_final_message=not begin_answer
        )
        return text

    return ChatFormat(render, found.chat_template, tokenizer.name)
