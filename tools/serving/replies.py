"""Objects that a client gets, in OpenAI's words."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_qwen.inference.request import Answer
from tools.serving.tool_calls import split_calls

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reply:
    """What all objects of a reply have.

    Args:
        chat: of a chat, else of a completion.
        model: name.
        decode: ids to text.
        logprobs: whether they are wanted.
        tools: whether calls of tools are looked for.
    """

    chat: bool
    model: str
    decode: Decode
    logprobs: bool
    tools: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}")
        object.__setattr__(self, "created", int(time.time()))

    def whole(self, choices: Sequence[tuple[str, Answer]], prompt_tokens: int) -> dict[str, Any]:
        """The reply at once: text and answer of every choice."""
        found = [self._choice(number, text, answer) for number, (text, answer) in enumerate(choices)]
        usage = usage_of(prompt_tokens, sum(len(answer.tokens) for _, answer in choices))
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": found, "usage": usage}

    def chunk(
        self,
        number: int,
        text: str = "",
        *,
        tokens: Sequence[tuple[int, float]] = (),
        reason: str | None = None,
        first: bool = False,
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """An event of a stream."""
        choice: dict[str, Any] = {"index": number, "finish_reason": reason}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
            if text:
                delta["content"] = text
            if calls:
                delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
            choice["delta"] = delta
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(tokens) if self.logprobs and tokens else None
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last_chunk(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The event with the numbers of tokens."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage_of(prompt_tokens, new_tokens)}

    def _choice(self, number: int, text: str, answer: Answer) -> dict[str, Any]:
        reason = None if answer.reason is None else str(answer.reason.value)
        logprobs = None
        if self.logprobs:
            logprobs = self._logprobs(list(zip(answer.tokens, answer.logprobs, strict=True)))
        found: dict[str, Any] = {"index": number, "logprobs": logprobs, "finish_reason": reason}
        if not self.chat:
            return {**found, "text": text}
        content, calls = split_calls(text) if self.tools else (text, [])
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if calls:
            message["tool_calls"], found["finish_reason"] = calls, "tool_calls"
        return {**found, "message": message}

    def _logprobs(self, tokens: Sequence[tuple[int, float]]) -> dict[str, Any]:
        texts = [self.decode([token]) for token, _ in tokens]
        if not self.chat:
            return {"tokens": texts, "token_logprobs": [logprob for _, logprob in tokens], "top_logprobs": None}
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, (_, logprob) in zip(texts, tokens, strict=True)
            ]
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.__dict__["id"], "object": kind, "created": self.__dict__["created"], "model": self.model}


def usage_of(prompt: int, new: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
