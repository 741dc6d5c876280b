"""LoRA against PEFT and, where PEFT has no such adapter, against merged weights in plain torch; under every layout."""

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.lora.to_peft import to_peft
from tests.distributed.layouts import CP2, EP2, PP2, SP, TP2, VPP2
from tests.tiers import cases
from tests.training import ranks
from tests.training.cases import config_of
from tests.training.lora_reference import OPTIM, Merged, WithPeft

STEPS = 20
ETP1 = {"expert_tensor_parallel_size": 1}
LORA = {"rank": 4, "alpha": 8.0, "target_modules": ("all-linear",)}
NO_ROUTER = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}


def lora_run(recipe, documents, start, *, layout=None, steps=STEPS, **lora):
    return config_of(
        recipe,
        documents,
        start,
        lora=LORA | lora,
        optim=OPTIM,
        training={"train_iters": steps},
        model=NO_ROUTER if recipe == "tiny_moe" else {},
        parallel=layout or {},
    )


def adapter_at(run_dir, out, iteration):
    """The adapters of a checkpoint as PEFT's files."""
    to_peft(open_checkpoint(run_dir, iteration=iteration, merged=False), out, base_name=None)
    return out


@pytest.fixture(scope="module")
def start_of(pool, documents, starts, tmp_path_factory):
    """The adapters that a run begins with, as PEFT's files."""

    def made(recipe, **lora):
        run_dir = tmp_path_factory.mktemp("begin")
        pool[1].run(ranks.steps_from, lora_run(recipe, documents, starts[recipe], **lora), run_dir, 0)
        return adapter_at(run_dir, run_dir / "peft", 0)

    return made


CASES = [
    ("tiny_dense", WithPeft, {}),
    ("tiny_dense", WithPeft, {"target_modules": ("q_proj", "v_proj", "mlp.down_proj"), "use_rslora": True}),
    ("tiny_dense", WithPeft, {"target_modules": ("embed_tokens", "lm_head", "k_proj", "gate_proj")}),
    ("tiny_dense", WithPeft, {"target_modules": ("v_proj",), "modules_to_save": ("embed_tokens", "lm_head")}),
    ("tiny_moe", Merged, {}),
    ("tiny_moe", WithPeft, {"target_modules": ("self_attn.*",)}),
]


@pytest.mark.parametrize(("recipe", "oracle", "lora"), CASES)
def test_steps_and_adapters_are_those_of_peft(recipe, oracle, lora, pool, documents, starts, start_of, tmp_path):
    config = lora_run(recipe, documents, starts[recipe], **lora)
    ((*ours,),) = pool[1].run(ranks.steps_from, config, tmp_path, STEPS)
    other = oracle(recipe, config, starts[recipe], start_of(recipe, **lora))
    theirs = other.steps(config, STEPS)
    gap = max(abs(step["loss"] / loss - 1) for step, (loss, _) in zip(ours, theirs, strict=True))
    print(f"{STEPS} steps, {ours[0]['loss']:.4f} to {ours[-1]['loss']:.4f}, largest relative gap {gap:.1e}")
    for step, (loss, norm) in zip(ours, theirs, strict=True):
        assert step["loss"] == pytest.approx(loss, rel=1e-5)
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert ours[-1]["loss"] < ours[0]["loss"]
    trained = load_file(adapter_at(tmp_path, tmp_path / "peft", STEPS) / "adapter_model.safetensors")
    wanted = other.adapters()
    assert trained.keys() == wanted.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


FEW = 4
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = [
    ("tiny_dense", "TP2", 2, TP2),
    ("tiny_dense", "TP2+SP", 2, TP2 | SP),
    ("tiny_dense", "PP2", 2, PP2),
    ("tiny_dense", "full recompute", 1, {"recompute": "full"}),
    ("tiny_moe", "EP2", 2, EP2),
]
MORE_LAYOUTS = [
    ("tiny_dense", "CP2", 2, CP2),
    ("tiny_dense", "DP2", 2, {}),
    ("tiny_dense", "DP2 overlapped", 2, OVERLAPPED),
    ("tiny_dense", "PP2 x VPP2", 2, PP2 | VPP2),
    ("tiny_dense", "TP2+SP full recompute", 2, TP2 | SP | {"recompute": "full"}),
    ("tiny_dense", "selective recompute", 1, {"recompute": "selective"}),
    ("tiny_dense", "TP2+SP x PP2", 4, TP2 | SP | PP2),
    ("tiny_moe", "TP2+SP, ETP1", 2, TP2 | SP | ETP1),
    ("tiny_moe", "EP2 x TP2, ETP1", 2, TP2 | SP | EP2 | ETP1),
    ("tiny_moe", "PP2", 2, PP2),
    ("tiny_moe", "DP2", 2, {}),
    ("tiny_moe", "EP2 full recompute", 2, EP2 | {"recompute": "full"}),
    ("tiny_moe", "PP2 x EP2", 4, PP2 | EP2),
]


@pytest.fixture(scope="module")
def on_one_rank(pool, documents, starts, tmp_path_factory):
    """A few steps on one rank, and the adapters after them, by recipe."""
    kept = {}

    def found(recipe, lora):
        key = (recipe, repr(lora))
        if key not in kept:
            run_dir = tmp_path_factory.mktemp("one")
            (steps,) = pool[1].run(ranks.steps_from, lora_run(recipe, documents, starts[recipe], **lora), run_dir, FEW)
            kept[key] = steps, load_file(adapter_at(run_dir, run_dir / "peft", FEW) / "adapter_model.safetensors")
        return kept[key]

    return found


VOCABULARY = {"target_modules": ("embed_tokens", "lm_head", "self_attn.*")}
WHOLE = {"target_modules": ("self_attn.*",), "modules_to_save": ("embed_tokens", "lm_head")}
EXPERTS = {"target_modules": ("mlp.experts.*",)}


@pytest.mark.parametrize(
    ("recipe", "name", "size", "layout", "lora"),
    [(*case, {}) for case in cases(LAYOUTS, MORE_LAYOUTS)]
    + [("tiny_dense", "TP2+SP", 2, TP2 | SP, VOCABULARY)]
    + cases(
        [],
        [("tiny_dense", *one, lora) for lora in (VOCABULARY, WHOLE) for _, *one in LAYOUTS[:4]]
        + [("tiny_moe", *one, EXPERTS) for _, *one in (LAYOUTS[4], *MORE_LAYOUTS[8:10])],
    ),
)
def test_a_layout_changes_nothing(recipe, name, size, layout, lora, pool, documents, starts, on_one_rank, tmp_path):
    alone, adapters = on_one_rank(recipe, lora)
    config = lora_run(recipe, documents, starts[recipe], layout=layout, **lora)
    for steps in pool[size].run(ranks.steps_from, config, tmp_path, FEW):
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in alone], rel=1e-6)
        assert [step["grad_norm"] for step in steps] == pytest.approx([step["grad_norm"] for step in alone], rel=1e-5)
    found = load_file(adapter_at(tmp_path, tmp_path / "peft", FEW) / "adapter_model.safetensors")
    assert found.keys() == adapters.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, adapters[key], rtol=1e-3, atol=1e-5)
