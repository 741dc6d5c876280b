"""Study files of tests: on measured devices, on a cluster, and a small one."""

import yaml

from launch.sweeps.study import read_study

STUDY = {
    "recipe": "demo",
    "shapes": {"low": 1e5, "high": 2e6, "count": 4},
    "horizons": {"tokens_per_param": [10, 20, 40]},
    "learning_rate": {"low": 1e-3, "high": 1.6e-2, "count": 5},
    "batch_tokens": {"values": [4096, 16384]},
    "seeds": [1, 2],
    "device": {"tflops": 0.1},
}
CLUSTER = STUDY | {
    "recipe": "qwen2_5_0_5b",
    "shapes": {"params": [44e6, 358e6, 3e9]},
    "batch_tokens": {"values": [524288]},
    "device": {"gpu": "h100", "count": 8},
}
SMALL = {
    "recipe": "tiny_dense",
    "shapes": {"models": [{"num_layers": 2}]},
    "horizons": {"tokens": [5120]},
    "learning_rate": {"values": [0.001, 0.002, 0.004]},
    "batch_tokens": {"values": [256]},
    "schedule": "cosine",
    "device": {"tflops": 0.01},
}


def study(tmp_path, **changes):
    """The study with some fields otherwise; None leaves one out."""
    content = {name: value for name, value in (STUDY | changes).items() if value is not None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_study(path)
