"""What fits and reports read."""

import pytest

from launch.sweeps import results
from megatron_qwen.errors import ConfigError


def test_columns_are_for_a_csv_and_not_for_a_study(study):
    with pytest.raises(ConfigError, match=r"--columns = loss=val_loss: names columns of a CSV, and .* is a study"):
        results.read(study.path, {"loss": "val_loss"})
    assert [one.status for one in results.read(study.path, {}).observations] == ["unfinished"] * 3
