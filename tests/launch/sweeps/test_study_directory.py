"""A study's directory: its notes of arrays, and where its branches begin."""

import re
import shutil

import yaml

from launch.sweeps.plan import document, make_plan, write
from launch.sweeps.plan_file import read_plan
from launch.sweeps.study import read_study
from launch.sweeps.study_directory import StudyDirectory
from tests.launch.sweeps.study_files import SMALL


def test_a_torn_note_of_an_array_loses_no_other(study):
    first, second, third = study.all_runs(study.plan())
    one = study.note_array([first])
    with study.arrays_jsonl.open("a") as file:
        file.write('{"name": "forty')  # a full disk
    two, three = study.note_array([second]), study.note_array([third])
    assert len({one, two, three}) == 3
    assert study.arrays() == {one: [first.name], two: [second.name], three: [third.name]}


def test_an_array_has_a_name_that_lists_can_hold(tmp_path):
    name = StudyDirectory(tmp_path / "a|b c").note_array([]) if (tmp_path / "a|b c").mkdir() is None else ""
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def test_a_branch_begins_a_step_late_where_its_stem_was_saved_late(tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(SMALL | {"schedule": "wsd", "learning_rate": {"values": [1e-3]}, "decay_share": 0.5})
    )
    write(tmp_path / "plan.yaml", document(make_plan(read_study(tmp_path / "study.yaml"))))
    study = StudyDirectory(tmp_path / "study")
    study.claim(read_plan(tmp_path / "plan.yaml"))
    stem, branch = study.all_runs(study.plan())
    assert (branch.begins, branch.iterations) == (10, 20)
    checkpoints = study.runs / stem.name / "checkpoints"

    def saved(*iterations):
        shutil.rmtree(checkpoints, ignore_errors=True)
        for iteration in iterations:
            (checkpoints / f"iter_{iteration:07d}").mkdir(parents=True)
        return study.branching_point(branch)

    assert saved() is None
    assert saved(9, 12) is None  # too late
    assert saved(9, 10, 11)[0] == 10
    assert saved(9, 11, 12)[0] == 11
    words = study.overrides(branch)
    assert f"checkpoint.branch_from={checkpoints}/iter_0000011" in words
    assert "optim.lr_wsd_decay_iters=9" in words
