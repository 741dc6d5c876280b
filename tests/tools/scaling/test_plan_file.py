"""Plans read back: as they were written, and edited by hand into what cannot run."""

import copy

import pytest
import yaml

from megatron_qwen.errors import ConfigError
from tests.tools.scaling.test_plan import STUDY
from tools.scaling.plan import document, make_plan, write
from tools.scaling.plan_file import observe, read_plan
from tools.scaling.study import read_study


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A plan's mapping."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return document(make_plan(read_study(folder / "study.yaml")))


def saved(tmp_path, content):
    path = tmp_path / "plan.yaml"
    write(path, content)
    return path


def test_comes_back_as_it_was(content, tmp_path):
    assert read_plan(saved(tmp_path, content)).content == content


def test_runs_that_never_began_are_unfinished(content, tmp_path):
    observations, outcomes = observe(read_plan(saved(tmp_path, content)), tmp_path / "runs")
    assert len(observations) == len(content["cells"]) == len(outcomes)
    assert {one.status for one in observations} == {"unfinished"}
    cell, first = content["cells"][0], observations[0]
    assert first.batch_tokens * cell["iterations"] == cell["tokens"]


def wrong(content):
    """Everything that may be wrong with a plan, and how it is said."""

    def edit(change):
        copied = copy.deepcopy(content)
        change(copied)
        return copied

    def to(part, number, **fields):
        return lambda plan: plan[part][number].update(fields)

    yield edit(to("cells", 0, name="../../x")), "cells[0].name"
    yield edit(to("cells", 0, iterations="many")), "cells[0].iterations"
    yield edit(to("cells", 0, learning_rate=None)), "cells[0].learning_rate"
    yield edit(to("cells", 0, model="other")), "is none of its models"
    yield edit(to("cells", 0, stem="other")), "is none of its stems"
    yield edit(to("cells", 1, name=content["cells"][0]["name"])), "is the name of several runs"
    yield edit(lambda plan: plan["cells"][0].pop("from")), "cells[0].from: must be given"
    yield edit(lambda plan: plan["cells"][0].pop("seed")), "cells[0].seed: must be given"
    yield edit(lambda plan: plan.pop("recipe")), "recipe"
    yield edit(lambda plan: plan.update(models={})), "models = {}: must be list of a mapping with name"
    yield edit(lambda plan: plan.update(name="a/b")), "name = 'a/b': must be letters"
    yield edit(lambda plan: plan.update(format=99)), "is no plan"
    yield edit(to("stems", 0, save_at="x")), "stems[0].save_at"


def test_edited_into_what_cannot_run(content, tmp_path):
    for broken, said in wrong(content):
        with pytest.raises(ConfigError) as caught:
            read_plan(saved(tmp_path, broken))
        assert said in str(caught.value), said


def test_settings_that_are_nearly_equal_are_refused(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"learning_rate": {"values": [0.001, 0.0010001]}}))
    with pytest.raises(ConfigError, match="nearly equal"):
        make_plan(read_study(tmp_path / "study.yaml"))
