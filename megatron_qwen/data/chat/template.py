"""The chat template of a tokenizer, rendered as transformers renders it.

transformers compiles templates in an immutable sandbox with trim_blocks and lstrip_blocks, loop controls, its own
``tojson`` (which escapes neither HTML characters nor letters), ``raise_exception``, ``strftime_now`` and the tag
``generation`` around what the assistant writes (transformers/utils/chat_template_utils.py). Templates get the
tokenizer's named tokens as well.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from megatron_qwen.data.chat.marks import BEGIN_ANSWER, END_ANSWER
from megatron_qwen.errors import DataError, Problem

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateRefuses(ValueError):
    """A template cannot render a conversation."""


class ChatTemplate:
    """A chat template.

    Args:
        source: in Jinja.
        tokens: named tokens of the tokenizer, such as bos_token.
        variables: that templates may read, such as enable_thinking.

    Raises:
        DataError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.variables = source, dict(variables or {})
        self._tokens = dict(tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        # One time for a preparation, and for all of it on a day: the same input has the same ids.
        today = datetime.datetime.combine(datetime.date.today(), datetime.time())
        environment.globals["strftime_now"] = today.strftime
        try:
            self.tree = environment.parse(source)
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(Problem("chat_template", None, f"is not a Jinja template ({error}).")) from None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what it renders."""
        whole = hashlib.sha256(self.source.encode()).hexdigest()
        return {"template_sha256": whole, "tokens": self._tokens, "variables": self.variables}

    @cached_property
    def marks_answers(self) -> bool:
        """Whether it says itself what the assistant writes, by the tag ``generation``."""
        return _TAG.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        begin_answer: bool = False,
    ) -> str:
        """Messages as text; what the tag ``generation`` encloses stands between marks (``marks.py``).

        Args:
            messages: of the conversation.
            tools: that the assistant may call.
            begin_answer: whether the beginning of an answer follows.

        Raises:
            TemplateRefuses: it cannot render them.
        """
        try:
            return self._compiled.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=begin_answer,
                **self.variables,
                **self._tokens,
            )
        except Exception as error:  # templates raise errors of Jinja, and of whatever they call
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TemplateRefuses(told) from None


def chat_template_of(tokenizer: Path, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The chat template of a tokenizer directory: chat_template.jinja, or the field of tokenizer_config.json.

    Raises:
        DataError: there is none.
    """
    config: dict[str, Any] = {}
    path = tokenizer / "tokenizer_config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(Problem(str(path), None, "is not valid JSON; fix it.")) from None
    source = config.get("chat_template")
    if (own := tokenizer / "chat_template.jinja").is_file():
        source = own.read_text(encoding="utf-8")
    if isinstance(source, list):  # several, by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str) or not source:
        fix = "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)."
        raise DataError(Problem(str(tokenizer), None, fix))
    tokens = {}
    for name in _NAMED:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(source, tokens, variables)


class _Generation(jinja2.ext.Extension):
    """Puts marks around what the tag ``generation`` encloses."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        """The node of a tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{BEGIN_ANSWER}{caller()}{END_ANSWER}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
