"""How the tokenizer of a model makes prompts of turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.hf import library

Rendering = Callable[[str], str]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, rendered as transformers does.

    Args:
        library: the tokenizer of transformers that has it.
        source: the template.
        name: of the tokenizer.
    """

    library: Any
    source: str
    name: str

    def render(
        self, turns: Sequence[dict[str, Any]], *, begin_answer: bool = True, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """Turns as a prompt.

        Args:
            turns: messages: role, content, tool calls.
            begin_answer: whether the assistant's turn begins behind them; else the last turn goes on.
            tools: that the assistant may call.

        Raises:
            ConfigError: the template refuses the turns.
        """
        try:
            text: str = self.library.apply_chat_template(
                list(turns),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=begin_answer,
                continue_final_message=not begin_answer,
            )
        except Exception as error:  # templates raise errors of jinja, and of whatever they call
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(Problem("messages", None, f"the chat template refuses them: {told[0]}")) from None
        return text

    def of_a_question(self, system: str | None) -> Rendering:
        """How the first turn of a user becomes a prompt, with a system message in front."""
        before = [] if system is None else [{"role": "system", "content": system}]

        def rendered(text: str) -> str:
            return self.render([*before, {"role": "user", "content": text}])

        return rendered


def chat_template(tokenizer: Path | None) -> ChatTemplate:
    """The chat template of a tokenizer directory.

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
        raise ConfigError(Problem("--chat", tokenizer, "the tokenizer has no chat template."))
    return ChatTemplate(found, found.chat_template, tokenizer.name)
