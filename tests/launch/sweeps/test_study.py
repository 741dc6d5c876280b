"""Study files that cannot be: everything that is wrong is said at once."""

import yaml

from tests.conftest import run
from tests.launch.sweeps.study_files import STUDY


def test_all_wrong_fields_at_once(tmp_path):
    wrong = {
        "recipe": "demo",
        "overrides": ["optim.lerning_rate=1"],
        "shapes": {"low": 5, "high": 1, "count": 0},
        "horizons": {"tokens_per_param": [10], "tokens": [1e6]},
        "learning_rate": {"values": [0.1, -1, "x"]},
        "batch": {"values": [4096]},
        "schedule": "linear",
        "seeds": [1, 1],
        "device": {"gpu": "h100", "tflops": 1},
        "budget_hours": 0,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(wrong))
    done = run("launch.sweep", "plan", str(path))
    assert done.returncode == 2
    for word in (
        "optim.lerning_rate", "shapes.count", "horizons", "learning_rate.values", "batch: no such field",
        "batch_tokens", "schedule = 'linear'", "seeds", "requires either gpu, or tflops", "budget_hours",
    ):  # fmt: skip
        assert word in done.stderr, word
    assert "Traceback" not in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["study.yaml"]


def test_a_device_whose_speed_is_not_known(tmp_path):
    """fp32 on an H100 has no rate: the study is told to give one."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"device": {"gpu": "h100"}}))
    done = run("launch.sweep", "plan", str(path))
    assert done.returncode == 2
    assert "device.tflops" in done.stderr
