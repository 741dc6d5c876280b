"""The cells of a study: legal runs, with stems under wsd, of any kind of model."""

import pytest

from launch.sweeps.cells import cells, place, shapes
from launch.sweeps.plan import make_plan
from megatron_qwen.config.checks import problems
from tests.launch.sweeps.study_files import CLUSTER, study


def test_horizons_share_a_stem(tmp_path):
    """Every branch decays from its own point of one constant run, and the whole is cheaper than a run a horizon."""
    plan = make_plan(study(tmp_path))
    for stem in plan.stems:
        assert len(stem.branches) == 3
        assert stem.iterations == max(cell.branch_point for cell in stem.branches)
        for cell in stem.branches:
            assert cell.decay == pytest.approx(0.2 * cell.iterations, abs=1)
            assert cell.tokens == pytest.approx(cell.placed.shape.params * [10, 20, 40][cell.horizon], rel=0.05)
    cosine = make_plan(study(tmp_path, schedule="cosine"))
    assert not cosine.stems
    # 10 + 20 + 40 against 0.8 x 40 + 0.2 x 70.
    assert plan.device_hours / cosine.device_hours == pytest.approx(46 / 70, rel=0.02)


def test_cells_are_legal_runs(tmp_path):
    for content in ({}, CLUSTER):
        plan = make_plan(study(tmp_path, **content))
        for cell in plan.cells[::17]:
            config = cell.config()
            assert not list(problems(config, world_size=plan.study.device.count))
            assert config.training.train_iters == cell.iterations
            assert config.optim.lr_wsd_decay_iters == cell.decay


def test_mixtures_have_their_counts(tmp_path):
    content = study(tmp_path, recipe="tiny_moe", batch_tokens={"values": [2048]})
    rungs = shapes(content)
    assert all(shape.total > shape.params and shape.granularity for shape in rungs)
    found = list(cells(content, [place(content, shape, 2048) for shape in rungs]))
    assert len(found) == 4 * 3 * 5 * 2


def test_models_by_hand(tmp_path):
    models = [{"num_layers": 2}, {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}]
    plan = make_plan(study(tmp_path, shapes={"models": models}))
    assert {cell.placed.shape.model.num_layers for cell in plan.cells} == {2, 4}
