"""A study that was claimed, of three runs of which none has begun."""

import pytest
import yaml

from launch.sweeps.plan import document, make_plan, write
from launch.sweeps.plan_file import read_plan
from launch.sweeps.study import read_study
from launch.sweeps.study_directory import StudyDirectory
from tests.launch.sweeps.study_files import SMALL


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    write(tmp_path / "plan.yaml", document(make_plan(read_study(tmp_path / "study.yaml"))))
    found = StudyDirectory(tmp_path / "study")
    found.claim(read_plan(tmp_path / "plan.yaml"))
    return found
