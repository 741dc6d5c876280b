"""Every command of docs/scaling_laws.md runs, on the study and the data that the page speaks of."""

import re
import shlex
import shutil
from pathlib import Path

from launch.sweep import main

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "scaling_laws.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "tools" / "scaling" / "published", tmp_path / "published")
    (study,) = re.findall(r"```yaml\n(# study.yaml.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "study.yaml").write_text(study)
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 5
    for line in COMMANDS:
        program, action, *words = shlex.split(line)
        assert (program, action) == ("mq", "sweep"), line
        assert main(words) == 0, line
    for name in ("study.plan.yaml", "step_law.json", "chinchilla.json", "run.yaml", "budget.yaml"):
        assert (tmp_path / name).is_file(), name
