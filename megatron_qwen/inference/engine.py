"""Answers requests on all ranks of a layout: which rank does what in which tick.

With several pipeline stages as many groups of sequences are on their way, each at another stage: a group enters the
first stage in every tick, and its tokens are known when it has left the last. All ranks hold the same sequences and
decide alike; only hidden states and chosen tokens travel.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.inference.blocks import BLOCK, BlockPool, blocks_of
from megatron_qwen.inference.gathered import GatheredSets
from megatron_qwen.inference.kv_cache import KvCache
from megatron_qwen.inference.request import Answer, Request
from megatron_qwen.inference.sampler import choose
from megatron_qwen.inference.scheduler import Limits, Scheduler, Span
from megatron_qwen.inference.sequence import Sequence as Answered
from megatron_qwen.inference.stage import Stage, StepTokens
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS

_LOGIT_ROWS = 128  # of a scored text at a time: of a vocabulary of 152,064 they take 78 MB
_AHEAD = 4  # times as many requests are waiting as can be answered at a time


@dataclass
class _Lane:
    """Sequences that go through the stages together.

    Args:
        scheduler: of them.
        cache: their keys and values on this rank.
        sets: of the cache.
        under_way: what they compute at the moment.
    """

    scheduler: Scheduler
    cache: KvCache
    sets: GatheredSets
    under_way: StepTokens | None = field(default=None)


class Engine:
    """Answers requests.

    Args:
        stage: this rank's part of the model.
        blocks: of the cache, over all lanes; the same on all ranks.
        limits: of a step.
        decode: ids to text, for stop strings.

    Attributes:
        on_token: called for every chosen token, with its request and log-probability; None calls nothing.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        blocks: int,
        limits: Limits | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.stage, limits, self._decode = stage, limits or Limits(), decode
        groups = stage.groups
        self._stages, self._rank = groups.pp.size(), groups.pp.rank()
        each = blocks // self._stages
        caches = [KvCache(stage.shape, each, device=stage.device) for _ in range(self._stages)]
        self._lanes = [_Lane(Scheduler(BlockPool(each), limits), cache, GatheredSets(cache)) for cache in caches]
        self._blocks, self._limits = each, limits
        self._received: torch.Tensor | None = None
        self._now = 0  # ticks so far
        self.on_token: Callable[[Request, int, float], None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or is computed."""
        return any(lane.scheduler.has_work or lane.under_way is not None for lane in self._lanes)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return sum(len(lane.scheduler.waiting) for lane in self._lanes)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(len(lane.scheduler.running) for lane in self._lanes)

    @property
    def free_share(self) -> float:
        """Of the cache's blocks, the part that nobody holds."""
        return float(sum(lane.scheduler.pool.free for lane in self._lanes) / (self._blocks * self._stages))

    @property
    def preempted(self) -> int:
        """Sequences that were put back for want of blocks."""
        return sum(lane.scheduler.preempted for lane in self._lanes)

    def problem(self, request: Request) -> Problem | None:
        """Why a request cannot be answered; None if it can."""
        prompt, longest = len(request.prompt), self.stage.longest
        if not prompt:
            return Problem("prompt", request.number, "has no tokens; give a text.")
        if request.sampling is None and not 1 <= request.score_from < max(2, prompt):
            fix = f"must be a position of the text behind its first token, 1 to {prompt - 1:,}."
            return Problem("score_from", request.score_from, fix)
        most = prompt + (-1 if request.sampling is None else 1)
        if most > longest:
            return Problem("prompt", f"{prompt:,} tokens", f"the model has {longest:,} positions; shorten the text.")
        wanted = prompt - 1 if request.sampling is None else min(longest, prompt + request.sampling.max_new_tokens)
        if blocks_of(wanted) > self._blocks:
            fix = f"the cache holds {self._blocks * BLOCK:,}; give it more memory, or ask for less."
            return Problem("prompt", f"{wanted:,} tokens with the answer", fix)
        largest = max(request.prompt)
        if largest >= self.stage.config.model.vocab_size or min(request.prompt) < 0:
            return Problem(
                "prompt", largest, f"is none of the {self.stage.config.model.vocab_size:,} ids of the model."
            )
        return None

    def require(self, requests: Iterable[Request]) -> None:
        """Raises DataError with the problems of all requests that cannot be answered."""
        found = [problem for request in requests if (problem := self.problem(request)) is not None]
        if found:
            raise DataError(found)

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answers, in the order in which they are finished; every rank gives all of them.

        All ranks of the layout must call it with the same requests; under expert parallelism those of a data-parallel
        group may have others, and must have exhausted it all.

        Raises:
            DataError: a request cannot be answered (``problem``).
        """
        waiting, left = iter(requests), True
        while True:
            if left:
                left = self._fill(self._lanes[self._now % self._stages], waiting)
            yield from self.step()
            if not self.anybody(left or self.is_busy):
                return

    def add(self, request: Request) -> None:
        """Lets a request wait, on every rank alike; ``step`` answers it.

        Raises:
            DataError: it cannot be answered (``problem``).
        """
        self.require([request])
        lane = min(self._lanes, key=lambda one: len(one.scheduler.waiting) + len(one.scheduler.running))
        lane.scheduler.add(Answered(request, self.stage.longest))

    def cancel(self, number: int) -> None:
        """Gives up a request, on every rank alike; it gets no answer. One that is answered already is no error."""
        for lane in self._lanes:
            lane.scheduler.cancel(number)

    def step(self) -> list[tuple[Request, Answer]]:
        """One tick of all ranks: the answers that it has finished."""
        self._enter(self._lanes[self._now % self._stages])
        found = list(self._tick(self._now))
        self._now += 1
        return found

    def _fill(self, lane: _Lane, requests: Iterator[Request]) -> bool:
        """Lets requests wait, a bounded number; False when there are no more."""
        most = self._limits.sequences * _AHEAD
        while len(lane.scheduler.waiting) < max(1, most // self._stages):
            request = next(requests, None)
            if request is None:
                return False
            if (problem := self.problem(request)) is not None:
                raise DataError(problem)
            lane.scheduler.add(Answered(request, self.stage.longest))
        return True

    def _enter(self, lane: _Lane) -> None:
        """Plans the next step of a lane that is at the first stage again."""
        spans = lane.scheduler.step()
        assert spans or not lane.scheduler.has_work, "a sequence that fits into the empty cache was not admitted"
        # Ranks with other experts of the same layers wait for the tokens of all: nothing, filled up, is a step, too.
        lane.under_way = self.stage.tokens(spans) if self.anybody(bool(spans)) else None

    def anybody(self, value: bool) -> bool:
        """Whether it holds on any rank that has experts of the same layers; all of them ask together."""
        group = self.stage.groups.ep
        if group.size() == 1:
            return value
        found = torch.tensor([int(value)], device=self.stage.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return bool(found.item())

    def _tick(self, tick: int) -> Iterator[tuple[Request, Answer]]:
        mine = self._lanes[(tick - self._rank) % self._stages]
        out = None
        if mine.under_way is not None:
            out = self.stage(mine.under_way, mine.cache, mine.sets, self._received)
        self._received = None
        last = self._lanes[(tick - self._stages + 1) % self._stages]
        if self._stages > 1:
            self._pass_on(tick, mine, out)
        if last.under_way is None:
            return
        tokens, last.under_way = last.under_way, None
        self._take(tokens, out if self.stage.is_last else None)
        for sequence in last.scheduler.done(list(tokens.spans)):
            yield sequence.request, sequence.answer

    def _pass_on(self, tick: int, mine: _Lane, out: torch.Tensor | None) -> None:
        """Sends hidden states to the next stage, and receives those that this one computes with in the next tick."""
        group, requests = self.stage.groups.pp, []
        if not self.stage.is_last and mine.under_way is not None:
            assert out is not None
            to = dist.get_global_rank(group, self._rank + 1)
            requests.append(dist.P2POp(dist.isend, out.contiguous(), to, group))
        if not self.stage.is_first:
            coming = self._lanes[(tick - self._rank + 1) % self._stages].under_way
            if coming is not None:
                shape = self.stage.hidden_shape(coming.count)
                self._received = torch.empty(shape, dtype=self.stage.shape.dtype, device=self.stage.device)
                source = dist.get_global_rank(group, self._rank - 1)
                requests.append(dist.P2POp(dist.irecv, self._received, source, group))
        for work in dist.batch_isend_irecv(requests) if requests else ():
            work.wait()

    def _take(self, tokens: StepTokens, hidden: torch.Tensor | None) -> None:
        """Chooses tokens, and log-probabilities of scored texts, on the last stage; all stages take them over."""
        ends = [span for span in tokens.spans if span.is_at_end and not span.sequence.is_scored]
        scored = [span for span in tokens.spans if span.sequence.is_scored]
        labels = sum(len(span.asked) for span in scored)
        found = torch.zeros(2, len(ends) + labels, dtype=torch.float64, device=self.stage.device)
        if hidden is not None and found.numel():
            found = self._chosen(tokens, hidden, ends, scored)
        if self._stages > 1 and found.numel():
            source = dist.get_global_rank(self.stage.groups.pp, self._stages - 1)
            dist.broadcast(found, source, group=self.stage.groups.pp)
        ids, logprobs = found[0].long().tolist(), found[1].tolist()
        for at, span in enumerate(ends):
            span.sequence.take(ids[at], logprobs[at])
            if self.on_token is not None:
                self.on_token(span.sequence.request, ids[at], logprobs[at])
            if self._decode is not None:
                span.sequence.stop_at_strings(self._decode)
        at = len(ends)
        for span in scored:
            count = len(span.asked)
            span.sequence.answer.prompt_greedy += [bool(one) for one in ids[at : at + count]]
            span.sequence.answer.prompt_logprobs += logprobs[at : at + count]
            at += count

    @torch.inference_mode()
    def _chosen(
        self, tokens: StepTokens, rows: torch.Tensor, ends: Sequence[Span], scored: Sequence[Span]
    ) -> torch.Tensor:
        """Token and log-probability of every row that is wanted, [2, rows]; of scored ones whether it is the likeliest.

        Args:
            tokens: of the step.
            rows: hidden states of those that are asked for, [n, h].
            ends: whose next token is chosen.
            scored: whose log-probabilities are wanted.
        """
        first, begin = {}, 0
        for span in tokens.spans:
            first[id(span)] = begin
            begin += len(span.asked)
        head, device = self.stage.head(), self.stage.device
        parts = []
        if ends:
            places = [first[id(span)] for span in ends]
            logits = self.stage.logits(_at_least(rows, places))
            chosen = choose(head.whole_logits(logits)[: len(ends)], [span.sequence.row() for span in ends])
            filled = torch.tensor(chosen + [0] * (len(logits) - len(ends)), device=device)
            logprobs = head.log_probs_of(logits, filled)[: len(ends)]
            parts.append(torch.stack((torch.tensor(chosen, device=device).double(), logprobs.double())))
        for span in scored:
            begin, asked = first[id(span)], span.asked
            places = list(range(begin, begin + len(asked)))
            wanted = span.sequence.tokens[asked.start + 1 : asked.stop + 1]
            for at in range(0, len(places), _LOGIT_ROWS):
                some, label = places[at : at + _LOGIT_ROWS], wanted[at : at + _LOGIT_ROWS]
                logits = self.stage.logits(_at_least(rows, some))
                likeliest = head.whole_logits(logits)[: len(some)].argmax(1)
                filled = torch.tensor(label + [0] * (len(logits) - len(some)), device=device)
                logprobs = head.log_probs_of(logits, filled)[: len(some)]
                same = likeliest == filled[: len(some)]
                parts.append(torch.stack((same.double(), logprobs.double())))
        return torch.cat(parts, dim=1)


def _at_least(rows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Rows at some places, filled up to as many as a GEMM needs for its bits."""
    more = max(0, INVARIANT_ROWS - len(places))
    return rows[torch.tensor([*places, *[places[0]] * more], device=rows.device)]
