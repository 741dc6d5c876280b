"""A request that is being answered."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_qwen.inference.blocks import BLOCK, chain
from megatron_qwen.inference.noise import stream_key
from megatron_qwen.inference.request import Answer, FinishReason, Request
from megatron_qwen.inference.sampler import Row


@dataclass(eq=False)
class Sequence:
    """Tokens, and how far the cache has them. Two of the same prompt are two.

    Args:
        request: what was asked.
        longest: positions that the model has.
        tokens: prompt and answer.
        cached: positions whose keys and values are in the cache.
        blocks: that hold them, in order.
        names: of the full blocks among them (``blocks.chain``).
        answer: so far.
        cancelled: whether nobody wants the answer any more.
    """

    request: Request
    longest: int
    tokens: list[int] = field(init=False)
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        sampling = self.request.sampling
        self._key = stream_key(sampling.seed if sampling else 0, self.tokens, self.request.sample)

    @property
    def is_scored(self) -> bool:
        """Whether only the log-probabilities of its text are wanted."""
        return self.request.sampling is None

    @property
    def length(self) -> int:
        """Positions to compute. Nothing is asked of the last token of a scored text."""
        return max(1, len(self.tokens) - self.is_scored)

    @property
    def sharable(self) -> int:
        """Positions at its beginning that need not be computed where the cache has them."""
        return (self.request.score_from if self.is_scored else len(self.tokens)) - 1

    @property
    def next_length(self) -> int:
        """Positions in the cache when its next token has been computed, too."""
        return min(self.length + (not self.is_scored), self.longest)

    def row(self) -> Row:
        """Its next token, for the sampler."""
        assert self.request.sampling is not None
        return Row(self.request.sampling, self._key, len(self.tokens), self.tokens, len(self.request.prompt))

    def name_of(self, number: int) -> int:
        """The name of its full block ``number``."""
        while len(self.names) <= number:
            at = len(self.names)
            before = self.names[-1] if self.names else 0
            self.names.append(chain(before, self.tokens[at * BLOCK : (at + 1) * BLOCK]))
        return self.names[number]

    def take(self, token: int, logprob: float) -> None:
        """A token was chosen; afterwards ``answer.reason`` says whether it was the last."""
        sampling = self.request.sampling
        assert sampling is not None
        self.tokens.append(token)
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        if token in sampling.stop_tokens:
            self.answer.reason = FinishReason.STOP
        elif len(self.answer.tokens) >= sampling.max_new_tokens or len(self.tokens) >= self.longest:
            self.answer.reason = FinishReason.LENGTH

    def stop_at_strings(self, decode: Callable[[list[int]], str]) -> None:
        """Ends the answer where its text holds a stop string."""
        sampling = self.request.sampling
        if sampling is None or not sampling.stop_strings or self.answer.reason is FinishReason.STOP:
            return
        # A stop string of n characters takes at most as many tokens of bytes; those before them were looked at.
        most = 4 * max(len(text) for text in sampling.stop_strings) + 8
        text = decode(self.answer.tokens[-most:])
        if any(stop in text for stop in sampling.stop_strings):
            self.answer.reason = FinishReason.STOP

    def forget(self) -> list[int]:
        """Gives up what is cached, to be computed again later; the blocks that it held."""
        blocks, self.blocks, self.cached = self.blocks, [], 0
        return blocks

    def put_back(self) -> list[int]:
        """As ``forget``, of one that is not finished: what a scored text has so far will be found again."""
        self.answer.prompt_logprobs.clear()
        self.answer.prompt_greedy.clear()
        return self.forget()
