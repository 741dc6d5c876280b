"""An adaptive study on this machine: its second round is planned, run and fitted by one command."""

import yaml

from tests.conftest import run
from tests.launch.sweeps.test_controller import FAST, rows, write_study


def test_a_grid_that_ends_too_low_is_widened_and_run(tokens, tmp_path):
    plan = write_study(
        tmp_path, tokens, learning_rate={"values": [1e-5, 2e-5]}, horizons={"tokens": [5120]}, schedule="cosine",
        adaptive_rounds=1,
    )  # fmt: skip
    study = tmp_path / "small"
    done = run("launch.sweep", "submit", plan, "--study", study, *FAST, check=True, timeout_s=200)
    assert "round 1: l2_h64_f128: best learning rate at the upper end" in done.stdout
    added = yaml.safe_load((study / "round1.yaml").read_text())
    assert [cell["learning_rate"] for cell in added["cells"]] == [4e-5]
    found = rows(study)
    assert len(found) == 3
    assert {row[2] for row in found.values()} == {"done"}
    # At its end it has no more rounds: nothing is added, nothing runs again.
    again = run("launch.sweep", "resume", study, *FAST, check=True, timeout_s=100)
    assert "submitted as job" not in again.stdout
    assert not (study / "round2.yaml").exists()
    run("launch.sweep", "report", study, check=True)
    assert added["cells"][0]["name"] in (study / "report.html").read_text()
