"""A checkpoint loads under any layout, bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron_qwen.checkpoint.find import resolve
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs
from tests.distributed.layouts import DENSE, MOE

ONE = (1, {})
SAVED_UNDER = {"tiny_dense": "TP2+SPxPP2", "tiny_moe": "EP2xTP2 ETP1"}
LOADED_UNDER = {
    "tiny_dense": ["one rank", "TP2+SP", "PP2xVPP2", "CP2", "DP2", "TP2xCP2", "TP2+SPxPP2"],
    "tiny_moe": ["one rank", "EP2", "PP2xEP2", "DP2", "TP2+SP", "EP2xTP2 ETP2", "PP2xVPP2"],
}


def layout_of(recipe, name):
    return ({"one rank": ONE} | (DENSE if recipe == "tiny_dense" else MOE))[name]


def config_of(recipe, name, tokens):
    config = RECIPES[recipe]().with_section("data", path=str(tokens)).with_section("training", global_batch_size=2)
    return jobs.with_layout(config, layout_of(recipe, name)[1])


@pytest.fixture(scope="module")
def saved(pool, tokens, tmp_path_factory):
    """Checkpoint directory after three steps, and the loss of the fourth, by recipe."""
    found = {}
    for recipe, name in SAVED_UNDER.items():
        root = tmp_path_factory.mktemp(f"saved_{recipe}") / "checkpoints"
        config = config_of(recipe, name, tokens)
        ranks = layout_of(recipe, name)[0]
        pool[ranks].run(jobs.train, config, 3, root)
        losses = pool[ranks].run(jobs.train, config, 4)[0]["losses"]
        found[recipe] = (root, losses[3])
    return found


@pytest.mark.parametrize(
    ("recipe", "name"), [(recipe, name) for recipe, names in LOADED_UNDER.items() for name in names]
)
def test_loads_bit_equal(recipe, name, pool, tokens, saved, tmp_path):
    root, next_loss = saved[recipe]
    ranks = layout_of(recipe, name)[0]
    answers = pool[ranks].run(jobs.load_and_save, config_of(recipe, name, tokens), root, tmp_path / "checkpoints")
    before, after = CheckpointReader(newest(root)), CheckpointReader(newest(tmp_path / "checkpoints"))
    assert {name for name in before.tensors() if "exp_avg" in name}, "no optimizer state in the checkpoint"
    assert before.tensors().keys() == after.tensors().keys()
    vocabulary = RECIPES[recipe]().model.vocab_size
    for tensor in before.tensors():
        a, b = before.read(tensor), after.read(tensor)
        if "word_embeddings" in tensor or "output_layer" in tensor:
            a, b = a[:vocabulary], b[:vocabulary]  # padding differs with the layout
        assert torch.equal(a, b), tensor
    assert all(answer["iteration"] == 4 for answer in answers)
    difference = abs(answers[0]["loss"] - next_loss) / next_loss
    print(f"{recipe} {SAVED_UNDER[recipe]} -> {name}: next loss {difference:.1e}")
    assert difference <= 1e-6


def newest(root: Path) -> Path:
    return resolve(root)[0].path
