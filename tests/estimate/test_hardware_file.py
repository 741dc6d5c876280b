"""A hardware file comes back as it was written; what is wrong with one is said at once."""

import dataclasses

import pytest
import yaml

from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.hardware_file import read_hardware, write_hardware
from tests.conftest import run


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "a100"])
def test_round_trip(name, tmp_path):
    write_hardware(tmp_path / "device.yaml", hardware(name))
    assert read_hardware(tmp_path / "device.yaml") == hardware(name)


def test_everything_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "device.yaml"
    write_hardware(path, hardware("h200"))
    content = yaml.safe_load(path.read_text())
    del content["memory_gib"]
    content |= {"attention_tflops": [1.0], "memory_gb_s": -3, "colour": "green", "devices_per_node": "many"}
    content["bf16"]["tflops"] = 0
    content["fp8"]["clock"] = 1
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        read_hardware(path)
    text = str(caught.value)
    for part in ("memory_gib", "attention_tflops", "memory_gb_s", "colour", "devices_per_node", "bf16.tflops", "clock"):
        assert part in text
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="mapping"):
        read_hardware(path)


def test_a_plan_on_a_measured_machine(tmp_path):
    """Half the GEMM rate and half the memory: fewer layouts fit, and the fastest is slower."""
    fast = hardware("h200")
    slow = dataclasses.replace(
        fast, name="slow", memory_gib=fast.memory_gib / 2, bf16=dataclasses.replace(fast.bf16, tflops=350.0)
    )
    write_hardware(tmp_path / "slow.yaml", slow)
    words = ["qwen2_5_7b", "--gpus", 8, "--json", "--gpu"]
    known = yaml.safe_load(run("tools.plan", *words, "h200", check=True).stdout)
    measured = yaml.safe_load(run("tools.plan", *words, tmp_path / "slow.yaml", check=True).stdout)
    best = [plan["layouts"][0]["tokens_per_second_per_device"] for plan in (known, measured)]
    assert best[1] < 0.7 * best[0]
    missing = run("tools.plan", *words, tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr
    assert "Traceback" not in missing.stderr
