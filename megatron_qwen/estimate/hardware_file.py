"""A device's peak rates as a file: ``mq bench peaks --hardware FILE`` writes it, ``mq plan --gpu FILE`` reads it."""

import dataclasses
from pathlib import Path

from megatron_qwen.config.render import dump
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.estimate.hardware import Hardware, hardware
from megatron_qwen.files import atomic_write


def write_hardware(path: Path, device: Hardware) -> None:
    """Writes the file, replacing an existing one."""
    content = dataclasses.asdict(device)
    content["attention_tflops"] = list(device.attention_tflops)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, dump(content))


def find_hardware(name: str) -> Hardware:
    """A kind of device by its name, or what a hardware file says.

    Raises:
        ConfigError: neither a known kind nor a readable file.
    """
    is_file = name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_file()
    return read_hardware(Path(name)) if is_file else hardware(name)


def read_hardware(path: Path) -> Hardware:
    """Reads the file.

    Raises:
        ConfigError: with every field that is missing, unknown, or no number above zero.
    """
    reader = YamlReader(str(path))
    # A device without FP8 may leave its rate out.
    device = reader.read(Hardware, {"fp8": None, **read_mapping(path)})
    reader.raise_problems()
    assert device is not None
    return device
