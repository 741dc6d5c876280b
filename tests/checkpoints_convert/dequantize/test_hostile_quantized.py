"""Broken or hostile quantized directories are refused: exit code 3, everything in one message, no traceback."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoints_convert.compare.directory_inspection import inspect_directory
from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.compare.verify import verify
from checkpoints_convert.convert import main
from megatron_qwen.errors import ConversionError
from tests.checkpoints_convert.dequantize.written import Written, source_model, write
from tests.checkpoints_convert.refusal import refused
from tests.tiers import count

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WAYS = {
    "gptq": Written("gptq"),
    "awq": Written("awq", symmetric=False),
    "pack": Written("pack"),
    "act-order": Written("pack", act_order=True),
    "int8": Written("int8", bits=8, strategy="channel"),
    "fp8": Written("fp8", strategy="tensor"),
    "fp8-block": Written("fp8-block"),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each format, and the original."""
    folder = tmp_path_factory.mktemp("made")
    source_model(folder / "source")
    for name, how in WAYS.items():
        write(folder / "source", folder / name, how)
    return folder


def edit_tensors(directory: Path, change: Callable[[Tensors], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((directory / "config.json").read_text())
    change(content["quantization_config"])
    (directory / "config.json").write_text(json.dumps(content))


def put(name: str, place: Any, value: Any) -> Callable[[Tensors], None]:
    return lambda found: found[name].__setitem__(place, value)


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    return found


IN_TENSORS: list[tuple[str, Callable[[Tensors], Any], list[str]]] = [
    ("gptq", lambda found: found.pop(f"{Q}.qweight"), [f"{Q}.qweight", "are missing"]),
    ("gptq", lambda found: found.pop(f"{Q}.g_idx"), [f"{Q}.g_idx", "are missing"]),
    ("gptq", lambda found: [found.pop(f"{one}.scales") for one in (Q, DOWN)], [f"{Q}.scales, ", f"{DOWN}.scales"[:30]]),
    (
        "gptq",
        lambda found: found.update({f"{Q}.scales": found[f"{Q}.scales"][:1]}),
        ["has the shape [1, 64]", "[2, 64]"],
    ),
    ("gptq", lambda found: found.update({f"{Q}.qweight": found[f"{Q}.qweight"].long()}), ["has the dtype int64"]),
    ("gptq", put(f"{Q}.scales", (0, 3), float("nan")), ["holds the scale nan in row 0"]),
    ("gptq", put(f"{Q}.scales", (1, 3), 0.0), ["holds the scale 0 in row 1"]),
    ("gptq", put(f"{Q}.scales", (1, 3), -0.5), ["holds the scale -0.5"]),
    ("gptq", put(f"{Q}.scales", (1, 3), float("inf")), ["holds the scale inf"]),
    ("gptq", put(f"{Q}.g_idx", 5, 2), ["names groups from 0 to 2", "0 to 1"]),
    ("gptq", put(f"{Q}.g_idx", 5, -1), ["names groups from -1"]),
    ("gptq", put(f"{Q}.g_idx", 5, 1), ["not consecutive", "desc_act"]),
    ("gptq", put(f"{Q}.qzeros", (0, 0), 0x77777776), ["holds the zero 7; sym is true"]),
    ("gptq", lambda found: found.update({f"{Q}.weight": torch.zeros(64, 64).half()}), ["quantized and not quantized"]),
    ("awq", lambda found: found.pop(f"{Q}.qzeros"), [f"{Q}.qzeros", "are missing"]),
    ("awq", put(f"{Q}.scales", (0, 0), float("nan")), ["holds the scale nan"]),
    ("pack", lambda found: found.pop(f"{Q}.weight_shape"), [f"{Q}.weight_shape", "are missing"]),
    ("pack", put(f"{Q}.weight_shape", 0, 1 << 60), ["says [1152921504606846976, 64]", "[64, 64]"]),
    ("pack", put(f"{Q}.weight_shape", 1, -64), ["says [64, -64]"]),
    ("act-order", put(f"{Q}.weight_g_idx", 5, 9), ["names groups from 0 to 9"]),
    (
        "int8",
        lambda found: found.update({f"{Q}.weight": found[f"{Q}.weight"].float()}),
        ["has the dtype float32; int8"],
    ),
    ("int8", put(f"{Q}.weight_scale", 2, -1.0), ["holds the scale -1 in row 2"]),
    ("fp8", put(f"{Q}.weight_scale", 0, 0.0), ["holds the scale 0"]),
    ("fp8", lambda found: found.pop(f"{Q}.weight_scale"), [f"{Q}.weight_scale", "are missing"]),
    ("fp8-block", lambda found: found.pop(f"{Q}.weight_scale_inv"), [f"{Q}.weight_scale_inv", "are missing"]),
    ("fp8-block", put(f"{Q}.weight_scale_inv", (1, 1), float("nan")), ["holds the scale nan"]),
    ("fp8-block", lambda found: found.update({"lm_head.weight_scale_inv": torch.ones(4, 2)}), ["lm_head"]),
]
IN_CONFIG: list[tuple[str, Callable[[dict[str, Any]], Any], list[str]]] = [
    ("gptq", lambda told: told.update(quant_method="bitsandbytes"), ["bitsandbytes", "supported: gptq, awq"]),
    ("gptq", lambda told: told.update(quant_method=["gptq"]), ["is not supported"]),
    ("gptq", lambda told: told.update(bits=8), ["has the shape", "int8"]),
    ("gptq", lambda told: told.update(bits="4", sym=1), ["bits = 4", "sym = 1"]),
    ("gptq", lambda told: told.update(bits=True), ["bits = True"]),
    ("gptq", lambda told: told.update(group_size=64), ["has the shape [2, 64]", "[1, 64]"]),
    ("gptq", lambda told: told.update(group_size=1 << 70), ["group_size"]),
    ("gptq", lambda told: told.update(group_size=0), ["group_size", "or -1"]),
    ("gptq", lambda told: told.update(checkpoint_format="gptq_v2"), ["holds 7", "off by one", "Set it to gptq"]),
    ("gptq", lambda told: told.update(checkpoint_format="marlin"), ["marlin"]),
    ("gptq", lambda told: told.update(dynamic={"+:.*q_proj": {"bits": 8}}), ["parameters of their own"]),
    ("gptq", lambda told: told.update(dynamic={r"-:.*q_proj": {}}), ["quantization_config leaves them out"]),
    ("awq", lambda told: told.update(version="gemv"), ["gemv"]),
    ("awq", lambda told: told.update(zero_point=False), ["zero_point"]),
    ("awq", lambda told: told.update(modules_to_not_convert=[Q]), ["leaves them out", Q]),
    ("awq", lambda told: told.update(modules_to_not_convert={"a": 1}), ["list of names"]),
    ("pack", lambda told: told.update(format="marlin-24"), ["marlin-24"]),
    ("pack", lambda told: told.update(config_groups=[]), ["config_groups"]),
    ("pack", lambda told: told["config_groups"].update(more={}), ["2 groups"]),
    ("pack", lambda told: weights_of(told).update(num_bits=8), ["has the shape"]),
    ("pack", lambda told: weights_of(told).update(group_size=64), ["has the shape [64, 2]", "[64, 1]"]),
    ("pack", lambda told: weights_of(told).update(group_size=1 << 20), ["has the shape"]),
    ("pack", lambda told: weights_of(told).update(strategy="channel"), ["has the shape"]),
    ("pack", lambda told: weights_of(told).update(symmetric=False), ["weight_zero_point", "are missing"]),
    ("pack", lambda told: weights_of(told).update(actorder=[1]), ["actorder"]),
    ("pack", lambda told: told.update(kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
    ("int8", lambda told: told.update(format="float-quantized"), ["type", "float"]),
    ("fp8-block", lambda told: told.update(weight_block_size=[128]), ["weight_block_size"]),
    ("fp8-block", lambda told: told.update(weight_block_size=[1 << 19, 1 << 19]), ["has the shape"]),
]


@pytest.mark.parametrize(("name", "change", "expected"), IN_TENSORS)
def test_tensors(name: str, change: Callable[[Tensors], Any], expected: list[str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / name, tmp_path / "q")
    edit_tensors(tmp_path / "q", change)
    message = refused("verify", made / "source", tmp_path / "q", exit_codes=(3,))
    assert all(word in message for word in expected), message
    assert refused("inspect", tmp_path / "q", exit_codes=(3,)) == message


@pytest.mark.parametrize(("name", "change", "expected"), IN_CONFIG)
def test_config(
    name: str, change: Callable[[dict[str, Any]], Any], expected: list[str], made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / name, tmp_path / "q")
    edit_config(tmp_path / "q", change)
    message = refused("inspect", tmp_path / "q", exit_codes=(3,))
    assert all(word in message for word in expected), message


def test_two_configurations_that_differ(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gptq", tmp_path / "q")
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    beside = tmp_path / "q" / "quantize_config.json"
    beside.write_text(json.dumps(told))
    assert main(["inspect", str(tmp_path / "q"), "--json"]) == 0
    beside.write_text(json.dumps(told | {"desc_act": True}))
    assert "Programs differ in which they read" in refused("inspect", tmp_path / "q", exit_codes=(3,))


def test_all_that_is_wrong_is_said_at_once(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gptq", tmp_path / "q")

    def change(found: Tensors) -> None:
        found[f"{Q}.scales"][0, 0] = float("nan")
        found[f"{DOWN}.g_idx"][0] = 77
        del found["model.layers.0.mlp.up_proj.qzeros"], found["model.norm.weight"]

    edit_tensors(tmp_path / "q", change)
    message = refused("verify", made / "source", tmp_path / "q", exit_codes=(3,))
    for word in (f"{Q}.scales", f"{DOWN}.g_idx", "up_proj.qzeros", "model.norm.weight"):
        assert word in message, message


@pytest.mark.parametrize("action", ["from-hf", "upcycle"])
def test_other_conversions_refuse_quantized_sources(action: str, made: Path, tmp_path: Path) -> None:
    words = ["--recipe", "qwen3_30b_a3b"] if action == "upcycle" else []
    for name in WAYS:
        message = refused(action, made / name, tmp_path / "out", *words, exit_codes=(3,))
        assert message.startswith("conversion error: ")
        assert "the weights are quantized" in message, message


# Values that a JSON reader may meet anywhere.
_JSON: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**70,
    1e308,
    "",
    "x" * 300,
    "re:(a+)+$",
    [],
    [[]],
    {},
    {"a": {}},
    [1, 2],
]
_JSON += ["int", "group", 4, 8, 128, "gptq", "re:.*", [128, 128], [0, 0], [2**40, 1], ["Linear"], {"-:(.*)*": {}}]


def mutate_json(content: Any, draw: random.Random) -> Any:
    """Replaces, removes or repeats a value somewhere in a JSON object."""
    if isinstance(content, dict) and content and draw.random() < 0.8:
        key = draw.choice(sorted(content))
        if draw.random() < 0.1:
            return {name: value for name, value in content.items() if name != key}
        return content | {key: mutate_json(content[key], draw)}
    if isinstance(content, list) and content and draw.random() < 0.5:
        place = draw.randrange(len(content))
        return [*content[:place], mutate_json(content[place], draw), *content[place + 1 :]]
    return draw.choice(_JSON)


def mutate(directory: Path, draw: random.Random) -> None:
    """Changes config.json, the header of the weights, or bytes of either."""
    kind = draw.choice(["config", "header", "bytes", "config bytes", "tensor"])
    config, weights = directory / "config.json", directory / "model.safetensors"
    if kind == "config":
        content = json.loads(config.read_text())
        told = content["quantization_config"]
        content["quantization_config"] = mutate_json(told, draw) if draw.random() < 0.95 else draw.choice(_JSON)
        config.write_text(json.dumps(content))
        return
    path = config if kind == "config bytes" else weights
    data = bytearray(path.read_bytes())
    if kind == "header":
        length = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), draw)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        return
    if kind == "tensor":
        tensors = load_file(weights)
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        change = draw.choice(["drop", "cut", "cast", "special"])
        if change == "drop":
            del tensors[name]
        elif change == "cut":
            tensors[name] = tensor.reshape(-1)[: draw.randrange(tensor.numel() + 1)].clone()
        elif change == "cast":
            tensors[name] = tensor.to(draw.choice([torch.float32, torch.int8, torch.int32, torch.bool, torch.float64]))
        else:
            bits = tensor.reshape(-1).view(torch.uint8)
            bits[draw.randrange(len(bits)) :] = draw.choice([0, 0x7F, 0x80, 0xFF])
        save_file(tensors, weights, metadata={"format": "pt"})
        return
    for _ in range(draw.randrange(1, 20)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)


@pytest.mark.parametrize("name", WAYS)
def test_random_changes_never_end_in_a_traceback(name: str, made: Path, tmp_path: Path) -> None:
    """Whatever is changed, the directory is read, or refused with a message."""
    original = open_side(made / "source")
    refusals: list[ConversionError] = []
    repeats = count(quick=20, thorough=2000)
    for seed in range(repeats):
        draw = random.Random(f"{name} {seed}")
        directory = tmp_path / str(seed)
        shutil.copytree(made / name, directory)
        for _ in range(draw.randrange(1, 3)):
            try:
                mutate(directory, draw)
            except (ValueError, KeyError, SafetensorError):  # what was changed before cannot be changed again
                break
        try:
            inspect_directory(directory)
            verdict = verify(original, open_side(directory, quantized=True), workers=1, quiet=True)
            json.dumps(verdict.as_json(), allow_nan=False)
            str(verdict)
        except ConversionError as error:
            refusals.append(error)
        shutil.rmtree(directory)
    assert len(refusals) > repeats // 4
    assert all(error.exit_code == 3 and error.problems and len(error.render()) < 50_000 for error in refusals)
