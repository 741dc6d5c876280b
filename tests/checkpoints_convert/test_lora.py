"""Adapters of PEFT in and out: the same bits, the same logits, and a refusal of what would compute something else."""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from checkpoints_convert.lora.peft_config import peft_config
from megatron_qwen.checkpoint.paths import STATE, iteration_dir
from megatron_qwen.config.lora import LoraConfig as OurLora
from megatron_qwen.recipes.registry import RECIPES
from tests.checkpoints_convert.models import make
from tests.checkpoints_convert.refusal import assert_untouched, refused
from tests.conftest import run
from tests.tiers import cases

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXT = torch.tensor([[5, 17, 101, 42, 7, 300, 11, 23, 64, 5, 90, 12]])
KINDS = {
    "qwen2 odd": ["q_proj", "v_proj", "down_proj"],
    "qwen2 even tied": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3 odd": ["k_proj", "o_proj", "up_proj"],
    "qwen2_moe even": ["q_proj", "o_proj"],
    "qwen3_moe even": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}


def convert(*words, code=0):
    done = run("checkpoints_convert.convert", *words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def write_adapter(out, hf, targets, **settings):
    """An adapter with loud numbers in both matrices, as older transformers name the layers of experts."""
    config = transformers.AutoConfig.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    names = _linear_layers(model, config, targets)
    generator = torch.Generator().manual_seed(1)
    rank = settings.get("r", 4)
    tensors = {}
    for name, (outputs, inputs) in names.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.2 * torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.2 * torch.randn(outputs, rank, generator=generator)
    out.mkdir()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "target_modules": targets}
    (out / CONFIG).write_text(json.dumps(content | settings))
    return out


def _linear_layers(model, config, targets):
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            place = name.rsplit(".", 1)[0]
            for expert in range(config.num_experts):
                sizes = {"gate_proj": 2, "up_proj": 2} if name.endswith("gate_up_proj") else {"down_proj": 1}
                for part, share in sizes.items():
                    if part in targets:
                        found[f"{place}.{expert}.{part}"] = (parameter.shape[1] // share, parameter.shape[2])
        elif name.endswith(".weight") and name.rsplit(".", 2)[1] in targets:
            found[name.removesuffix(".weight")] = tuple(parameter.shape)
    return found


def logits(model):
    with torch.no_grad():
        return model.eval()(TEXT % model.config.vocab_size).logits


@pytest.fixture(
    scope="module", params=cases(["qwen2 odd", "qwen3_moe even"], ["qwen2 even tied", "qwen3 odd", "qwen2_moe even"])
)
def imported(request, tmp_path_factory):
    """A model, an adapter, and the checkpoint of it."""
    root = tmp_path_factory.mktemp("lora")
    hf = make(request.param, root / "hf", dtype=torch.float32, loud=True)
    adapter = write_adapter(root / "adapter", hf, KINDS[request.param], use_rslora=request.param == "qwen3 odd")
    convert("from-hf", hf, root / "base")
    convert("from-peft", adapter, root / "lora", "--base", root / "base")
    return root


def test_there_and_back_is_the_same_file(imported, tmp_path):
    convert("to-peft", imported / "lora", tmp_path / "back", "--base-name", "somewhere/base")
    before, after = load_file(imported / "adapter" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    content = json.loads((tmp_path / "back" / CONFIG).read_text())
    given = json.loads((imported / "adapter" / CONFIG).read_text())
    assert content["base_model_name_or_path"] == "somewhere/base"
    for key in ("r", "lora_alpha", "peft_type", "task_type"):
        assert content[key] == given[key]
    if isinstance(content["target_modules"], list):
        assert sorted(content["target_modules"]) == sorted(given["target_modules"])


def test_merged_it_has_the_logits_of_peft_unmerged(imported, tmp_path):
    convert("to-peft", imported / "lora", tmp_path / "back")
    convert("to-hf", imported / "lora", tmp_path / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(imported / "hf")
    plain = logits(base)
    unmerged = logits(PeftModel.from_pretrained(base, tmp_path / "back"))
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert "merged into `base`" in (tmp_path / "merged" / "README.md").read_text()
    assert (unmerged - plain).abs().max() > 0.1
    assert (merged - unmerged).abs().max() < 1e-5 * max(1.0, plain.abs().max())


def test_a_merged_checkpoint_is_what_an_export_merges(imported, tmp_path):
    convert("merge", imported / "lora", tmp_path / "whole")
    convert("to-hf", imported / "lora", tmp_path / "direct")
    convert("verify", tmp_path / "whole", tmp_path / "direct")
    convert("verify", imported / "lora", tmp_path / "direct", "--logits")
    state = json.loads((iteration_dir(tmp_path / "whole" / "checkpoints", 0) / STATE).read_text())
    assert "lora_base" not in state
    convert("verify", imported / "base", tmp_path / "whole", code=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model's checkpoint and an adapter for it, to be spoilt."""
    root = tmp_path_factory.mktemp("parts")
    hf = make("qwen2 odd", root / "hf", dtype=torch.float32, loud=True)
    write_adapter(root / "adapter", hf, ["q_proj", "down_proj"])
    convert("from-hf", hf, root / "base")
    return root


def spoilt(parts, tmp_path, *, tensors=None, drop=(), **settings):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = json.loads((parts / "adapter" / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(content | settings))
    kept = {name: value for name, value in load_file(parts / "adapter" / WEIGHTS).items() if name not in drop}
    save_file(kept | (tensors or {}), adapter / WEIGHTS, metadata={"format": "pt"})
    return adapter


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
WRONG = [
    ({"peft_type": "IA3"}, {}, "peft_type = IA3: is no LoRA"),
    ({"r": 0}, {}, "r = 0: must be a whole number"),
    ({"lora_alpha": -1}, {}, "lora_alpha = -1: must be a number above 0"),
    ({"use_dora": True}, {}, "use_dora = True: is not supported"),
    ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, {}, "alpha_pattern"),
    ({"bias": "all"}, {}, "bias = all: trains biases"),
    ({"layers_to_transform": [0]}, {}, "layers_to_transform"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights = pissa: changes the base model's weights"),
    ({"trainable_token_indices": [3]}, {}, "trainable_token_indices"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, {}, "target_parameters"),
    ({"modules_to_save": ["norm"]}, {}, "modules_to_save = norm: can be embed_tokens and lm_head here"),
    ({"a_field_of_tomorrow": 1}, {}, "a_field_of_tomorrow = 1: is not supported"),
    ({"r": 8}, {}, "must have the shape (8, 48)"),
    ({"modules_to_save": ["lm_head"]}, {}, "adapters are missing"),
    ({}, {"drop": [f"{LAYER}.lora_A.weight"]}, "adapters are missing"),
    ({}, {"tensors": {f"{LAYER}.lora_C.weight": torch.zeros(1)}}, "are no adapter that this model can have"),
    ({}, {"tensors": {f"{LAYER}.lora_A.weight": torch.zeros(4, 47)}}, "must have the shape (4, 48)"),
    ({}, {"tensors": {f"{LAYER}.lora_A.weight": torch.zeros(4, 48).half()}}, "all tensors must have one format"),
    (
        {},
        {"tensors": {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.zeros(4, 48)}},
        "are no adapter that this model can have",
    ),
    (
        {},
        {"tensors": {"base_model.model.lm_head.base_layer.weight": torch.zeros(330, 48)}},
        "lm_head.base_layer.weight: is not the weight of",
    ),
]


@pytest.mark.parametrize(("settings", "how", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_what_would_compute_something_else_is_refused(settings, how, said, parts, tmp_path):
    adapter = spoilt(parts, tmp_path, **how, **settings)
    assert said in refused("from-peft", adapter, tmp_path / "out", "--base", parts / "base")
    assert_untouched(tmp_path)


def test_all_that_is_wrong_is_said_at_once(parts, tmp_path):
    adapter = spoilt(parts, tmp_path, use_dora=True, bias="all", r=None)
    told = refused("from-peft", adapter, tmp_path / "out", "--base", parts / "base")
    assert all(field in told for field in ("use_dora", "bias", "must be a whole number"))


def test_a_directory_without_an_adapter_is_refused(parts, tmp_path):
    told = refused("from-peft", parts / "hf", tmp_path / "out", "--base", parts / "base")
    assert "adapter_config.json: is missing" in told
    (tmp_path / "pickle").mkdir()
    shutil.copy(parts / "adapter" / CONFIG, tmp_path / "pickle")
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"x")
    assert "is a pickle" in refused("from-peft", tmp_path / "pickle", tmp_path / "out", "--base", parts / "base")
    (tmp_path / "cut").mkdir()
    shutil.copy(parts / "adapter" / CONFIG, tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).write_bytes((parts / "adapter" / WEIGHTS).read_bytes()[:-7])
    assert "cannot be read" in refused("from-peft", tmp_path / "cut", tmp_path / "out", "--base", parts / "base")


def test_files_of_experts_say_what_peft_multiplies(parts):
    """PEFT doubles rank and alpha of fused experts, and refuses dropout there."""
    model = RECIPES["tiny_moe"]().model
    lora = OurLora(rank=16, alpha=8.0, use_rslora=True, dropout=0.1)
    content = peft_config(lora, model, base_name=None)
    assert (content["lora_alpha"], content["use_rslora"], content["lora_dropout"]) == (32, False, 0.0)
    attention = OurLora(rank=16, alpha=8.0, use_rslora=True, dropout=0.1, target_modules=("self_attn.*",))
    content = peft_config(attention, model, base_name=None)
    assert (content["lora_alpha"], content["use_rslora"], content["lora_dropout"]) == (8, True, 0.1)


def test_whole_weights_have_no_adapters(parts, tmp_path):
    assert "has no adapters" in refused("to-peft", parts / "base", tmp_path / "out")
    assert "has no adapters" in refused("merge", parts / "base", tmp_path / "out")
    told = refused("merge", parts / "base", tmp_path / "out", "--base", parts / "base", exit_codes=(2,))
    assert "is for adapters" in told
    assert_untouched(tmp_path)


def test_a_base_that_is_gone_is_named(parts, tmp_path):
    shutil.copytree(parts / "base", tmp_path / "base")
    convert("from-peft", parts / "adapter", tmp_path / "lora", "--base", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "is not there" in refused("merge", tmp_path / "lora", tmp_path / "out")
    convert("merge", tmp_path / "lora", tmp_path / "out", "--base", tmp_path / "moved")
    convert("to-peft", tmp_path / "lora", tmp_path / "adapter")  # needs no base


def test_adapters_of_adapters_are_refused(parts, tmp_path):
    convert("from-peft", parts / "adapter", tmp_path / "lora", "--base", parts / "base")
    told = refused("from-peft", parts / "adapter", tmp_path / "out", "--base", tmp_path / "lora")
    assert "has adapters itself: merge them first" in told
