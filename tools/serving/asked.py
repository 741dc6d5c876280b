"""What a client may ask, in OpenAI's words (API reference, 2025: completions and chat completions)."""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_qwen.inference.request import Sampling

_MOST_STOPS, _LONGEST_STOP = 16, 256
_ROLES = ("system", "developer", "user", "assistant", "tool")


_Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]


# The model's own distribution, which OpenAI's interface has as default.
_PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


class _Asked(BaseModel):
    """Fields of both kinds. An unknown one is refused: it would change the answer, or the client thinks so."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # each of these: as the model's files say, or plain
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # no field of OpenAI's, but of every open server
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None  # the same
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0  # the engine has none
    n: Annotated[int, Field(ge=1, le=64)] = 1
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None  # for a provider's records

    @property
    def includes_usage(self) -> bool:
        """Whether the last event of a stream has the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, *, ends: tuple[int, ...], most: int, stated: Mapping[str, Any]) -> Sampling:
        """How tokens are chosen.

        Args:
            ends: ids that end an answer.
            most: new tokens where none are named.
            stated: what holds where the request names nothing, by field.
        """
        asked = {name: getattr(self, name) for name in _PLAIN if getattr(self, name) is not None}
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=self.max_tokens or most,
            **{**_PLAIN, **stated, **asked},
            presence_penalty=self.presence_penalty,
            stop_tokens=ends,
            stop_strings=tuple(stop for stop in stops if stop),
            seed=secrets.randbits(62) if self.seed is None else self.seed,
        )


class CompletionAsked(_Asked):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Literal[0, 1] | None = None  # of the chosen token; the engine keeps no others
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = 1
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, as texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [one for one in self.prompt if isinstance(one, int)]
        return [ids] if ids else [one for one in self.prompt if not isinstance(one, int)]


class ChatAsked(_Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None  # the engine cannot force a call
    parallel_tool_calls: Literal[True] | None = None
    logprobs: bool | None = False
    top_logprobs: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    def turns(self) -> list[dict[str, Any]]:
        """Messages as a chat template takes them.

        Raises:
            BadRequest: a message is none.
        """
        found = []
        for number, message in enumerate(self.messages):
            role, content, where = message.get("role"), message.get("content"), f"messages.{number}"
            if role not in _ROLES:
                raise BadRequest(f"{where}.role: must be one of {', '.join(_ROLES)}.", f"{where}.role")
            if isinstance(content, list):
                if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                    raise BadRequest(f"{where}.content: only parts of text are understood.", f"{where}.content")
                content = "".join(part["text"] for part in content)
            calls = message.get("tool_calls")
            if not isinstance(content, str) and not (content is None and calls):
                raise BadRequest(f"{where}.content: must be a text.", f"{where}.content")
            if calls and not (role == "assistant" and isinstance(calls, list) and all(map(_is_call, calls))):
                raise BadRequest(f"{where}.tool_calls: must be calls of functions.", f"{where}.tool_calls")
            found.append({**message, "role": "system" if role == "developer" else role, "content": content or ""})
        return found


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def is_text(content: Any) -> bool:
    """Whether all that JSON has said can be written as UTF-8: it may spell half of a surrogate pair."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class BadRequest(Exception):
    """A request that is not understood: what is wrong, and with which field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def understood[Kind: _Asked](kind: type[Kind], body: bytes) -> Kind:
    """The request in a body.

    Raises:
        BadRequest: it is no JSON, or fields are wrong; all are named.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not is_text(content):
        raise BadRequest("The body has half of a surrogate pair, which is no character.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        wrong = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors(include_url=False)]
        told = "; ".join(f"{where or 'body'}: {why}" for where, why in wrong)
        raise BadRequest(told, wrong[0][0] or None) from None
