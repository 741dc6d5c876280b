"""Plans read back: as they were written, and edited by hand into what cannot run."""

import copy

import pytest
import yaml

from launch.sweeps.plan import document, make_plan, write
from launch.sweeps.plan_file import read_plan
from launch.sweeps.study import read_study
from megatron_qwen.errors import ConfigError
from tests.launch.sweeps.study_files import STUDY


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
    yield edit(to("cells", 0, model="other")), "is not a model of the plan"
    yield edit(to("cells", 0, stem="other")), "is not a stem of the plan"
    yield edit(to("cells", 1, name=content["cells"][0]["name"])), "is the name of several runs"
    yield edit(lambda plan: plan["cells"][0].pop("from")), "cells[0].from: must be given"
    yield edit(lambda plan: plan["cells"][0].pop("seed")), "cells[0].seed: is required"
    yield edit(lambda plan: plan.pop("recipe")), "recipe"
    yield edit(lambda plan: plan.update(models={})), "models = {}: must be list of a mapping with name"
    yield edit(lambda plan: plan.update(name="a/b")), "name = 'a/b': must be letters"
    yield edit(lambda plan: plan.update(format=99)), "is not a plan"
    yield edit(to("stems", 0, save_at="x")), "stems[0].save_at"


def test_edited_into_what_cannot_run(content, tmp_path):
    for broken, said in wrong(content):
        with pytest.raises(ConfigError) as caught:
            read_plan(saved(tmp_path, broken))
        assert said in str(caught.value), said
