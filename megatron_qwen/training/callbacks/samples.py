"""Answers to fixed prompts while a run trains: what the model says, beside what it scores."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.chat.template import TemplateRefuses, chat_template_of
from megatron_qwen.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import atomic_write
from megatron_qwen.inference.request import Request, Sampling
from megatron_qwen.json_lines import objects
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord
from megatron_qwen.training.text_scores import TextScores

log = logging.getLogger(__name__)
_NEW_TOKENS = 64
_WHERE = "evaluation.prompts"


class Samples(Callback):
    """Appends an answer to every prompt to samples.jsonl, every evaluation.interval steps and at the last step.

    The most likely tokens are taken, so that answers of different steps differ by what was learnt. In fine-tuning a
    prompt is a user's turn.

    Args:
        tokenizer: directory.
        path: the file, lines of {iteration, prompt, text}.
    """

    timed_as = "evaluation"

    def __init__(self, tokenizer: Path, path: Path) -> None:
        self._directory, self._path = tokenizer, path
        self._texts: TextScores | None = None
        self._tokenizer: Tokenizer | None = None
        self._requests: list[Request] = []

    def before_training(self, trainer: TrainerInterface) -> None:
        """Makes the prompts; drops lines of steps that will be taken again.

        Raises:
            ConfigError: a prompt cannot be rendered, or leaves no room for an answer.
        """
        components = trainer.components
        texts = TextScores(components, self._directory, progress=lambda: trainer.enter("evaluating"), meeting="samples")
        if texts.cannot_write is not None:
            if dist.get_rank() == 0:
                log.info("%s: no answers are written under %s", _WHERE, texts.cannot_write)
            return
        self._texts, self._tokenizer = texts, load_tokenizer(self._directory)
        ends = tuple(dict.fromkeys((*components.data.ends_of_turn, self._tokenizer.end_of_text)))
        self._requests = _requests(components.config, self._directory, self._tokenizer, ends)
        if dist.get_rank() == 0 and self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _iteration(line) <= components.progress.iteration]
            if len(kept) < len(lines):
                atomic_write(self._path, "".join(kept))

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Answers if it is time."""
        config = trainer.components.config
        interval = config.evaluation.interval
        due = (interval and record.iteration % interval == 0) or record.iteration == config.training.train_iters
        if not due or self._texts is None:
            return
        trainer.enter("evaluating")
        if dist.get_rank() > 0:
            self._texts.follow()
            return
        answers = self._texts.answer(self._requests)
        self._texts.close()
        assert self._tokenizer is not None
        with self._path.open("a", encoding="utf-8") as file:
            for request, prompt in zip(self._requests, config.evaluation.prompts, strict=True):
                assert request.sampling is not None
                tokens = [one for one in answers[request.number].tokens if one not in request.sampling.stop_tokens]
                line = {"iteration": record.iteration, "prompt": prompt, "text": self._tokenizer.decode(tokens)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _requests(config: RunConfig, directory: Path, tokenizer: Tokenizer, ends: tuple[int, ...]) -> list[Request]:
    texts: Sequence[str] = config.evaluation.prompts
    if config.objective.kind != "pretrain":
        template = chat_template_of(directory)
        try:
            texts = [template.render([{"role": "user", "content": text}], begin_answer=True) for text in texts]
        except TemplateRefuses as error:
            raise ConfigError(Problem(_WHERE, None, f"the chat template cannot render them: {error}.")) from None
    room = config.data.seq_length
    found, wrong = [], []
    for number, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(list(texts)), strict=True)):
        if not 0 < len(ids) < room:
            fix = f"has {len(ids)} tokens; it must have some, and fewer than data.seq_length = {room}."
            wrong.append(Problem(_WHERE, text, fix))
            continue
        sampling = Sampling(max_new_tokens=min(_NEW_TOKENS, room - len(ids)), stop_tokens=ends)
        found.append(Request(tuple(ids), sampling, number))
    if wrong:
        raise ConfigError(wrong)
    return found


def _iteration(line: str) -> int:
    value = next(objects([line.encode()]), {}).get("iteration")
    return value if isinstance(value, int) else 1 << 62  # half a line of a killed run
