"""The validation loss is transformers' over all held-out text, by the weights that the step left."""

import pytest
import torch

from megatron_qwen.checkpoint.paths import iteration_dir
from tests.training.cases import LENGTH
from tests.training.reference import IGNORED, exported, held_out, transformers_model


@pytest.mark.parametrize("iteration", [3, 5])
def test_validation_loss_is_the_mean_over_the_tokens_that_are_held_out(iteration, reported, masked_documents):
    rows = held_out(masked_documents, length=LENGTH)
    assert len(rows) == 16
    weights = exported(reported.config, iteration_dir(reported.path / "checkpoints", iteration))
    model = transformers_model("tiny_dense", weights).eval()
    labels = torch.stack([row.labels for row in rows])
    with torch.no_grad():
        logits = model(torch.stack([row.tokens for row in rows])).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    counts = (labels != IGNORED).sum(dim=1)
    expected = float(losses.sum() / counts.sum())
    # The control: windows differ so much in how many tokens count that a mean of their means is another number.
    assert float((losses.sum(dim=1) / counts.clamp(min=1)).mean()) != pytest.approx(expected, rel=1e-4)
    record = reported.records[iteration - 1]
    assert record["iteration"] == iteration
    assert record["validation_loss"] == pytest.approx(expected, rel=2e-6)


def test_it_is_measured_when_it_is_due(reported):
    assert [record["iteration"] for record in reported.records if "validation_loss" in record] == [3, 5]
