"""What a step computes against transformers and torch's AdamW: loss, gradient norm, clipping, update, learning rate."""

from typing import Any

import pytest
import torch

from tests.distributed.layouts import CP2, PP2, SP, TP2
from tests.training import ranks
from tests.training.cases import CLIP, RATES, config_of, in_micro_batches, twin_of
from tests.training.reference import IGNORED, batch, exported, fused

# The two of the warm-up, and one after it.
STEPS = 3


@pytest.fixture(scope="module")
def twins(starts, documents, masked_documents):
    """What three steps should be, by recipe and clip_grad: losses, norms, tokens, weights."""
    found = {}
    for recipe, clip in (("tiny_dense", CLIP), ("tiny_dense", None), ("tiny_moe", CLIP)):
        text = masked_documents if recipe == "tiny_dense" else documents
        twin, steps, tokens = twin_of(recipe, starts[recipe], clip=clip), [], []
        for number, rate in enumerate(RATES[:STEPS], 1):
            rows = batch(config_of(recipe, text), text, step=number)
            tokens.append(sum(int((row.labels != IGNORED).sum()) for row in rows))
            steps.append(twin.step(in_micro_batches(rows), rate=rate))
        losses, norms = zip(*steps, strict=True)
        found[recipe, clip] = {"losses": losses, "norms": norms, "tokens": tokens, "weights": twin.weights}
    return found


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each tensor from what is expected."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - value).abs().max()) for name, value in expected.items()}


# Ranks, changes to the layout, sequences of a micro-batch.
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one rank": (1, {}, 2),
    "one rank, micro-batches of 4": (1, {}, 4),
    "DP2": (2, {}, 2),
    "TP2+SP": (2, TP2 | SP, 2),
    "PP2": (2, PP2, 2),
}
CASES = [("tiny_dense", CLIP, name) for name in ("one rank", "DP2", "TP2+SP", "PP2")]
# 0 does not clip, nor does a limit that no norm reaches.
CASES += [("tiny_dense", 0.0, "one rank"), ("tiny_dense", 100.0, "one rank, micro-batches of 4")]
CASES += [("tiny_moe", CLIP, name) for name in ("one rank", "TP2+SP")]


@pytest.mark.parametrize(("recipe", "clip", "name"), CASES)
def test_three_steps_are_those_of_transformers_and_torch(
    recipe, clip, name, pool, starts, documents, masked_documents, twins, tmp_path
):
    size, layout, micro = LAYOUTS[name]
    text = masked_documents if recipe == "tiny_dense" else documents
    changes = {"parallel": layout, "optim": {"clip_grad": clip}, "training": {"micro_batch_size": micro}}
    config = config_of(recipe, text, starts[recipe], **changes)
    expected = twins[recipe, CLIP if clip == CLIP else None]
    for steps in pool[size].run(ranks.steps_from, config, tmp_path, STEPS):
        assert [step["weight"] for step in steps] == expected["tokens"]
        assert [step["loss"] for step in steps] == pytest.approx(expected["losses"], rel=2e-6)
        assert [step["grad_norm"] for step in steps] == pytest.approx(expected["norms"], rel=2e-5)
        assert [step["learning_rate"] for step in steps] == pytest.approx(RATES[:STEPS], rel=1e-12)
    gaps = differences(fused(exported(config, tmp_path / "checkpoints")), expected["weights"])
    worst = max(gaps, key=gaps.__getitem__)
    print(f"{recipe} {name}: {worst} {gaps[worst]:.1e}")
    assert gaps[worst] < 5e-6, worst


def test_the_limit_clips_every_step_that_is_compared(twins):
    """The control: without it the comparison above would hold for a run that never clips."""
    clipped, free = twins["tiny_dense", CLIP], twins["tiny_dense", None]
    assert min(clipped["norms"]) > 2 * CLIP
    assert max(free["norms"]) < 100
    assert max(differences(clipped["weights"], free["weights"]).values()) > 1e-3


@pytest.mark.parametrize(
    ("data", "size", "layout", "micro"),
    [
        ({"eod_mask_loss": True}, 2, CP2, 2),
        ({"reset_attention_mask": True}, 1, {}, 4),
        ({"eod_mask_loss": True, "reset_attention_mask": True}, 2, PP2, 1),
    ],
    ids=["eod_mask_loss, CP2", "reset_attention_mask", "both, PP2"],
)
def test_masked_ends_and_separate_documents(data, size, layout, micro, pool, starts, masked_documents, tmp_path):
    """One step: no loss on what follows an end of document, and every document in a forward pass of its own."""
    changes = {"parallel": layout, "data": data, "training": {"micro_batch_size": micro}}
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"], **changes)
    rows = batch(config, masked_documents, step=1)
    assert sum(len(row.starts) for row in rows) >= 12
    separate = data.get("reset_attention_mask", False)
    loss, norm = twin_of("tiny_dense", starts["tiny_dense"]).backward([rows], separate=separate)
    for (step,) in pool[size].run(ranks.steps_from, config, tmp_path, 1):
        assert step["weight"] == sum(int((row.labels != IGNORED).sum()) for row in rows)
        assert step["loss"] == pytest.approx(loss, rel=2e-6)
        assert step["grad_norm"] == pytest.approx(norm, rel=2e-5)
