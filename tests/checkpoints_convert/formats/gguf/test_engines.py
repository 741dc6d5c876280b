"""Whoever reads GGUF files reads ours as meant: llama.cpp's logits, and the weights that transformers finds."""

import statistics
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.formats.gguf.types import KINDS
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from tests.checkpoints_convert.formats.gguf.llama_cpp import LlamaModel, generated
from tests.checkpoints_convert.formats.gguf.models import MODELS, OF_TRANSFORMERS_WIDTHS
from tests.tiers import cases

PROMPT = [5, 9, 200, 33, 80, 411]
# In a mixture of experts a rounding may choose another expert: the middle one of several prompts counts.
PROMPTS = [PROMPT, [17, 301, 44], [590, 2, 2, 71], [100, 101, 102, 103], [333, 12, 512, 8, 90]]
# Largest difference of logits over their root mean square. llama.cpp rounds the inputs of a
# quantized weight to 8 bits, and of a BF16 one to BF16. Measured: F32 4e-3; the others up to 0.21.
TOLERANCE = {"F32": 0.01, "F16": 0.05, "BF16": 0.1}
QUANTIZED_TOLERANCE = 0.4


def reference(path: Path, model_type: str) -> transformers.PreTrainedModel:
    """transformers' model with the dequantised weights that our reader gives."""
    source = GgufFile(path)
    config = transformers.AutoConfig.for_model(
        model_type, **{key: value for key, value in source.config.items() if key != "model_type"}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: source.rows(name, 0, info.shape[0]) for name, info in source.tensors.items()}
    expected = model.state_dict()
    for name in [name for name in expected if name not in state and name != "lm_head.weight"]:
        state[name] = _stacked(name, state)
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in state.items() if name in expected}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def _stacked(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The experts of a layer as transformers 5 holds them: gate above up, [experts, rows, columns]."""
    module, _, part = name.rpartition(".")
    count = sum(other.startswith(f"{module}.") and other.endswith(".down_proj.weight") for other in state)
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    experts = [torch.cat([state[f"{module}.{at}.{one}.weight"] for one in parts]) for at in range(count)]
    return torch.stack(experts)


def apart(model: transformers.PreTrainedModel, theirs: LlamaModel, prompt: list[int]) -> float:
    """The largest difference of logits, over their root mean square."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    found = theirs.logits(prompt, vocab_size=len(logits))
    return float((found - logits).abs().max() / logits.square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "kinds"),
    cases(
        [("qwen2 narrow", ["F32", "BF16", "Q8_0", "Q4_0"]), ("qwen2_moe", ["F32", "Q4_K_M"]), ("qwen3_moe", ["Q6_K"])],
        [(name, [*KINDS]) for name in MODELS if name != "qwen2 of 80 layers"],
    ),
)
def test_llama_cpp_computes_the_dequantised_model(side, name, kinds, tmp_path):
    source = side(name)
    write_gguf(source, tmp_path / "out", kinds, GgufOptions(name="m", quiet=True))
    for kind in kinds:
        path = tmp_path / "out" / f"m-{kind}.gguf"
        with LlamaModel(path) as theirs:
            model = reference(path, MODELS[name]["model_type"])
            difference = statistics.median(apart(model, theirs, prompt) for prompt in PROMPTS)
        print(f"{name} {kind}: {difference:.4f}")
        assert difference < TOLERANCE.get(kind, QUANTIZED_TOLERANCE), kind
        assert generated(path, "def main", tokens=4)


def test_logits_tell_a_swapped_weight(side, tmp_path):
    """Negative control: gate and up exchanged, which have one shape, are seen."""
    source = side("qwen2 narrow")
    write_gguf(source, tmp_path / "out", ["F32"], GgufOptions(name="m", quiet=True))
    path = tmp_path / "out" / "m-F32.gguf"
    model = reference(path, "qwen2")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight = layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight
    with LlamaModel(path) as theirs:
        assert apart(model, theirs, PROMPT) > QUANTIZED_TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"),
    cases(
        [("qwen2 narrow", "Q8_0"), ("qwen3 tied", "Q4_0")],
        [
            (name, kind)
            for name in ("qwen2", "qwen2 tied", "qwen3 tied", *OF_TRANSFORMERS_WIDTHS)
            for kind in ("F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K")
            if (name, kind) != ("qwen3 tied", "Q4_0")
        ],
    ),
)
def test_transformers_finds_our_weights_and_ids(side, name, kind, tmp_path):
    source = side(name)
    write_gguf(source, tmp_path / "out", [kind], GgufOptions(name="m", quiet=True))
    path = tmp_path / "out" / f"m-{kind}.gguf"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=path.name, dtype=torch.float32
    )
    expected = reference(path, source.stated["model_type"]).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=path.name)
    ours = transformers.AutoTokenizer.from_pretrained(source.tokenizer_dir)
    for text in ("def f(x):\n    return x + 1_000", "It's 2024\u2026  two", "<|im_start|>user\n\u4f60\u597d<|im_end|>"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
