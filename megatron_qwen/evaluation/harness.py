"""A model for lm-evaluation-harness (lm-eval 0.4.13) that answers with the ranks of any layout.

Requests become ids here as the harness's own ``hf`` model has them, so that both are asked the same. The harness itself
runs on rank 0 alone and sees one rank; the layout divides the requests where they are answered: in the engine
(``inference.together``), or in the forward pass of a run (``training.text_scores``).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_qwen.data.tokenizers.tokenizer import Tokenizer
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.inference.answered import AnsweredLog
from megatron_qwen.inference.request import Answer, FinishReason, Request, Sampling
from megatron_qwen.inference.together import in_parts

_NEW_TOKENS = 256  # of an answer whose task names no number, as the harness's hf model
# Of generation arguments, those that say nothing about a greedy or sampled answer.
_WITHOUT_EFFECT = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "use_cache", "num_beams")
Progress = Callable[[int, int], None]


class Answering(Protocol):
    """Answers on all ranks; rank 0 has it."""

    @property
    def longest(self) -> int:
        """Positions of a text."""

    @property
    def at_a_time(self) -> int:
        """Requests that are worth an ``answer``: so many are lost where a process is killed."""

    def answer(self, requests: Sequence[Request]) -> Mapping[int, Answer]:
        """Answers by the number of the request."""


@dataclass(frozen=True)
class ChatFormat:
    """How turns become a prompt.

    Args:
        render: messages (role, content), and whether the answer is to begin, to a text.
        template: source of the template, for the record.
        name: of the tokenizer.
    """

    render: Callable[[list[dict[str, str]], bool], str]
    template: str
    name: str


@dataclass(frozen=True)
class _Asked:
    """A request of the harness as the engine takes it.

    Args:
        key: names it in the log of what is answered.
        request: without a number of its own.
    """

    key: str
    request: Request


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks, answered by all ranks.

    Args:
        answering: the ranks.
        tokenizer: of the model.
        ends: ids that end a text.
        end: the id that stands in front of a text without context.
        answered: what is known already; kept up to date.
        chat: how turns become a prompt; None where the tokenizer has no template.
        progress: told how many of how many requests are answered.
    """

    def __init__(
        self,
        answering: Answering,
        tokenizer: Tokenizer,
        *,
        ends: Sequence[int],
        end: int,
        answered: AnsweredLog,
        chat: ChatFormat | None = None,
        progress: Progress = lambda done, of: None,
    ) -> None:
        super().__init__()
        self._answering, self._ids, self._ends, self._end = answering, tokenizer, tuple(ends), end
        self._answered, self._chat, self._progress = answered, chat, progress
        self.max_length = answering.longest

    @property
    def eot_token_id(self) -> int:
        """Id that stands in front of a text without context."""
        return self._end

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number."""
        return _NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Of the chat template."""
        return "" if self._chat is None else self._chat.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the chat template."""
        return self._chat.template if self._chat is not None and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as a prompt.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if self._chat is None:
            raise ConfigError(Problem("--chat", None, "the tokenizer has no chat template; omit it."))
        return self._chat.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a control token that it spells is one id, and nothing is added."""
        return self._ids.encode_batch([string])[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of answers, in nats, and whether greedy choice gives them."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in nats; long ones in windows that predict every token once."""
        windows = [
            list(
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    ),
                )
            )
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([(None, *window) for text in windows for window in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its context, in nats, and whether greedy choice gives it."""
        asked = []
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            fix = f"does not fit into the {self.max_length:,} positions that the model is given; leave the task out."
            raise ConfigError(Problem("an answer to be scored", f"{longest:,} tokens", fix))
        for _text, context, continuation in requests:
            whole = (*context, *continuation)[-(self.max_length + 1) :]
            first = max(1, len(whole) - len(continuation))
            key = _key("score", first, whole)
            asked.append(_Asked(key, Request(whole, None, score_from=first)))
        return [(logprob, greedy) for logprob, greedy in self._answers(asked, _score)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, up to a stop string, which they leave out."""
        asked, times = [], Counter[tuple[Any, ...]]()
        for request in requests:
            context, arguments = request.args
            sampling = self._sampling(arguments)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ConfigError(
                    Problem(
                        f"{request.task_name}: max_gen_toks",
                        sampling.max_new_tokens,
                        f"the model has {self.max_length:,} positions for prompt and answer; lower it in the task.",
                    )
                )
            prompt = tuple(self.tok_encode(context)[-room:])
            sample = times[sampling, prompt] if sampling.temperature else 0  # the harness repeats an instance
            times[sampling, prompt] += 1
            key = _key("generate", sampling, sample, prompt)
            asked.append(_Asked(key, Request(prompt, sampling, sample=sample)))
        return [str(text) for text in self._answers(asked, self._text)]

    def _sampling(self, arguments: Mapping[str, Any]) -> Sampling:
        kwargs = normalize_gen_kwargs(dict(arguments), self.max_gen_toks)
        until = kwargs.pop("until", None) or []
        greedy = not kwargs.get("do_sample") or not kwargs.get("temperature", 1.0)
        sampling = Sampling(
            max_new_tokens=kwargs.pop("max_gen_toks"),
            temperature=0.0 if greedy else float(kwargs.get("temperature", 1.0)),
            top_p=1.0 if greedy else float(kwargs.get("top_p") or 1.0),
            top_k=0 if greedy else int(kwargs.get("top_k") or 0),
            repetition_penalty=float(kwargs.get("repetition_penalty") or 1.0),
            stop_tokens=self._ends,
            stop_strings=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )
        unknown = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
        if kwargs.get("num_beams") not in (None, 1):
            unknown["num_beams"] = kwargs["num_beams"]
        if unknown:
            fix = "is none that the engine has; the task cannot be run."
            raise ConfigError([Problem("generation_kwargs", f"{name}={value}", fix) for name, value in unknown.items()])
        sampling.check()
        return sampling

    def _text(self, request: Request, answer: Answer) -> str:
        assert request.sampling is not None
        tokens = answer.tokens
        if answer.reason is FinishReason.STOP and tokens and tokens[-1] in self._ends:
            tokens = tokens[:-1]
        text = self._ids.decode(tokens)
        for stop in request.sampling.stop_strings:
            text = text.partition(stop)[0]
        return text

    def _answers(self, asked: Sequence[_Asked], kept: Callable[[Request, Answer], Any]) -> list[Any]:
        """What is kept of every answer; what was answered before is not asked again, nor the same twice."""
        missing = {one.key: one.request for one in asked if one.key not in self._answered}
        keys = list(missing)
        numbered = [_numbered(missing[key], number) for number, key in enumerate(keys)]
        done = len(asked) - len(numbered)
        self._progress(done, len(asked))
        for part in in_parts(numbered, self._answering.at_a_time):
            answers = self._answering.answer(part)
            self._answered.keep({keys[one.number]: kept(one, answers[one.number]) for one in part})
            done += len(part)
            self._progress(done, len(asked))
        return [self._answered[one.key] for one in asked]


def _key(*parts: Any) -> str:
    """Names a request by what is asked."""
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _numbered(request: Request, number: int) -> Request:
    return Request(request.prompt, request.sampling, number, request.sample, request.score_from)


def _score(request: Request, answer: Answer) -> tuple[float, bool]:
    return sum(answer.prompt_logprobs), all(answer.prompt_greedy)
