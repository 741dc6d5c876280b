"""What a mixture reports of its routers, against transformers' router logits: losses of balance and counts by hand."""

import pytest
import torch
import yaml

from tests.distributed.layouts import CP2, EP2
from tests.training import ranks
from tests.training.cases import BATCH, LENGTH, MICRO_BATCH, config_of, twin_of
from tests.training.reference import balancing_loss, batch

EXPERTS, CHOSEN, LAYERS = 4, 2, 4
CALLBACKS = ["expert_load.ExpertLoad", "validation.Validation"]


# So small a rate that the second step has the weights of the first.
STILL = {"learning_rate": 1e-12, "min_learning_rate": 0.0}


@pytest.fixture(scope="module")
def logits(starts, documents):
    """Router logits of the rows of the first two steps, each [layers, rows, s, experts]."""
    model, found = twin_of("tiny_moe", starts["tiny_moe"]).model, []
    for step in (1, 2):
        rows = batch(config_of("tiny_moe", documents), documents, step=step)
        with torch.no_grad():
            layers = model(torch.stack([row.tokens for row in rows]), output_router_logits=True).router_logits
        found.append(torch.stack(layers).view(LAYERS, BATCH, LENGTH, EXPERTS))
    return found


def reported(pool, size, documents, start, run_dir, **sections):
    """What the first two steps add to metrics.jsonl; validation in between must not count."""
    training = {"train_iters": 2, "eval_iters": 1, "eval_interval": 1}
    config = config_of("tiny_moe", documents, start, training=training, optim=STILL, **sections)
    answers = pool[size].run(ranks.steps_with_callbacks, config, run_dir, CALLBACKS)
    found = [[step["extra"] for step in answer] for answer in answers]
    assert all(answer == found[0] for answer in found)
    return found[0]


def counts_of(layer: torch.Tensor) -> torch.Tensor:
    """Tokens that each expert of a layer gets: those whose two largest logits name it."""
    chosen = layer.reshape(-1, EXPERTS).topk(CHOSEN, dim=-1).indices
    return torch.tensor([int((chosen == expert).sum()) for expert in range(EXPERTS)])


def per_micro_batch(logits: torch.Tensor, size: int) -> float:
    """transformers' loss of each micro-batch and layer, and their mean."""
    losses = [balancing_loss(rows.reshape(-1, EXPERTS)) for layer in logits for rows in layer.split(size)]
    return float(torch.stack(losses).mean())


def over_the_global_batch(logits: torch.Tensor, size: int) -> float:
    """E x sum of f x P (Qiu et al. 2025, arXiv 2501.11873): f over all micro-batches so far, P of the newest.

    Args:
        logits: [layers, rows, s, experts].
        size: rows that all data-parallel ranks compute at once.
    """
    losses = []
    for layer in logits:
        seen = torch.zeros(EXPERTS)
        for number, rows in enumerate(layer.split(size), 1):
            seen += counts_of(rows)
            tokens = rows.shape[0] * LENGTH
            shares = seen / number / (tokens * CHOSEN)
            probabilities = rows.reshape(-1, EXPERTS).softmax(dim=-1).mean(dim=0)
            losses.append(EXPERTS * (shares * probabilities).sum())
    return float(torch.stack(losses).mean())


LAYOUTS = {"one rank": (1, {}), "DP2": (2, {}), "EP2": (2, EP2), "CP2": (2, CP2)}
CASES = [("aux_loss", "one rank"), ("aux_loss", "EP2"), ("seq_aux_loss", "CP2"), ("global_aux_loss", "DP2")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_balance_and_busiest_expert(kind, name, pool, starts, documents, logits, tmp_path):
    size, layout = LAYOUTS[name]
    replicas = 2 if name in ("DP2", "EP2") else 1
    expected = {
        "aux_loss": lambda step: per_micro_batch(step, MICRO_BATCH),
        "seq_aux_loss": lambda step: per_micro_batch(step, 1),
        "global_aux_loss": lambda step: over_the_global_batch(step, replicas * MICRO_BATCH),
    }[kind]
    model = {"moe_router_load_balancing_type": kind}
    found = reported(pool, size, documents, starts["tiny_moe"], tmp_path, model=model, parallel=layout)
    for extra, step in zip(found, logits, strict=True):
        assert extra["load_balancing_loss"] == pytest.approx(expected(step), rel=1e-5)
        busiest = max(float(counts_of(layer).max()) for layer in step) / (BATCH * LENGTH * CHOSEN)
        assert extra["busiest_expert_share"] == pytest.approx(busiest, rel=1e-12)


def test_the_kinds_are_different_numbers(logits):
    """The control: on this batch a test that mixes two of them up fails."""
    found = [
        per_micro_batch(logits[0], MICRO_BATCH),
        per_micro_batch(logits[0], 1),
        over_the_global_batch(logits[0], MICRO_BATCH),
        over_the_global_batch(logits[0], 2 * MICRO_BATCH),
        per_micro_batch(logits[1], MICRO_BATCH),
    ]
    for index, one in enumerate(found):
        assert all(abs(one - other) > 1e-4 for other in found[index + 1 :])


def test_a_stage_with_another_micro_batch(pool, starts, documents, logits, tmp_path):
    """A stage may set micro_batch_size: the mean is over the micro-batches that were computed."""
    stage = {"name": "one", "weights": {"data": 1}, "micro_batch_size": 4}
    blend = {"sources": {"data": {"path": str(documents.prefix)}}, "stages": [stage]}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    data = {"path": None, "blend": str(tmp_path / "blend.yaml")}
    found = reported(pool, 1, documents, starts["tiny_moe"], tmp_path / "run", data=data)
    for extra, step in zip(found, logits, strict=True):
        assert extra["load_balancing_loss"] == pytest.approx(per_micro_batch(step, 4), rel=1e-5)


def test_even_load_is_1_and_the_worst_is_experts_over_chosen():
    """The scale of the figure: all tokens to the same two of four experts cost 4 / 2, not 4."""
    assert float(balancing_loss(torch.eye(4).repeat(16, 1) * 1e-3)) == pytest.approx(1, rel=1e-3)
    worst = torch.tensor([[50.0, 49.0, 0.0, 0.0]]).expand(8, 4)
    assert float(balancing_loss(worst)) == pytest.approx(EXPERTS / CHOSEN)
