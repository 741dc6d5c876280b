"""Every layout computes what one rank computes: losses, gradient norms and exported weights."""

from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.tensor_set import ExportedWeights
from megatron_qwen.checkpoint.find import resolve
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import DENSE, MOE
from tests.tiers import cases, count

STEPS = count(quick=3, thorough=5)


def config_of(recipe: str, tokens: Path) -> RunConfig:
    """A tiny recipe with an Adam epsilon above the rounding noise of gradients.

    The gradient of the key bias is rounding noise (softmax hardly sees a shift of all scores), and Adam turns noise
    above its epsilon into steps of full size. With this one every weight can be compared; ``test_at_the_usual_epsilon``
    compares all but the key bias with the recipe's own.
    """
    return usual_config(recipe, tokens).with_section("optim", adam_eps=1e-5)


def usual_config(recipe: str, tokens: Path) -> RunConfig:
    if recipe == "tiny_tied":
        return usual_config("tiny_dense", tokens).with_section("model", share_embeddings_and_output_weights=True)
    # Two micro-batches a step: gradients are accumulated, and stages are busy at once.
    return RECIPES[recipe]().with_section("data", path=str(tokens)).with_section("training", global_batch_size=2)


def exported(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Weights by their Hugging Face names."""
    weights = ExportedWeights(CheckpointWeights(CheckpointReader(resolve(checkpoint)[0].path), config.model))
    return {name: weights.rows(name, 0, info.shape[0]) for name, info in weights.tensors.items()}


def relative_differences(weights: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """|a - b| / |b| of every tensor."""
    assert weights.keys() == expected.keys()
    return {
        name: float((weights[name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in expected.items()
    }


@pytest.fixture(scope="module")
def one_rank(pool, tokens, tmp_path_factory):
    """Steps of each model on one rank, by recipe."""
    found = {}
    for recipe in ("tiny_dense", "tiny_tied", "tiny_qwen3", "tiny_moe", "tiny_qwen3_moe"):
        directory = tmp_path_factory.mktemp(recipe)
        config = config_of(recipe, tokens)
        answer = pool[1].run(jobs.train, config, STEPS, directory / "checkpoints")[0]
        found[recipe] = {**answer, "weights": exported(config, directory / "checkpoints")}
    return found


# What these models add to a layout: norms of queries and keys, and embeddings tied over stages.
QWEN3 = cases(["TP2+SP", "CP2"], ["TP2", "PP2", "TP2+SP full recompute", "selective recompute"])
QWEN3_MOE = cases(["EP2xTP2 ETP1"], ["TP2+SP", "PP2xEP2"])
TIED = cases(["PP2xVPP2", "TP2+SPxPP2"], ["TP2+SP", "PP2", "DP2"])


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("tiny_dense", name) for name in DENSE]
    + [("tiny_tied", name) for name in TIED]
    + [("tiny_qwen3", name) for name in QWEN3]
    + [("tiny_moe", name) for name in MOE]
    + [("tiny_qwen3_moe", name) for name in QWEN3_MOE],
)
def test_equals_one_rank(recipe, name, pool, tokens, one_rank, tmp_path):
    ranks, layout = (MOE if recipe.endswith("moe") else DENSE)[name]
    config = jobs.with_layout(config_of(recipe, tokens), layout)
    require_legal(config, world_size=ranks)
    answers = pool[ranks].run(jobs.train, config, STEPS, tmp_path / "checkpoints")
    assert all(answer == answers[0] for answer in answers), "ranks report different numbers"
    expected, found = one_rank[recipe], answers[0]
    worst_loss = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], expected["losses"], strict=True))
    worst_norm = max(abs(a - b) / abs(b) for a, b in zip(found["grad_norms"], expected["grad_norms"], strict=True))
    weights = exported(config, tmp_path / "checkpoints")
    differences = relative_differences(weights, expected["weights"])
    worst = max(differences, key=differences.__getitem__)
    print(f"{recipe} {name}: loss {worst_loss:.1e}, gradient norm {worst_norm:.1e}, {worst} {differences[worst]:.1e}")
    assert worst_loss <= 1e-5
    assert worst_norm <= 1e-4
    assert differences[worst] <= 1e-5, worst


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("tiny_dense", "TP2+SPxPP2"), ("tiny_tied", "PP2"), ("tiny_moe", "TP2+SP"), ("tiny_moe", "PP2xEP2")],
)
def test_at_the_usual_epsilon(recipe, name, pool, tokens, tmp_path):
    plain = usual_config(recipe, tokens)
    ranks, layout = (MOE if recipe == "tiny_moe" else DENSE)[name]
    weights = []
    for size, config in ((1, plain), (ranks, jobs.with_layout(plain, layout))):
        pool[size].run(jobs.train, config, STEPS, tmp_path / f"{size}")
        weights.append(exported(config, tmp_path / f"{size}"))
    differences = relative_differences(weights[1], weights[0])
    worst = max(value for key, value in differences.items() if not key.endswith("k_proj.bias"))
    print(f"{recipe} {name}, usual epsilon: weights {worst:.1e}")
    assert worst <= 1e-5
