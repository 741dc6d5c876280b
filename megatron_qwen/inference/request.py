"""What is asked of the engine, and what it answers."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_qwen.errors import ConfigError, Problem


class FinishReason(StrEnum):
    """Why an answer ended, in the words of OpenAI's interface."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_new_tokens, or the end of the context


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: at most.
        temperature: 0 takes the most likely token.
        top_k: choose among this many; 0 among all.
        top_p: choose among the most likely tokens that have this much probability together.
        repetition_penalty: divides the positive logits of tokens that are in prompt or answer, and multiplies the
            negative ones (Keskar et al. 2019, arXiv 1909.05858).
        presence_penalty: is taken from the logits of tokens that are in the answer.
        stop_tokens: ids that end an answer; they are part of ``tokens`` and not of the text.
        stop_strings: texts that end an answer; the text ends before them.
        seed: of the noise.
        samples: answers to each prompt.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    samples: int = 1

    def problems(self) -> list[Problem]:
        """What is out of range, by the names of a command's options."""
        rules = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "must be at least 1."),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "must be 0 or more."),
            ("--top-k", self.top_k, self.top_k >= 0, "must be 0 (all tokens) or more."),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1."),
            (
                "--repetition-penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "must be above 0; 1 is none.",
            ),
            ("--presence-penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "must be a number."),
            ("--samples", self.samples, self.samples >= 1, "must be at least 1."),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "must be from 0 to 2^63 - 1."),
        )
        return [Problem(name, value, fix) for name, value, holds, fix in rules if not holds]

    def check(self) -> None:
        """Raises ConfigError with everything that is out of range."""
        if problems := self.problems():
            raise ConfigError(problems)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0


@dataclass(frozen=True)
class Request:
    """A prompt, or a text whose log-probabilities are wanted.

    Args:
        prompt: token ids, at least one.
        sampling: how it goes on; None does not, and gives the log-probabilities of the prompt.
        number: of the answer, counted over all samples of all prompts; answers come in this order.
        sample: which answer to the same prompt.
        score_from: position of the first token whose log-probability is wanted, where ``sampling`` is None. What is
            before it may be shared with other requests.
    """

    prompt: tuple[int, ...]
    sampling: Sampling | None
    number: int = 0
    sample: int = 0
    score_from: int = 1


@dataclass
class Answer:
    """What the engine made of a request.

    Args:
        tokens: new ones.
        logprobs: of each new token, under the model's own distribution (temperature 1, no filters), in nats.
        reason: why it ended; None of a text that was only scored.
        prompt_logprobs: of a scored text: of token ``score_from`` and those behind it.
        prompt_greedy: of a scored text: which of those is the most likely token.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_greedy: list[bool] = field(default_factory=list)
