"""A mixture cut from a dense model computes the dense model where mathematics allows, and says where it does not."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.convert import main
from checkpoints_convert.to_hf import ExportOptions, export
from checkpoints_convert.upcycle_plan import plan
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, ConversionError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.checkpoints_convert.models import make
from tests.distributed import jobs

# The dense models have 8 layers, 48 channels, 72 of feed-forward (qwen2 even).
SHAPE = (
    "model.num_layers=8",
    "model.hidden_size=48",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.kv_channels=16",
)
NO_SHARED = ("model.moe_shared_expert_intermediate_size=null", "model.moe_shared_expert_gate=false")


def experts(
    count: int, topk: int, width: int, *, pre_softmax: bool, shared: int | None = None, gate: bool = True
) -> list[str]:
    fields = [f"model.num_moe_experts={count}", f"model.moe_router_topk={topk}", f"model.moe_ffn_hidden_size={width}"]
    fields.append(f"model.moe_router_pre_softmax={str(pre_softmax).lower()}")
    if shared is None:
        return [*fields, *NO_SHARED]
    return [
        *fields,
        f"model.moe_shared_expert_intermediate_size={shared}",
        f"model.moe_shared_expert_gate={str(gate).lower()}",
    ]


AS_QWEN = experts(60, 4, 18, pre_softmax=True, shared=72)

# name -> (fields, whether the plan says it is exact, largest difference in units of the logits' rms)
CASES: dict[str, tuple[list[str], bool, float]] = {
    "copies, renormalised": (experts(4, 2, 72, pre_softmax=False), True, 3e-5),
    "copies, one chosen": (experts(4, 1, 72, pre_softmax=True), False, 0.05),
    "four slices, one group of two": (experts(8, 4, 18, pre_softmax=False), True, 3e-5),
    "four slices, two groups of three": (experts(12, 8, 18, pre_softmax=False), True, 3e-5),
    "slices with padding": (experts(10, 5, 16, pre_softmax=False), True, 3e-5),
    "slices beside a whole shared expert": (experts(8, 4, 18, pre_softmax=False, shared=72), True, 3e-5),
    "slices beside a wider shared expert": (experts(8, 4, 18, pre_softmax=False, shared=80), True, 3e-5),
    "slices beside a narrow shared expert": (experts(8, 2, 20, pre_softmax=False, shared=32), True, 3e-5),
    "shared expert without a gate": (experts(8, 4, 18, pre_softmax=False, shared=72, gate=False), True, 3e-5),
    "as Qwen1.5-MoE: 60 experts, 4 chosen, not renormalised": (AS_QWEN, False, 0.05),
    "as Qwen1.5-MoE, routed experts from zero": ([*AS_QWEN, "--routed-share", "0"], True, 3e-5),
    "copies, not renormalised": (experts(4, 2, 72, pre_softmax=True), False, 0.05),
    "too few chosen, but a whole shared expert": (experts(8, 2, 18, pre_softmax=False, shared=72), True, 3e-5),
    "too few chosen": (experts(8, 2, 18, pre_softmax=False), False, float("inf")),
    "no whole groups": (experts(6, 4, 18, pre_softmax=False), False, float("inf")),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make("qwen2 even", tmp_path_factory.mktemp("dense") / "hf", dtype=torch.float32, loud=True)


def upcycled(dense, out, fields: list[str], capsys: Any) -> dict[str, Any]:
    capsys.readouterr()
    words = ["upcycle", str(dense), str(out), "--recipe", "tiny_moe", *SHAPE, *fields, "--json"]
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", CASES)
def test_gives_the_dense_logits_where_it_says_so(name, dense, tmp_path, capsys):
    fields, exact, tolerance = CASES[name]
    report = upcycled(dense, tmp_path / "moe", fields, capsys)
    logits = report["logits"]
    difference = logits["max_abs_difference"] / logits["rms"]
    print(f"{name}: {difference:.1e}; {'; '.join(report['notes'])}")
    assert report["exact"] is exact
    assert difference <= tolerance
    if not exact:
        assert any("not possible" in note or "not exact" in note for note in report["notes"])
        assert report["nearly"] is (tolerance < 1)
        assert difference > 3e-5, "it says that it differs, and does not"
    assert json.loads((tmp_path / "moe" / "upcycle.json").read_text())["exact"] is exact


def test_experts_are_slices_and_groups_share_a_router_row(dense, tmp_path, capsys):
    upcycled(dense, tmp_path / "moe", experts(8, 4, 18, pre_softmax=False, shared=72), capsys)
    export(open_checkpoint(tmp_path / "moe"), tmp_path / "hf", ExportOptions(quiet=True))
    moe, original = load_file(tmp_path / "hf" / "model.safetensors"), load_file(dense / "model.safetensors")
    mlp = "model.layers.3.mlp."
    for expert in range(8):
        rows = slice(expert % 4 * 18, expert % 4 * 18 + 18)
        for part in ("gate_proj", "up_proj"):
            assert torch.equal(moe[f"{mlp}experts.{expert}.{part}.weight"], original[f"{mlp}{part}.weight"][rows])
        # Half of the output, of which a chosen expert's weight is a quarter.
        expected = 2 * original[f"{mlp}down_proj.weight"][:, rows]
        assert torch.equal(moe[f"{mlp}experts.{expert}.down_proj.weight"], expected)
    router = moe[f"{mlp}gate.weight"]
    assert torch.equal(router[:4], router[:1].expand(4, -1))
    assert torch.equal(router[4:], router[4:5].expand(4, -1))
    assert not torch.equal(router[0], router[4])
    assert not torch.equal(router, moe["model.layers.4.mlp.gate.weight"])
    rest = [name for name in original if ".mlp." not in name]
    assert all(torch.equal(moe[name], original[name]) for name in rest)


def test_trains_from_there_under_any_layout(dense, pool, tokens, tmp_path, capsys):
    """Every expert learns, padding included; expert parallelism computes what one rank does."""
    upcycled(dense, tmp_path / "moe", experts(10, 5, 16, pre_softmax=False), capsys)
    losses = []
    for ranks in (1, 2):
        fields = [f"data.path={tokens}", "data.seq_length=64", "training.global_batch_size=4"]
        fields.append(f"parallel.expert_model_parallel_size={ranks}")
        config = resolve(str(tmp_path / "moe" / "run.yaml"), fields, RECIPES)
        run_dir = tmp_path / f"run{ranks}"
        RunDirectory(run_dir).claim(config)
        losses.append(pool[ranks].run(jobs.start_from, config, run_dir)[0]["loss"])
    assert abs(losses[0] - losses[1]) <= 1e-5 * losses[0]


def test_what_does_not_go_together():
    dense, moe = RECIPES["qwen2_5_7b"]().model, RECIPES["qwen2_57b_a14b"]().model
    assert plan(dense, moe).nearly
    assert plan(dense, moe, routed_share=0).exact
    with pytest.raises(ConversionError, match=r"(?s)num_layers.*hidden_size.*num_query_groups"):
        plan(RECIPES["qwen2_5_0_5b"]().model, moe)
    with pytest.raises(ConversionError, match="not a mixture-of-experts"):
        plan(dense, dense)
    with pytest.raises(ConversionError, match="already"):
        plan(moe, moe)


def test_a_recipe_that_cannot_be_is_refused_before_anything_is_written(dense, tmp_path):
    for words in (["model.num_moe_experts=4", "model.moe_router_topk=8"], ["--router-std", "-1"]):
        with pytest.raises(ConfigError):
            main(["upcycle", str(dense), str(tmp_path / "moe"), "--recipe", "tiny_moe", *SHAPE, *words])
    assert not list(tmp_path.iterdir())
