"""How far the logits of an exported model are from those of the checkpoint it came from.

python -m checkpoints_convert.agreement RUN HF_DIR     prints JSON
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_qwen.cli import run_program
from megatron_qwen.core_patches.install import prepare_process


def main(arguments: Sequence[str]) -> int:
    """Prints the agreement of a run's checkpoint and its export on validation samples."""
    prepare_process()
    from checkpoints_convert.compare.whole_models import compare, load_checkpoint
    from megatron_qwen.data.reading.samples import SampleSource
    from megatron_qwen.data.reading.training_data import TrainingData
    from megatron_qwen.distributed.rank import RankInfo, join

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
