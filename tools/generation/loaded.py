"""A model on this rank, ready to answer: from a run, a checkpoint of any layout, or a Hugging Face directory."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_convert.memory import available_bytes
from checkpoints_convert.model_source import ModelSource, open_model_source
from checkpoints_convert.progress import gb
from megatron_qwen import device
from megatron_qwen.config.checks import problems as config_problems
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ParallelConfig, PrecisionConfig
from megatron_qwen.config.source import with_words
from megatron_qwen.config.world import smallest_world
from megatron_qwen.data.chat.answers import answer_form
from megatron_qwen.data.chat.template import chat_template_of
from megatron_qwen.data.tokenizers.named_ids import beginning_of_text, special_ids
from megatron_qwen.data.tokenizers.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_qwen.distributed import groups as process_groups
from megatron_qwen.distributed.rank import RankInfo, join
from megatron_qwen.errors import ConfigError, ConversionError, DataError, Problem
from megatron_qwen.inference.announcements import Announcements
from megatron_qwen.inference.blocks import BLOCK, blocks_of
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.exactness import largest_difference
from megatron_qwen.inference.loading import inference_config, load_stage
from megatron_qwen.inference.scheduler import Limits
from megatron_qwen.resilience.parent import die_with_launcher

log = logging.getLogger(__name__)
_LAYOUT = "parallel."
_OF_FREE = 4  # of the memory that is free, a part for the cache where nobody says how much, and one for copies


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers.

    Args:
        engine: on this rank.
        tokenizer: of the model.
        ends: ids that end a text.
        source: where it comes from.
        dtype: that it computes in.
    """

    engine: Engine
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    source: ModelSource
    dtype: str

    @property
    def end(self) -> int:
        """Id that stands in front of a text without a beginning: the tokenizer's bos_token, or its eos_token."""
        assert self.source.tokenizer is not None
        return beginning_of_text(self.source.tokenizer, self.tokenizer)

    @cached_property
    def chat_ends(self) -> tuple[int, ...]:
        """Ids that end an answer of a conversation: those that end a text, and that of the chat template.

        A base model's files name no token that ends a turn, and after fine-tuning it writes one all the same.
        """
        assert self.source.tokenizer is not None
        control = self.tokenizer.spellable
        try:
            form = answer_form(chat_template_of(self.source.tokenizer), tuple(control))
        except DataError:  # without a chat template, or with one that ends answers by no token
            return self.ends
        return self.ends if form is None else tuple(dict.fromkeys((*self.ends, control[form.ends])))

    def identity(self) -> dict[str, Any]:
        """What decides its answers: weights, precision, tokenizer, and how many positions it is given."""
        assert self.source.tokenizer is not None
        return {
            "model": self.source.origin()["source"],
            "dtype": self.dtype,
            "tokenizer": fingerprint(self.source.tokenizer),
            "positions": self.engine.stage.longest,
        }


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Args:
        iteration: which checkpoint of a run; None is the newest.
        words: ``parallel.field=value`` for the layout; others go with a checkpoint that another program wrote.
        config: recipe or run.yaml of such a checkpoint.
        tokenizer: directory, instead of the source's.
        dtype: fp32 or bf16; None is that of the weights.
        longest: positions of prompt and answer together; None is what the model has.
        sequences: answered at a time.
        cache_bytes: of keys and values, over all ranks of this machine; None is a quarter of what is free.
        replicas: data-parallel ones of the model, which divide the requests.
        prompts_first: see ``Limits``: faster for many texts, but answers that someone reads as they come stand still.
    """

    iteration: int | None = None
    words: Sequence[str] = ()
    config: str | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    longest: int | None = None
    sequences: int = 64
    cache_bytes: int | None = None
    replicas: int = 1
    prompts_first: bool = True


def open_for_inference(path: Path, options: LoadOptions) -> tuple[ModelSource, RunConfig, Tokenizer]:
    """Opens a model, with the configuration and the tokenizer that inference takes.

    Raises:
        ConfigError: the layout is not legal.
        ConversionError: a directory that cannot be read, or there is no tokenizer.
        CheckpointError: a checkpoint that cannot be trusted.
    """
    source = open_model_source(
        path,
        iteration=options.iteration,
        config=options.config,
        overrides=[word for word in options.words if not word.startswith(_LAYOUT)],
        tokenizer=options.tokenizer,
    )
    if source.tokenizer is None:
        fix = "has no tokenizer; name one (--tokenizer DIR)."
        raise ConversionError(Problem(str(path), None, fix))
    held = source.checkpoint.config if source.checkpoint is not None else _config_of(source)
    layout = [word for word in options.words if word.startswith(_LAYOUT)]
    config = with_words(replace(held, parallel=ParallelConfig()), layout)
    dtype = options.dtype or ("fp32" if source.dtype == torch.float32 else "bf16")
    config = inference_config(config, dtype="fp32" if dtype == "fp32" else "bf16")
    wrong = [problem for problem in config_problems(config) if problem.where.startswith(_LAYOUT)]
    if options.longest is not None and options.longest > (most := config.model.max_position_embeddings):
        wrong.append(Problem("--context", options.longest, f"the model has {most:,} positions; give at most that."))
    if wrong:
        raise ConfigError(wrong)
    return source, config, load_tokenizer(source.tokenizer)


def load(
    path: Path, options: LoadOptions, info: RankInfo, *, first: Callable[[], object] = lambda: None
) -> LoadedModel:
    """This rank's part of a model; says what its cache holds.

    Args:
        path: the source.
        options: how it is loaded.
        info: of this rank.
        first: called on rank 0 before; the others wait for it, which may take longer than a collective.

    Raises:
        UserError: as ``open_for_inference``.
    """
    die_with_launcher()
    source, config, tokenizer = open_for_inference(path, options)
    join(info, timeout_minutes=config.parallel.distributed_timeout_minutes)
    if info.rank == 0:
        first()
    Announcements("ready", device.current()).meet()
    device.set_threads(device.fair_threads(info.local_world_size))
    if info.world_size != (needed := smallest_world(config) * options.replicas):
        fix = f"the layout has {needed}: start as many, or change the layout (parallel.*)."
        raise ConfigError(Problem("ranks", info.world_size, fix))
    groups = process_groups.create(config.parallel, seed=config.training.seed)
    longest = options.longest or config.model.max_position_embeddings
    copies = available_bytes() // _OF_FREE // info.local_world_size
    stage = load_stage(config, groups, source.core_weights, longest=longest, copy_bytes=copies)
    stages = config.parallel.pipeline_model_parallel_size
    wanted = stages * options.sequences * blocks_of(longest)
    room = options.cache_bytes or available_bytes() // _OF_FREE
    each = stage.shape.block_bytes + stage.shape.gathered_bytes
    fitting = room // info.local_world_size // each
    blocks = _of_all_ranks(max(stages * (blocks_of(longest) + 1), min(wanted, fitting)), stage.device)
    if info.rank == 0:
        log.info(
            "%s: the cache takes %s a token on a rank, at most %s for %s tokens; copies of weights take %s",
            source.name,
            gb(each // BLOCK),
            gb(blocks * each),
            f"{blocks * BLOCK:,}",
            gb(stage.products.copied_bytes),
        )
    limits = Limits(sequences=options.sequences, prompts_first=options.prompts_first)
    engine = Engine(stage, blocks=blocks, limits=limits, decode=tokenizer.decode)
    _say_whether_exact(largest_difference(engine), rank=info.rank)
    return LoadedModel(engine, tokenizer, ends_of(source, tokenizer), source, config.precision.dtype)


def _say_whether_exact(difference: float, *, rank: int) -> None:
    if rank:
        return
    if difference:
        log.warning(
            "log-probabilities of new tokens differ from those of a forward pass of the whole text by up to %.1e here, "
            "as a probe has found",
            difference,
        )
    else:
        log.info("log-probabilities of new tokens have the bits of a forward pass of the whole text (probed)")


def _of_all_ranks(blocks: int, place: torch.device) -> int:
    """The fewest of any rank: memory differs, and stages hold other layers, but all must plan with the same number."""
    least = torch.tensor([blocks], device=place)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def ends_of(source: ModelSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a text: those of generation_config.json, of config.json, or of the tokenizer."""
    assert source.tokenizer is not None
    found, _ = special_ids(source.tokenizer, below=source.model.vocab_size)
    stated = None if source.directory is None else (source.directory.generation or {}).get("eos_token_id")
    if stated is None and source.directory is not None:
        stated = (source.directory.config or {}).get("eos_token_id")
    ids = [one for value in (stated, found) for one in (value if isinstance(value, list) else [value])]
    return tuple(sorted({one for one in ids if isinstance(one, int)}))


def _config_of(source: ModelSource) -> RunConfig:
    """The configuration of a directory's model."""
    precision = PrecisionConfig(dtype="fp32" if source.dtype == torch.float32 else "bf16")
    return RunConfig(
        recipe="custom",
        model=source.architecture.model,
        rope=source.architecture.rope,
        precision=precision,
        data=DataConfig(seq_length=source.model.max_position_embeddings),
    )
