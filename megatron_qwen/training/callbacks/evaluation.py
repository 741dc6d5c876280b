"""Scores in tasks of lm-evaluation-harness while a run trains, on the ranks that train it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.inference.announcements import Announcements
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord
from megatron_qwen.training.text_scores import TextScores

if TYPE_CHECKING:
    from megatron_qwen.evaluation.scores import Writing
    from megatron_qwen.evaluation.tasks import Prepared

log = logging.getLogger(__name__)
PREFIX = "eval/"  # of the names in a record


class Evaluation(Callback):
    """Adds ``eval/TASK/METRIC`` to the record every evaluation.interval steps and at the last step.

    Args:
        tokenizer: directory; read on rank 0.
    """

    timed_as = "evaluation"

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = tokenizer
        self._texts: TextScores | None = None
        self._prepared: Prepared | None = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Loads the tasks, on rank 0; whatever is wrong with them is said before the first step.

        Raises:
            ConfigError: a task that there is not, or whose data cannot be read; on all ranks.
        """
        components = trainer.components
        self._texts = TextScores(components, self._tokenizer, progress=lambda: trainer.enter("evaluating"))
        started = Announcements("evaluation", components.batch_slice.device)
        if dist.get_rank() == 0:
            try:
                self._prepare(trainer)
            except UserError as error:
                started.tell((type(error), error.problems))
                raise
            started.tell(None)
        elif (wrong := started.told()) is not None:
            kind, problems = wrong
            raise kind(problems)

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Evaluates if it is time."""
        config = trainer.components.config
        interval = config.evaluation.interval
        due = (interval and record.iteration % interval == 0) or record.iteration == config.training.train_iters
        if due:
            trainer.enter("evaluating")
            began = time.monotonic()
            found = self.measure(trainer)
            record.extra.update({f"{PREFIX}{name}": value for name, value in found.items()})
            record.extra["evaluation_s"] = time.monotonic() - began

    def measure(self, trainer: TrainerInterface) -> Mapping[str, float]:
        """Scores as ``TASK/METRIC``; empty on ranks other than 0."""
        assert self._texts is not None, "before_training comes first"
        if self._prepared is None:
            self._texts.follow()
            return {}
        found = self._scores(trainer, self._texts)
        self._texts.close()
        return found

    def _prepare(self, trainer: TrainerInterface) -> None:
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            fix = "need lm-evaluation-harness, which is not installed: pip install 'megatron_qwen[eval]'."
            raise ConfigError(Problem("evaluation.tasks", None, fix)) from None
        from megatron_qwen.evaluation.scores import CountedOnly
        from megatron_qwen.evaluation.tasks import FIELDS, prepare

        config = trainer.components.config
        settings, began = config.evaluation, time.monotonic()
        directories = [] if settings.task_dir is None else [Path(settings.task_dir)]
        self._prepared = prepare(settings.tasks, directories, shots=settings.shots, code="scored", where=FIELDS)
        assert self._texts is not None
        counted = CountedOnly(config.data.seq_length, cannot_write=self._texts.cannot_write)
        try:
            self._scores(trainer, counted)
        except UserError:
            raise
        except Exception as error:  # whatever a task's own code raises; the other ranks wait for a word
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fix = f"cannot be asked of a run: {told}"
            raise ConfigError(Problem("evaluation.tasks", ", ".join(settings.tasks), fix)) from error
        if counted.cannot_write is not None:
            log.info("evaluation: answers are scored and none is written under %s", counted.cannot_write)
        log.info(
            "evaluation: %s; %s texts of %s tokens each time, loaded in %.1f s",
            ", ".join(settings.tasks),
            f"{counted.requests:,}",
            f"{counted.tokens:,}",
            time.monotonic() - began,
        )

    def _scores(self, trainer: TrainerInterface, answering: "Writing") -> dict[str, float]:
        from megatron_qwen.evaluation.scores import scores

        settings = trainer.components.config.evaluation
        assert self._prepared is not None
        return scores(self._prepared, answering, self._tokenizer, examples=settings.examples, shots=settings.shots)
