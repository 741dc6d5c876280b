"""What an export of a model that was fine-tuned to answer says beside its weights: where answers end, how to sample.

A base model's files say neither: its documents end with another token than turns do, and a model that is exported with
them alone goes on after its answer. The form is that of Qwen2.5's instruct models: ``eos_token_id`` of config.json is
the end of a turn, that of generation_config.json both ends, and the tokenizer's ``eos_token`` the end of a turn.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from megatron_qwen.data.chat.answers import answer_form
from megatron_qwen.data.chat.template import chat_template_of
from megatron_qwen.data.tokenizers.tokenizer import BpeTokenizer, load_tokenizer
from megatron_qwen.errors import ConversionError, DataError, Problem

# Where both are, transformers takes the second's tokens.
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class AnswerEnds:
    """Tokens that end what the model writes.

    Args:
        turn: id of the token that ends a turn.
        turn_name: its text.
        text: id of the token that ends a document; None where the tokenizer has none.
    """

    turn: int
    turn_name: str
    text: int | None

    @property
    def both(self) -> list[int]:
        """The end of a turn, then that of a document."""
        return [self.turn] + ([] if self.text in (None, self.turn) else [self.text])


def answer_ends(source: CheckpointSource) -> AnswerEnds | None:
    """Where answers end; None for a model that was not trained to answer, or whose template has no token for it."""
    if source.tokenizer is None or source.config.objective.kind == "pretrain":
        return None
    try:
        tokenizer = load_tokenizer(source.tokenizer)
        if not isinstance(tokenizer, BpeTokenizer):
            return None
        form = answer_form(chat_template_of(source.tokenizer), tuple(tokenizer.spellable), tokenizer.written)
    except DataError:
        return None
    return None if form is None else AnswerEnds(tokenizer.spellable[form.ends], form.ends, tokenizer.end_of_text)


def end_of_answers(source: CheckpointSource | None) -> int | None:
    """Id that ends a turn, of a checkpoint that was trained to answer; else None."""
    ends = None if source is None else answer_ends(source)
    return None if ends is None else ends.turn


def answering_files(source: CheckpointSource | None) -> dict[str, dict[str, Any]]:
    """The tokenizer's files that name tokens, with the end of a turn as eos_token; those that say so already are not.

    Raises:
        ConversionError: a file is no JSON object.
    """
    ends = None if source is None else answer_ends(source)
    if source is None or ends is None:
        return {}
    found = {}
    for name in NAMING_FILES:
        path = (source.tokenizer or Path()) / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ConversionError(Problem(str(path), None, "is no JSON object; name a tokenizer that is whole."))
        eos = content.get("eos_token")
        if (eos.get("content") if isinstance(eos, dict) else eos) == ends.turn_name:
            continue
        # What ended texts so far is what rows of a batch are filled with, as in Qwen's files.
        pad = {} if content.get("pad_token") or eos is None else {"pad_token": eos}
        found[name] = content | pad | {"eos_token": ends.turn_name}
    return found
