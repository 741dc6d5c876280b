"""An objective with its own fields, weight and metrics gives, under every layout, what transformers' logits give."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.errors import ConfigError
from tests.distributed.layouts import CP2, PP2, SP, TP2
from tests.training import advantages
from tests.training.cases import BATCH, LENGTH, config_of, twin_of
from tests.training.reference import IGNORED, batch


@pytest.fixture(scope="module")
def expected(starts, masked_documents) -> dict[str, Any]:
    """The step by transformers and autograd."""
    twin = twin_of("tiny_dense", starts["tiny_dense"])
    rows = batch(config_of("tiny_dense", masked_documents), masked_documents, step=1)
    tokens, labels = torch.stack([row.tokens for row in rows]), torch.stack([row.labels for row in rows])
    extra = [advantages.extra_of(number, LENGTH) for number in range(BATCH)]
    advantage = torch.from_numpy(np.stack([one["advantage"] for one in extra]))
    scale = torch.from_numpy(np.stack([one["scale"] for one in extra]))
    carries = labels != IGNORED
    log_probs = torch.log_softmax(twin.model(tokens, use_cache=False).logits, dim=-1)
    log_probs = log_probs.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0] * carries
    loss = -(scale * advantage * log_probs).sum() / BATCH
    loss.backward()
    gradients = [value.grad.flatten() for value in twin.model.parameters()]
    return {
        "loss": loss.item(),
        "grad_norm": float(torch.cat(gradients).double().norm()),
        "log_prob": float(log_probs.sum() / carries.sum()),
        "scale": float(scale.mean()),
    }


@pytest.mark.parametrize(
    ("size", "layout", "micro"),
    [(1, {}, 8), (1, {}, 2), (2, {}, 2), (2, TP2 | SP, 4), (2, PP2, 2), (2, CP2, 4)],
    ids=["one rank", "one rank, micro-batches of 2", "DP2", "TP2+SP", "PP2", "CP2"],
)
def test_an_objective_of_another_kind(size, layout, micro, pool, starts, masked_documents, expected, tmp_path):
    changes = {"parallel": layout, "training": {"micro_batch_size": micro}}
    config = config_of("tiny_dense", masked_documents, starts["tiny_dense"], **changes)
    for found in pool[size].run(advantages.first_step, config, tmp_path):
        assert found["weight"] == BATCH
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)
        assert list(found["metrics"]) == ["log_prob", "scale"]
        assert found["metrics"]["log_prob"] == pytest.approx(expected["log_prob"], rel=2e-6)
        assert found["metrics"]["scale"] == pytest.approx(expected["scale"], rel=1e-6)


def test_data_that_lacks_a_field_is_refused(masked_documents):
    from megatron_qwen.data.reading.training_data import TrainingData
    from megatron_qwen.training.build import require_fields

    config = config_of("tiny_dense", masked_documents)
    data = TrainingData(config.with_section("training", eval_iters=0))
    with pytest.raises(ConfigError, match=r"objective.kind = pretrain: needs advantage, scale beside the tokens"):
        require_fields(data, advantages.Advantages())
    data.extra_fields = advantages.FIELDS
    require_fields(data, advantages.Advantages())
    validated = config.with_section("training", eval_iters=1).with_section("data", validation_fraction=0.1)
    data.config = validated
    with pytest.raises(ConfigError, match=r"which its held-out part \(training.eval_iters\) does not have"):
        require_fields(data, advantages.Advantages())
    data.held_out_fields = advantages.FIELDS
    require_fields(data, advantages.Advantages())


@pytest.mark.parametrize("values", [np.zeros(3, np.float32), np.zeros(4, np.float64), np.zeros((4, 1), np.float32)])
def test_values_of_another_shape_or_type_are_not_batched(values):
    with pytest.raises(AssertionError, match="advantage"):
        ExtraField("advantage", "float32", per="token").require(values, tokens=4, sequences=1)
