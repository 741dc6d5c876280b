"""``mq launch nodes``, as a person and a script use it. What jobs do with it: tests/slurm/test_faults.py."""

import json
from datetime import timedelta

import pytest

from launch.command import main
from megatron_qwen.errors import ConfigError, UserError
from megatron_qwen.resilience.quarantine import Quarantine, QuarantineEvidence, moment_of


@pytest.fixture
def do(tmp_path, capsys, monkeypatch):
    """Runs the command on a run root; returns exit code, stdout and stderr."""
    monkeypatch.setattr("launch.nodes.slurm.is_there", lambda: False)

    def command(*words: object) -> tuple[int, str, str]:
        code = main(["nodes", "--run-root", str(tmp_path), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_nodes_come_and_go(do, tmp_path):
    assert do() == (0, f"no node is in quarantine ({tmp_path}/.quarantine)\n", "")
    assert json.loads(do("--json")[1]) == []
    code, said, _ = do("--add", "n[3-4],n9", "--hours", 48, "--why", "link errors")
    assert (code, said.count("is in quarantine until")) == (0, 3)
    failure = QuarantineEvidence(
        f"{tmp_path}/7b", 2, "lost peer", "rank 8 on n5 was killed", "2026-01-01T00:00:00+00:00"
    )
    store = Quarantine(tmp_path / ".quarantine")
    store.put("n5", hours=24, by="controller", why="n5 has failed 2 times", evidence=[failure])
    rows = json.loads(do("--json")[1])
    assert rows[0]["node"] == "n5"
    assert (rows[0]["by"], rows[0]["runs"], rows[0]["evidence"][0]["attempt"]) == ("controller", [f"{tmp_path}/7b"], 2)
    table = do()[1]
    assert "n3    20" in table
    assert "48 h 00 min" in table or "47 h 59 min" in table
    assert f"n5: 2026-01-01T00:00:00+00:00 attempt 2 of {tmp_path}/7b: lost peer, rank 8 on n5 was killed" in table
    code, said, _ = do("--lift", "n3,n[5,9]")
    assert (code, said.count("is free again")) == (0, 3)
    assert [row["node"] for row in json.loads(do("--json")[1])] == ["n4"]


def test_a_damaged_file_is_told(do, tmp_path):
    do("--add", "n3", "--why", "x")
    (tmp_path / ".quarantine/n4.json").write_text("{")
    code, said, error = do("--json")
    assert (code, len(json.loads(said))) == (0, 1)
    assert "n4.json cannot be read and is ignored" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--add", "n3"], "--why: is required"),
        (["--add", "n3", "--why", " "], "--why"),
        (["--add", "n3", "--why", "a\nb"], "U[+]000A"),
        (["--add", "n3", "--why", "x", "--hours", "0"], "--hours = 0.0: must be above 0"),
        (["--add", "n3", "--why", "x", "--hours", "nan"], "--hours = nan"),
        (["--add", "n3", "--why", "x", "--hours", "1e300"], "--hours"),
        (["--hours", "4"], "--hours = 4.0: requires --add"),
        (["--lift", "n3", "--why", "x"], "--why = x: requires --add or --drain"),
        (["--lift", "n3"], "--lift = n3: is not in quarantine; these are: none"),
        (["--add", "../n3", "--why", "x"], "'../n3': is no name of a node"),
        (["--add", "n[3-", "--why", "x"], "is no name of a node"),
        (["--add", "n[a-b]", "--why", "x"], "is no name of a node"),
        (["--add", "", "--why", "x"], "is no name of a node"),
    ],
)
def test_wrong_input(do, words, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        do(*words)
    assert not (tmp_path / ".quarantine").exists()


def test_all_is_said_before_anything_is_lifted(do):
    do("--add", "n3", "--why", "x")
    with pytest.raises(ConfigError) as caught:
        do("--lift", "n3,n4,n5")
    assert len(caught.value.problems) == 2
    assert [row["node"] for row in json.loads(do("--json")[1])] == ["n3"]


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        ('echo "$@" >$CALLS', 0, "n3 is drained"),
        (
            "echo 'slurm_update error: Invalid user id' >&2; exit 1",
            1,
            "needs the rights of an operator. Ask one to run:",
        ),
        ("echo 'slurm_update error: Invalid node name specified' >&2; exit 1", 1, "Invalid node name"),
    ],
)
def test_draining(do, tmp_path, monkeypatch, answer, code, told):
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    do("--add", "n3", "--why", "link errors")
    if not code:
        assert told in do("--drain", "n3")[1]
        assert (tmp_path / "calls").read_text() == "update NodeName=n3 State=DRAIN Reason=mq: link errors\n"
        return
    with pytest.raises(UserError, match=told) as caught:
        do("--drain", "n3")
    assert caught.value.exit_code == code
    assert "scontrol update NodeName=n3 State=DRAIN 'Reason=mq: link errors'" in str(caught.value) or "name" in told


def test_the_run_root_of_a_cluster_file(do, tmp_path, capsys):
    file = tmp_path / "ours.yaml"
    file.write_text(f"gpus_per_node: 0\nrun_root: {tmp_path}/deep\nquarantine_hours: 2\n")
    assert main(["nodes", "--cluster", str(file), "--add", "n3", "--why", "x"]) == 0
    capsys.readouterr()
    (entry,) = Quarantine(tmp_path / "deep/.quarantine").in_force()
    assert moment_of(entry.until) - moment_of(entry.since) == timedelta(hours=2)
    assert main(["nodes", "--cluster", str(file)]) == 0
    assert entry.until in capsys.readouterr().out
