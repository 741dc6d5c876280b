"""Which sequences compute which tokens in a step: continuous batching over a pool of blocks.

Sequences join whenever blocks are free and leave when they are finished. A prompt is computed in parts, so that a long
one does not hold up the others. Where blocks run out, the sequence that joined last is put back and computed again
later (Kwon et al. 2023, arXiv 2309.06180, section 4.5). Nothing depends on the time, so all ranks of a layout decide
alike.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_qwen.inference.blocks import BLOCK, BlockPool, blocks_of
from megatron_qwen.inference.sequence import Sequence


@dataclass(frozen=True)
class Span:
    """Tokens of a sequence that a step computes.

    Args:
        sequence: whose.
        start: position of the first.
        stop: position behind the last.
    """

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_at_end(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.stop == len(self.sequence.tokens)

    @property
    def asked(self) -> range:
        """Positions whose logits are asked for: of the next token, or of every label of a scored text."""
        sequence = self.sequence
        if sequence.is_scored:
            first = max(self.start, sequence.request.score_from - 1)
            return range(first, max(first, min(self.stop, len(sequence.tokens) - 1)))
        return range(self.stop - 1, self.stop) if self.is_at_end else range(0)


@dataclass(frozen=True)
class Limits:
    """What a step may take.

    Args:
        sequences: that are answered at a time.
        tokens: of prompts that a step computes, at most; at least a block.
        prompts_first: whether steps with many tokens of prompts have no others. Then sequences begin together and end
            together, and steps have more of them; but one that is being answered waits for prompts.
    """

    sequences: int = 64
    tokens: int = 512
    prompts_first: bool = True


class Scheduler:
    """Sequences that wait and that are being answered.

    Args:
        pool: the blocks of the cache.
        limits: of a step.
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of those that wait. All of it, at its longest, must fit into the pool."""
        self.waiting.append(sequence)

    def cancel(self, number: int) -> None:
        """Gives up the request of a number: at once while it waits, else when its step has ended."""
        self.waiting = deque(one for one in self.waiting if one.request.number != number)
        for sequence in self.running:
            if sequence.request.number == number:
                sequence.cancelled = True

    def step(self) -> list[Span]:
        """The tokens of the next step; their blocks are held."""
        for sequence in [one for one in self.running if one.cancelled]:
            self._leave(sequence)
        spans, left = [], self.limits.tokens
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # put back for one before it
            missing = sequence.length - sequence.cached
            part = 1 if missing == 1 else min(missing, left)
            if part < 1 or not self._hold(sequence, sequence.cached + part):
                continue
            spans.append(Span(sequence, sequence.cached, sequence.cached + part))
            left -= 0 if missing == 1 else part
        spans = [span for span in spans if span.sequence in self.running]
        single = [span for span in spans if span.stop - span.start == 1]
        spans = [span for span in spans if span.stop - span.start > 1]
        for span in spans:
            self._publish(span)
        while left > 0 and self.waiting and len(self.running) < self.limits.sequences:
            sequence = self.waiting[0]
            self._share(sequence)
            stop = min(sequence.length, sequence.cached + left)
            # With room for its next token, which would otherwise put back what runs.
            if blocks_of(sequence.next_length) - len(sequence.blocks) > self.pool.free:
                self.pool.give_back(sequence.forget())
                break
            self.waiting.popleft()
            self.running.append(sequence)
            held = self._hold(sequence, stop)
            assert held
            spans.append(Span(sequence, sequence.cached, stop))
            self._publish(spans[-1])
            left -= stop - sequence.cached
        if self.limits.prompts_first and left <= self.limits.tokens // 2:
            return spans
        for span in single:
            self._publish(span)
        return [*single, *spans]

    def done(self, spans: list[Span]) -> Iterator[Sequence]:
        """Takes note of a step that was computed; gives the sequences that are finished and releases their blocks."""
        for span in spans:
            sequence = span.sequence
            sequence.cached = span.stop
            finished = span.stop == sequence.length if sequence.is_scored else sequence.answer.reason
            if finished:
                self._leave(sequence)
                if not sequence.cancelled:
                    yield sequence

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.forget())

    def _publish(self, span: Span) -> None:
        """Lets others take over the blocks that the step fills, in the same step, too: it writes before it attends."""
        for number in range(span.start // BLOCK, span.stop // BLOCK):
            self.pool.publish(span.sequence.blocks[number], span.sequence.name_of(number))

    def _hold(self, sequence: Sequence, stop: int) -> bool:
        """Takes the blocks up to a position, from those that joined later if need be; False if it was put back."""
        while (missing := blocks_of(stop) - len(sequence.blocks)) > self.pool.free:
            last = self.running.pop()
            self.pool.give_back(last.put_back())
            self.waiting.appendleft(last)
            self.preempted += 1
            if last is sequence:
                return False
        sequence.blocks += [self.pool.take() for _ in range(missing)]
        return True

    def _share(self, sequence: Sequence) -> None:
        """Takes over blocks that hold the beginning of a sequence, as far as nothing is asked of it."""
        for number in range(sequence.sharable // BLOCK):
            block = self.pool.share(sequence.name_of(number))
            if block is None:
                break
            sequence.blocks.append(block)
            sequence.cached += BLOCK
