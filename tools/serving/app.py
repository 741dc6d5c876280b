"""The HTTP application: routes, limits, errors with their status."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from megatron_qwen.data.tokenizers.tokenizer import Tokenizer
from megatron_qwen.errors import UserError
from megatron_qwen.inference.request import Answer
from megatron_qwen.inference.service import Service
from tools.generation.chat import ChatTemplate
from tools.serving.answering import Answering, TooLong
from tools.serving.asked import BadRequest, ChatAsked, CompletionAsked, understood
from tools.serving.metrics import metrics_text
from tools.serving.replies import Reply, error_body
from tools.serving.tool_calls import begins_call, for_template, split_calls

_GONE_LOOK_S = 0.5
_OPEN_PATHS = ("/health", "/metrics")
_CLIENT_GONE = 499  # as nginx writes it into its log; nobody receives it
_BAD, _AUTH, _SERVER = "invalid_request_error", "authentication_error", "server_error"


@dataclass(frozen=True)
class Server:
    """What is served, and within which limits.

    Args:
        service: that answers.
        tokenizer: of the model.
        chat: its chat template; None where it has none.
        ends: ids that end a completion.
        chat_ends: ids that end an answer of a conversation.
        name: of the model.
        key: that clients must send; None asks for none.
        most_pending: requests that may wait or be answered.
        most_bytes: of a body.
        timeout_s: of a request.
        chat_sampling: temperature and the like of conversations that name none.
    """

    service: Service
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    ends: tuple[int, ...]
    chat_ends: tuple[int, ...]
    name: str
    key: str | None = None
    most_pending: int = 256
    most_bytes: int = 8 << 20
    timeout_s: float = 600.0
    chat_sampling: Mapping[str, Any] = field(default_factory=dict)


class _Refused(Exception):
    """A request that gets an error."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.status, self.body = status, body


def build_app(server: Server) -> FastAPI:
    """The application."""

    async def guard(request: Request) -> None:
        # Not request.url, part of which the client writes.
        if request.scope["path"] not in _OPEN_PATHS and not _has_key(server, request):
            raise _Refused(401, error_body("Wrong or missing API key.", kind=_AUTH, code="invalid_api_key"))

    # Not a middleware: it would stand between a stream and the news that its client is gone.
    guarded = [Depends(guard)]
    app = FastAPI(title="mq serve", docs_url=None, redoc_url=None, openapi_url=None, dependencies=guarded)

    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return JSONResponse(error_body(f"There is no {request.url.path}.", kind=_BAD, code="not_found"), 404)

    @app.get("/health")
    async def health() -> Response:
        stopping = server.service.is_stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(metrics_text(server.service), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": server.name, "object": "model", "created": 0, "owned_by": "mq"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = _asked(CompletionAsked, await _body(server, request), server)
        given = asked.prompts()
        texts = iter(server.tokenizer.encode_batch([prompt for prompt in given if isinstance(prompt, str)]))
        prompts = [next(texts) if isinstance(prompt, str) else prompt for prompt in given]
        reply = Reply(False, server.name, server.tokenizer.decode, asked.logprobs is not None, tools=False)
        return await _reply(server, request, asked, prompts, reply)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = _asked(ChatAsked, await _body(server, request), server)
        if server.chat is None:
            raise _bad("The model's tokenizer has no chat template; use /v1/completions.")
        tools = [] if asked.tool_choice == "none" else asked.tools or []
        try:
            text = server.chat.render(for_template(asked.turns()), tools=tools)
        except BadRequest as error:
            raise _bad(str(error), error.param) from None
        except UserError as error:
            raise _bad(error.problems[0].fix, "messages") from None
        prompts = server.tokenizer.encode_batch([text])
        reply = Reply(True, server.name, server.tokenizer.decode, bool(asked.logprobs), tools=bool(tools))
        return await _reply(server, request, asked, prompts, reply)

    return app


def _has_key(server: Server, request: Request) -> bool:
    given = request.headers.get("authorization", "")
    return server.key is None or hmac.compare_digest(given.encode(), f"Bearer {server.key}".encode())


async def _body(server: Server, request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > server.most_bytes:
            told = f"The body has more than {server.most_bytes:,} bytes."
            raise _Refused(413, error_body(told, kind=_BAD, code="request_too_large"))
        parts.append(part)
    return b"".join(parts)


def _asked[Kind: (CompletionAsked, ChatAsked)](kind: type[Kind], body: bytes, server: Server) -> Kind:
    try:
        asked = understood(kind, body)
    except BadRequest as error:
        raise _bad(str(error), error.param) from None
    if asked.model != server.name:
        told = f"The model {asked.model!r} does not exist; this server has {server.name!r}."
        raise _Refused(404, error_body(told, kind=_BAD, param="model", code="model_not_found"))
    return asked


def _bad(message: str, param: str | None = None, code: str | None = None) -> _Refused:
    return _Refused(400, error_body(message, kind=_BAD, param=param, code=code))


async def _reply(
    server: Server, request: Request, asked: CompletionAsked | ChatAsked, prompts: Sequence[Sequence[int]], reply: Reply
) -> Response:
    service, longest = server.service, server.service.engine.stage.longest
    if not prompts or not all(prompts):
        raise _bad("A prompt has no tokens.", "prompt")
    room = longest - max(map(len, prompts))
    most = getattr(asked, "max_completion_tokens", None) or asked.max_tokens
    if room < 1 or (most or 0) > room:
        wanted = f"{max(map(len, prompts)):,} tokens of prompt and {most or 1:,} new ones"
        raise _bad(f"The model has {longest:,} positions; {wanted} do not fit.", code="context_length_exceeded")
    if service.is_stopping:
        raise _Refused(503, error_body("The server is stopping.", kind=_SERVER))
    if service.pending + len(prompts) * asked.n > server.most_pending:
        told = f"{service.pending:,} requests wait already; try again later."
        raise _Refused(429, error_body(told, kind="rate_limit_error", code="queue_full"))
    talks = isinstance(asked, ChatAsked)
    ends, stated = (server.chat_ends, server.chat_sampling) if talks else (server.ends, {})
    sampling = replace(
        asked.sampling(ends=ends, most=room, stated=stated), max_new_tokens=most or room, samples=asked.n
    )
    answering = Answering(
        service, [tuple(prompt) for prompt in prompts], sampling, server.tokenizer.decode, server.timeout_s
    )
    tokens = sum(map(len, prompts))
    if asked.stream:
        events = _events(answering, reply, tokens, usage=asked.includes_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    whole = asyncio.ensure_future(_whole(answering, len(prompts) * asked.n))
    gone = asyncio.ensure_future(_until_gone(request))
    await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not whole.done():
        whole.cancel()
        return Response(status_code=_CLIENT_GONE)
    try:
        return JSONResponse(reply.whole(whole.result(), tokens))
    except TooLong:
        told = f"The answer took more than {server.timeout_s:,.0f} s."
        raise _Refused(504, error_body(told, kind=_SERVER, code="timeout")) from None
    except UserError as error:
        raise _bad(str(error.problems[0] if error.problems else error)) from None


async def _whole(answering: Answering, choices: int) -> list[tuple[str, Answer]]:
    texts, answers = [""] * choices, dict[int, Answer]()
    async with answering:
        async for event in answering.events():
            texts[event.choice] += event.text
            if event.answer is not None:
                answers[event.choice] = event.answer
    return [(text, answers[number]) for number, text in enumerate(texts)]


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_GONE_LOOK_S)


async def _events(answering: Answering, reply: Reply, prompt_tokens: int, *, usage: bool) -> AsyncIterator[str]:
    """Server-sent events. What may be the call of a tool is held back until the answer is whole."""
    texts, shown, new = dict[int, str](), dict[int, int](), 0
    try:
        async with answering:
            async for event in answering.events():
                number, first = event.choice, event.choice not in texts
                texts[number] = texts.get(number, "") + event.text
                new += len(event.tokens)
                if first and reply.chat:
                    yield _sse(reply.chunk(number, first=True))
                until = begins_call(texts[number]) if reply.tools else len(texts[number])
                if event.answer is None:
                    text = texts[number][shown.get(number, 0) : until]
                    shown[number] = shown.get(number, 0) + len(text)
                    if text or (reply.logprobs and event.tokens):
                        yield _sse(reply.chunk(number, text, tokens=event.tokens))
                    continue
                for chunk in _ending(reply, number, texts[number], shown.get(number, 0), event.answer):
                    yield _sse(chunk)
        if usage:
            yield _sse(reply.last_chunk(prompt_tokens, new))
        yield "data: [DONE]\n\n"
    except TooLong:
        yield _sse(error_body("The answer took too long.", kind=_SERVER, code="timeout"))
    except UserError as error:
        yield _sse(error_body(str(error.problems[0] if error.problems else error), kind=_BAD))


def _ending(reply: Reply, number: int, text: str, shown: int, answer: Answer) -> list[dict[str, Any]]:
    """The last chunks of a choice: text that was held back, calls of tools, why it ended."""
    content, calls = split_calls(text) if reply.tools else (text, [])
    reason = None if answer.reason is None else str(answer.reason.value)
    found = []
    if rest := content[shown:]:
        found.append(reply.chunk(number, rest))
    if calls:
        found.append(reply.chunk(number, calls=calls))
    return [*found, reply.chunk(number, reason="tool_calls" if calls else reason)]


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
