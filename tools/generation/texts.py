"""Prompts as requests to the engine, and its answers as texts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_qwen.inference.request import Answer, FinishReason, Request, Sampling
from tools.generation.chat import Rendering
from tools.generation.loaded import LoadedModel


@dataclass(frozen=True)
class Completion:
    """An answer in words.

    Args:
        prompt: as it was given.
        number: over all samples of all prompts, in their order.
        sample: which answer to it.
        text: of the answer, without what ended it.
        answer: its tokens.
    """

    prompt: str
    number: int
    sample: int
    text: str
    answer: Answer

    def as_json(self, *, logprobs: bool) -> dict[str, Any]:
        """For ``--json``; ``tokens`` are those of the answer, with the one that ended it."""
        found: dict[str, Any] = {"prompt": self.prompt, "text": self.text, "tokens": self.answer.tokens}
        if logprobs:
            found["logprobs"] = self.answer.logprobs
        reason = self.answer.reason
        return {**found, "sample": self.sample, "finish_reason": None if reason is None else reason.value}


def complete(
    model: LoadedModel, prompts: Sequence[str], sampling: Sampling, render: Rendering | None = None
) -> Iterator[Completion]:
    """Answers to prompts, in the order in which they are finished.

    Args:
        model: that answers.
        prompts: as they are shown.
        sampling: of the answers.
        render: makes of a prompt what the model gets; None leaves it as it is.

    Raises:
        DataError: a prompt is too long for the model or for the cache.
    """
    ids = model.tokenizer.encode_batch(list(map(render, prompts) if render is not None else prompts))
    how = replace(sampling, stop_tokens=sampling.stop_tokens or (model.ends if render is None else model.chat_ends))
    for request, answer in model.engine.answer(_requests(ids, how)):
        prompt = prompts[request.number // how.samples]
        yield Completion(prompt, request.number, request.sample, text_of(model, answer, how), answer)


def _requests(ids: Iterable[Sequence[int]], sampling: Sampling) -> Iterator[Request]:
    for index, tokens in enumerate(ids):
        for sample in range(sampling.samples):
            yield Request(tuple(tokens), sampling, number=index * sampling.samples + sample, sample=sample)


def text_of(model: LoadedModel, answer: Answer, sampling: Sampling) -> str:
    """The text of an answer up to the token or string that ended it."""
    tokens = answer.tokens
    if answer.reason is FinishReason.STOP and tokens and tokens[-1] in sampling.stop_tokens:
        tokens = tokens[:-1]
    text = model.tokenizer.decode(tokens)
    places = [at for stop in sampling.stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
