"""How far the logits of an exported model are from those of the checkpoint it came from.

python -m checkpoints_convert.agreement RUN HF_DIR     prints JSON
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_qwen import device

device.prepare()

import torch  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from megatron_qwen.checkpoint import find, state  # noqa: E402
from megatron_qwen.checkpoint.paths import RUN_YAML  # noqa: E402
from megatron_qwen.cli import run_program  # noqa: E402
from megatron_qwen.config.run import RunConfig  # noqa: E402
from megatron_qwen.config.sections import ParallelConfig  # noqa: E402
from megatron_qwen.config.source import resolve  # noqa: E402
from megatron_qwen.data.reading.samples import SampleSource  # noqa: E402
from megatron_qwen.data.reading.training_data import TrainingData  # noqa: E402
from megatron_qwen.data.token_files.statistics import unigram_entropy  # noqa: E402
from megatron_qwen.distributed import groups as process_groups  # noqa: E402
from megatron_qwen.distributed.rank import RankInfo, join  # noqa: E402
from megatron_qwen.models.backend import choose  # noqa: E402
from megatron_qwen.models.build import Model, build_model, for_one_rank  # noqa: E402
from megatron_qwen.recipes.registry import RECIPES  # noqa: E402


@dataclass(frozen=True)
class Agreement:
    """Two models on the same samples.

    Args:
        max_abs_logit_difference: over all logits.
        top1_agreement: share of positions whose likeliest token is the same.
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
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = device.current()
    hf = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).to(place)
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


def main(arguments: Sequence[str]) -> int:
    """Prints the agreement of a run's checkpoint and its export on validation samples."""
    run_dir, hf_dir = map(Path, arguments)
    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    config, model, _ = load_checkpoint(run_dir)
    data = TrainingData(config)
    source: SampleSource = data.at(0)
    samples = max(config.training.eval_iters, 1) * config.training.global_batch_size
    if config.data.validation_fraction:
        held_out = data.validation(data.at(0))
        source, samples = held_out, min(samples, held_out.windows)
    print(json.dumps(asdict(compare(config, model, hf_dir, source, samples=samples))))
    return 0


if __name__ == "__main__":
    run_program(main)
