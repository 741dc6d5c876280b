"""A file of prompts, answered into a file; a command that was killed goes on where it was."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_open
from megatron_qwen.inference.answered import AnsweredLog
from megatron_qwen.inference.request import Answer, FinishReason, Request, Sampling
from megatron_qwen.inference.together import Together, in_parts
from tools.generation.chat import Rendering
from tools.generation.loaded import LoadedModel
from tools.generation.progress import RequestProgress
from tools.generation.texts import text_of

FIELD = "prompt"
# Fields of an answer, which a record of prompts must not have.
_OURS = ("text", "tokens", "logprobs", "sample", "finish_reason")
_PROMPTS = 4096  # read at a time
_MOST_SHOWN = 10


@dataclass(frozen=True)
class PromptFile:
    """JSON lines with a prompt each; other fields are copied to its answers.

    Args:
        path: of the file.
        count: of its prompts.
        digest: SHA-256 of its content.
    """

    path: Path
    count: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "PromptFile":
        """Reads all of it once.

        Raises:
            DataError: it cannot be read, or lines are no records with a prompt; the first of them are named.
        """
        digest, count = hashlib.sha256(), 0
        wrong: list[Problem] = []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if (fault := _fault(line)) is None:
                        count += 1
                    elif fault and len(wrong) < _MOST_SHOWN:
                        wrong.append(Problem(f"{path}:{number}", None, fault))
        except OSError as error:
            raise DataError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
        if not count and not wrong:
            wrong = [Problem(str(path), None, "has no prompts.")]
        if wrong:
            raise DataError(wrong)
        return cls(path, count, digest.hexdigest())

    def records(self) -> Iterator[dict[str, Any]]:
        """Its records, in their order."""
        with self.path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.strip())


def _fault(line: bytes) -> str | None:
    """What is wrong with a line; None if it has a prompt, and empty if it is blank."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "is not JSON."
    if not isinstance(record, dict) or not isinstance(record.get(FIELD), str) or not record[FIELD]:
        return f'must be an object with "{FIELD}", a text that is not empty.'
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair, which is no character."
    if taken := [name for name in _OURS if name in record]:
        return f"has the field {taken[0]}, which is one of an answer; rename it."
    return None


def answer_file(
    model: LoadedModel,
    together: Together,
    prompts: PromptFile,
    sampling: Sampling,
    out: Path,
    render: Rendering | None = None,
) -> None:
    """Answers all prompts of a file into another, in their order; on rank 0, the others follow.

    Args:
        model: on this rank.
        together: the ranks.
        prompts: the file.
        sampling: of the answers.
        out: JSON lines, an answer each; beside it a file has what is answered while the command runs.
        render: makes of a prompt what the model gets; None leaves it as it is.

    Raises:
        DataError: a prompt is too long for the model or for the cache.
        ConfigError: what is answered is by another model, or of other prompts.
    """
    how = replace(sampling, stop_tokens=sampling.stop_tokens or (model.ends if render is None else model.chat_ends))
    identity = {**model.identity(), "prompts": prompts.digest, "sampling": repr(how)}
    if render is not None:
        identity["chat"] = render("\N{OBJECT REPLACEMENT CHARACTER}")
    log = AnsweredLog(out.with_name(out.name + ".answered"), identity)
    total = prompts.count * how.samples
    if len(log):
        print(f"{len(log):,} of {total:,} answers are there from before", file=sys.stderr)
    progress = RequestProgress("answers")
    for requests in _asked(model, prompts, how, render):
        missing = [request for request in requests if _key(request) not in log]
        for part in in_parts(missing, together.at_a_time):
            progress(len(log), total)
            answers = together.answer(part)
            log.keep({_key(one): _kept(model, answers[one.number], how) for one in part})
    progress.close()
    with atomic_open(out) as file:
        for record, requests in zip(prompts.records(), _by_prompt(model, prompts, how, render), strict=True):
            for request in requests:
                line = {**record, **log[_key(request)], "sample": request.sample}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    log.remove()


def _by_prompt(
    model: LoadedModel, prompts: PromptFile, how: Sampling, render: Rendering | None
) -> Iterator[list[Request]]:
    number = 0
    records = prompts.records()
    while texts := [record[FIELD] for record in islice(records, _PROMPTS)]:
        for ids in model.tokenizer.encode_batch(list(map(render, texts)) if render is not None else texts):
            yield [Request(tuple(ids), how, number + sample, sample) for sample in range(how.samples)]
            number += how.samples


def _asked(
    model: LoadedModel, prompts: PromptFile, how: Sampling, render: Rendering | None
) -> Iterator[Sequence[Request]]:
    """Requests to be answered, many at a time; those of equal prompts once."""
    by_prompt = _by_prompt(model, prompts, how, render)
    while some := list(islice(by_prompt, _PROMPTS)):
        yield list({_key(request): request for requests in some for request in requests}.values())


def _key(request: Request) -> str:
    return xxhash.xxh3_128_hexdigest(repr((request.prompt, request.sample)).encode())


def _kept(model: LoadedModel, answer: Answer, how: Sampling) -> dict[str, Any]:
    reason: FinishReason | None = answer.reason
    return {
        "text": text_of(model, answer, how),
        "tokens": answer.tokens,
        "logprobs": answer.logprobs,
        "finish_reason": None if reason is None else reason.value,
    }
