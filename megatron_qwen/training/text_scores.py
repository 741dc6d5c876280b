"""Log-probabilities of texts by the forward pass of a run, under its own layout and with its own modules.

The engine (``inference/``) computes with modules of its own. This takes those that train, whatever they are: FP8,
Transformer Engine, virtual stages, context parallelism. Every text is a row of a micro-batch, filled up at its end.
Texts that are to be written go to the engine, where it works on the run's modules (``run_engine.py``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_qwen.data.loaders.batches import Batch, BatchRequest, micro_batches
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.reading.samples import Sample
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.inference.announcements import Announcements
from megatron_qwen.inference.request import Answer, Request
from megatron_qwen.objectives.base import Mean, ObjectiveResult
from megatron_qwen.objectives.output_head import OutputHead
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.forward import ForwardStep
from megatron_qwen.training.run_engine import cannot_write, engine_of
from megatron_qwen.training.step import run_batch

_PLACE = "place"
_NOT_ASKED = -1
_SHORTEST = 64  # tokens of a row; it doubles up to the length of a sample, so that there are few shapes
_LOGIT_ROWS = 128  # tokens whose logits of the whole vocabulary are there at a time
_MICRO_BATCHES = 32  # of a rank in one call of the schedule


class TokenScores:
    """An objective without a loss: keeps the log-probability of every token that is asked for, and if it is likeliest.

    Attributes:
        found: [2, tokens]: log-probabilities in nats, and 1 where no token is more likely; 0 where another rank has it.
    """

    extra_fields = (ExtraField(_PLACE, "int64", "token"),)
    metrics: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.found = torch.zeros(2, 0, dtype=torch.float64)

    def begin(self, tokens: int, device: torch.device) -> None:
        """Forgets what was found; so many tokens are asked for."""
        self.found = torch.zeros(2, tokens, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, head: OutputHead, batch: Batch) -> ObjectiveResult:
        """See ``Objective``."""
        rows = head.rows(hidden)
        places, labels = batch.extra[_PLACE].t().reshape(-1), batch.labels.t().reshape(-1)
        asked = (places != _NOT_ASKED).nonzero().squeeze(1)
        for some in asked.split(_LOGIT_ROWS):
            logits = head.logits(rows[some])
            likeliest = head.whole_logits(logits).argmax(1)
            logprobs = head.log_probs_of(logits, labels[some])
            self.found[:, places[some]] = torch.stack((logprobs.double(), (likeliest == labels[some]).double()))
        return ObjectiveResult(Mean(rows.new_zeros((), dtype=torch.float32), rows.new_ones((), dtype=torch.int64)))


class _Rows:
    """Texts as samples of one length; behind the last one come rows without text."""

    is_packed = False
    extra_fields = TokenScores.extra_fields

    def __init__(self, texts: Sequence[tuple[Request, int]], seq_length: int) -> None:
        self._texts, self.seq_length = texts, seq_length

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``."""
        size = self.seq_length
        tokens, labels = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        places = np.full(size, _NOT_ASKED, dtype=np.int64)
        if index < len(self._texts):
            request, first = self._texts[index]
            text = np.array(request.prompt, dtype=np.int64)
            count = len(text) - 1
            tokens[:count], labels[:count] = text[:-1], text[1:]
            places[request.score_from - 1 : count] = np.arange(first, first + len(text) - request.score_from)
        starts = np.zeros(1, dtype=np.int64)
        return Sample(tokens, labels, np.zeros(size, dtype=np.float32), starts, {_PLACE: places})


class TextScores:
    """Scores and writes texts on all ranks of a run. Every rank makes one; then rank 0 asks, all others ``follow``.

    Args:
        components: of the run.
        tokenizer: directory.
        progress: called after every call of the schedule: so long a silence is no hang.
        meeting: name of what rank 0 tells the others; each of several in a run has its own.
    """

    at_a_time = 1024

    def __init__(
        self,
        components: TrainingComponents,
        tokenizer: Path,
        progress: Callable[[], None] = lambda: None,
        meeting: str = "scores",
    ) -> None:
        self._tokenizer = tokenizer
        self._components, self._progress, self._objective = components, progress, TokenScores()
        config, groups = components.config, components.groups
        self._forward = ForwardStep(config, groups, self._objective)
        self._asked = Announcements(meeting, components.batch_slice.device)
        self.longest = config.data.seq_length
        # Both are set up for one shape of a micro-batch.
        self._one_shape = config.performance.cuda_graph_impl == "local" or bool(config.performance.tp_comm_overlap)

    def answer(self, requests: Sequence[Request]) -> Mapping[int, Answer]:
        """Scores by the number of the request; rank 0 only.

        Raises:
            DataError: a text that the model cannot read.
        """
        vocabulary = self._components.config.model.vocab_size
        if (largest := max((max(request.prompt) for request in requests), default=0)) >= vocabulary:
            fix = f"is none of the {vocabulary:,} ids of the model; the run needs the tokenizer that its data has."
            raise DataError(Problem("a token of the tests", largest, fix))
        assert all(one.sampling is not None or 2 <= len(one.prompt) <= self.longest + 1 for one in requests)
        if not requests:
            return {}
        self._asked.tell(list(requests))
        return self._answers(requests)

    def follow(self) -> None:
        """Scores with rank 0 until it is done; every other rank."""
        while (requests := self._asked.told()) is not None:
            self._answers(requests)

    def close(self) -> None:
        """Lets the other ranks go on; rank 0 only."""
        self._asked.tell(None)

    @property
    def cannot_write(self) -> str | None:
        """Why texts cannot be written under this run; None where they can."""
        return cannot_write(self._components)

    def _answers(self, requests: Sequence[Request]) -> dict[int, Answer]:
        model, found = self._components.model, dict[int, Answer]()
        model.train(False)
        with model.whole_parameters():
            if scored := [one for one in requests if one.sampling is None]:
                found |= self._scores(scored)
            if written := [one for one in requests if one.sampling is not None]:
                found |= engine_of(self._components, self._tokenizer, self._asked).compute(written)
                self._progress()
        model.train(True)
        return found

    def _scores(self, requests: Sequence[Request]) -> dict[int, Answer]:
        components = self._components
        firsts = np.cumsum([0, *(len(one.prompt) - one.score_from for one in requests)]).tolist()
        self._objective.begin(firsts[-1], components.batch_slice.device)
        by_length: dict[int, list[tuple[Request, int]]] = {}
        for request, first in sorted(zip(requests, firsts, strict=False), key=lambda one: len(one[0].prompt)):
            by_length.setdefault(self._length(len(request.prompt) - 1), []).append((request, first))
        for length, texts in by_length.items():
            self._run(texts, length)
        found = self._objective.found
        if components.groups.tp.rank() > 0:
            found.zero_()  # tensor-parallel ranks all have the same
        dist.all_reduce(found)
        logprobs, likeliest = found[0].tolist(), found[1].tolist()
        return {
            request.number: Answer(
                prompt_logprobs=logprobs[first:end], prompt_greedy=[bool(one) for one in likeliest[first:end]]
            )
            for request, first, end in zip(requests, firsts, firsts[1:], strict=False)
        }

    def _length(self, tokens: int) -> int:
        """Tokens of the row that a text gets."""
        parallel, length = self._components.config.parallel, _SHORTEST
        if self._one_shape:
            return self.longest
        while length < tokens:
            length *= 2
        unit = 2 * parallel.context_parallel_size * parallel.tensor_model_parallel_size
        return min(self.longest, -(-length // unit) * unit)

    def _run(self, texts: Sequence[tuple[Request, int]], length: int) -> None:
        components, place = self._components, self._components.batch_slice
        config = components.config
        tokens = config.data.seq_length * config.training.micro_batch_size
        replicas = place.dp_size
        rows = max(1, tokens // length)
        if not self._one_shape:
            rows = min(rows, -(-len(texts) // replicas))
        config = config.with_section("data", seq_length=length).with_section("training", micro_batch_size=rows)
        # Interleaved stages take micro-batches by the number of stages.
        unit = config.parallel.pipeline_model_parallel_size if config.parallel.virtual_stages > 1 else 1
        most = max(_MICRO_BATCHES // unit, 1) * unit * rows * replicas
        for begin in range(0, len(texts), most):
            some = texts[begin : begin + most]
            each = -(-len(some) // (rows * replicas * unit)) * unit
            request = BatchRequest(0, each * rows * replicas, rows)
            batches = list(self._batches(_Rows(some, length), request))
            run_batch(config, components.model, components.groups, self._forward, batches, forward_only=True)
            self._progress()

    def _batches(self, rows: _Rows, request: BatchRequest) -> Iterator[Batch]:
        place = self._components.batch_slice
        return (batch.to(place.device) for batch in micro_batches(rows, place, request))
