"""A checkpoint's model and an exported one, both whole in memory, on the same samples."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.checkpoint import find, state
from megatron_qwen.checkpoint.lora_base import noted
from megatron_qwen.checkpoint.paths import RUN_YAML
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import ParallelConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.samples import SampleSource
from megatron_qwen.data.token_files.statistics import unigram_entropy
from megatron_qwen.distributed import groups as process_groups
from megatron_qwen.errors import CheckpointError, Problem
from megatron_qwen.hf import library
from megatron_qwen.models.backend import choose
from megatron_qwen.models.build import Model, build_model, for_one_rank
from megatron_qwen.recipes.registry import RECIPES


@dataclass(frozen=True)
class Agreement:
    """Two models on the same samples.

    Args:
        max_abs_logit_difference: over all logits.
        top1_agreement: share of positions whose argmax token is the same.
        checkpoint_loss: mean cross-entropy of the checkpoint's model, nats per token.
        hf_loss: of the exported one.
        unigram_entropy: of the same labels.
        samples: how many.
    """

    max_abs_logit_difference: float
    top1_agreement: float
    checkpoint_loss: float
    hf_loss: float
    unigram_entropy: float
    samples: int


def load_checkpoint(path: Path) -> tuple[RunConfig, Model, ProcessGroupCollection]:
    """Builds the model of a checkpoint on the one rank that has joined, in fp32, with its weights."""
    chosen = find.newest_good(find.resolve(path), strict=False)
    if noted(state.read_state(chosen.path)) is not None:
        fix = "holds adapters alone; compare what mq convert merge makes of it."
        raise CheckpointError(Problem(str(chosen.path), None, fix))
    config = resolve(str(chosen.path / RUN_YAML), ["precision.dtype=fp32", "precision.fp8=null"], RECIPES)
    config = RunConfig(**{**vars(config), "parallel": ParallelConfig()})
    groups = process_groups.create(config.parallel, seed=config.training.seed)
    backend = choose(config.precision)
    model = build_model(for_one_rank(config, backend), groups, backend, device=device.current())
    state.load_sharded(chosen.path, model.modules, None, groups, optimizer_step=0)
    model.train(False)
    return config, model, groups


@torch.no_grad()
def checkpoint_logits(model: Model, tokens: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """[b, s] -> [b, s, vocabulary] from megatron-core's model, padding cut."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits: torch.Tensor = model.modules[0](tokens, positions, None)
    return logits[..., :vocab_size].float()


@torch.no_grad()
def compare(config: RunConfig, model: Model, hf_dir: Path, source: SampleSource, *, samples: int) -> Agreement:
    """Runs both models on the first samples of a source."""
    transformers = library.transformers()
    transformers.utils.logging.disable_progress_bar()
    place = device.current()
    hf = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).to(place)
    worst, same, ours, theirs = 0.0, 0.0, 0.0, 0.0
    for index in range(samples):
        sample = source[index]
        tokens, labels = (torch.from_numpy(array).to(place) for array in (sample.tokens, sample.labels))
        a = checkpoint_logits(model, tokens[None], vocab_size=config.model.vocab_size)[0]
        b = hf(input_ids=tokens[None]).logits[0].float()
        worst = max(worst, float((a - b).abs().max()))
        same += float((a.argmax(-1) == b.argmax(-1)).float().mean())
        ours += float(torch.nn.functional.cross_entropy(a, labels))
        theirs += float(torch.nn.functional.cross_entropy(b, labels))
    return Agreement(worst, same / samples, ours / samples, theirs / samples, unigram_entropy(source, samples), samples)
