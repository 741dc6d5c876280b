"""A submission that Slurm does not take, or of which nobody knows: no second job, and none is forgotten."""

import json
import resource
import subprocess

import pytest

from launch import by_hand, command, orphans, run_jobs, submission, submit
from launch import request as requests
from launch.quarantined import ToAvoid
from launch.refusals import may_have_taken, refuses_nodes
from launch.submission import script, slurm_parameters
from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.rundir import RunDirectory, RunState
from megatron_qwen.slurm import SlurmError

BATCH = "sbatch: error: Batch job submission failed: "
NODES, LOST, DENIED = (
    "Requested node configuration is not available",
    "Socket timed out on send/recv operation",
    "Invalid account or account/partition combination specified",
)
AVOID = ToAvoid(("n2",), ("avoids n2",))


def refusal(words: str) -> SlurmError:
    return SlurmError(Problem("sbatch", None, BATCH + words))


@pytest.mark.parametrize(
    ("words", "of_nodes", "unknown"),
    [
        (NODES, True, False),
        ("Node count specification invalid", True, False),
        ("Required node not available (down, drained or reserved)", True, False),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", True, False),
        (LOST, False, True),
        ("Unable to contact slurm controller (connect failure)", False, True),
        ("Zero Bytes were transmitted or received", False, True),
        ("Connection reset by peer", False, True),
        (DENIED, False, False),
        ("Access/permission denied", False, False),
    ],
)
def test_what_the_words_say(words, of_nodes, unknown):
    assert (refuses_nodes(refusal(words)), may_have_taken(refusal(words))) == (of_nodes, unknown)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A frozen run that had stopped, on a cluster with a node in quarantine."""
    directory = RunDirectory(tmp_path / "run")
    directory.submission.mkdir(parents=True)
    directory.write_status(RunState.STOPPED)
    monkeypatch.setattr(submit, "to_avoid", lambda _: AVOID)
    return directory


def request_of(directory, **facts):
    words = {"nodes": 1, "cluster": "cpu", "name": directory.path.name, "run_dir": directory.path, **facts}
    return requests.make("tiny_dense", [], **words)


def answers(monkeypatch, *said):
    """sbatch says these one after another; what it was asked for."""
    waiting, asked = list(said), []

    def sbatch(_, *, after=(), exclude=()):
        asked.append((tuple(after), tuple(exclude)))
        if isinstance(answer := waiting.pop(0), SlurmError):
            raise answer
        return answer

    monkeypatch.setattr(submission, "submit", sbatch)
    return asked


def test_a_refusal_of_the_nodes_is_tried_without_the_quarantine(run, monkeypatch):
    asked, said = answers(monkeypatch, refusal(NODES), "8", "9"), []
    assert submit.hand_over(request_of(run, chain=2), run, forgive=False, say=said.append) == ["8", "9"]
    assert asked == [((), ("n2",)), ((), ()), (("8",), ())]
    assert said[0].startswith("nodes in quarantine are not avoided, Slurm refuses the job then (sbatch: ")
    assert json.loads(run.jobs.read_text())["exclude"] == []
    assert not run.submitting.exists()


def test_any_other_refusal_is_final(run, monkeypatch):
    asked = answers(monkeypatch, refusal(DENIED))
    with pytest.raises(SlurmError, match="Invalid account"):
        submit.hand_over(request_of(run), run, forgive=False)
    assert len(asked) == 1
    assert run.state() is RunState.STOPPED
    assert not run.submitting.exists()


def test_a_job_that_slurm_may_have_is_looked_for(run, monkeypatch):
    asked = answers(monkeypatch, refusal(LOST))
    with pytest.raises(SlurmError, match=r"timed out .* Whether Slurm has the job is not known; `mq launch status /"):
        submit.hand_over(request_of(run), run, forgive=False)
    assert len(asked) == 1, "another one would be a second job"
    assert run.state() is RunState.QUEUED, "a job that finds its run stopped would leave"
    monkeypatch.setattr(slurm, "named", lambda name, *, user: queued("8", "PENDING"))
    monkeypatch.setattr(slurm, "show_job", lambda _: {"Command": f"{run.submission}/.submission_file_8.sh"})
    assert orphans.settle(run) == ["8"]
    assert run_jobs.submissions(run)[-1].jobs == ("8",)


@pytest.mark.parametrize(("words", "cancelled"), [(DENIED, [("scancel", "8")]), (LOST, [])])
def test_a_chain_that_breaks_off(run, monkeypatch, words, cancelled):
    """Where nobody knows of the second job, the first one stays too: both are found."""
    asked = []
    answers(monkeypatch, "8", refusal(words))
    monkeypatch.setattr(slurm, "ask", lambda *command: asked.append(command) or "")
    with pytest.raises(SlurmError):
        submit.hand_over(request_of(run, chain=2), run, forgive=False)
    assert asked == cancelled
    assert run.submitting.exists() is not bool(cancelled)


class Array:
    """Runs of an array, each with a directory; ``send`` submits them when everything is checked and frozen."""

    def __init__(self, root, monkeypatch, *said, names=("a", "b")) -> None:
        self.directories = [RunDirectory(root / name) for name in names]
        for directory in self.directories:
            directory.submission.mkdir(parents=True)
        self.requests = [request_of(directory) for directory in self.directories]
        self.asked, self.queue, waiting = [], {}, list(said)

        def sbatch(_requests, folder, *, at_once, name, after=(), exclude=()):
            self.asked.append((folder.parent.name, tuple(after), tuple(exclude)))
            assert all(directory.submitting.is_file() for directory in self.directories)
            if isinstance(answer := waiting.pop(0), SlurmError):
                raise answer
            return answer

        monkeypatch.setattr(submission, "submit_array", sbatch)
        monkeypatch.setattr(submit, "array_limit", lambda _: [])
        monkeypatch.setattr(submit, "check", lambda *_, **__: submit.Preflight((), None, None))
        monkeypatch.setattr(submit, "_prepare", lambda *_, **__: [])
        monkeypatch.setattr(submit, "to_avoid", lambda _: AVOID)
        monkeypatch.setattr(run_jobs, "known", lambda _: self.queue)

    def send(self):
        return submit.submit_array(self.requests, at_once=2, name="study")


def test_an_array_that_slurm_refuses_for_the_nodes(tmp_path, monkeypatch):
    array = Array(tmp_path, monkeypatch, refusal(NODES), ["8_0", "8_1"])
    submitted = array.send()
    assert [one.jobs for one in submitted] == [("8_0",), ("8_1",)]
    assert "Slurm refuses the job then" in submitted[0].notes[0]
    assert array.asked == [("a", (), ("n2",)), ("a", (), ())]
    assert not any(directory.submitting.exists() for directory in array.directories)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}, "and no lock is left"


def test_an_array_that_slurm_may_have(tmp_path, monkeypatch):
    array = Array(tmp_path, monkeypatch, refusal(LOST))
    with pytest.raises(SlurmError, match="not known"):
        array.send()
    entries = [json.loads(directory.submitting.read_text()) for directory in array.directories]
    assert [(entry["name"], entry["index"]) for entry in entries] == [("study", 0), ("study", 1)]
    assert [directory.state() for directory in array.directories] == [RunState.QUEUED] * 2


def test_an_array_waits_for_jobs_that_still_save(tmp_path, monkeypatch):
    array = Array(tmp_path, monkeypatch, ["8_0", "8_1"])
    run = array.directories[1]
    run.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    run.write_status(RunState.CANCELLED, jobs=["7"])
    array.queue |= queued("7", "COMPLETING")
    array.send()
    assert array.asked == [("a", ("7",), ("n2",))]


def test_an_array_of_more_runs_than_files_may_be_open(tmp_path, monkeypatch):
    """Each is locked until Slurm has answered."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = [f"r{number}" for number in range(90)]
    array = Array(tmp_path, monkeypatch, [f"8_{index}" for index in range(90)], names=names)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 80), before[1]))
        assert [one.jobs for one in array.send()][-1] == ("8_89",)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_array_takes_no_run_from_a_person(tmp_path, monkeypatch):
    array = Array(tmp_path, monkeypatch)
    monkeypatch.setattr(
        by_hand, "place", lambda directory, **_: "process 5 here" if directory.path.name == "b" else None
    )
    with pytest.raises(ConfigError, match=f"{tmp_path}/b: is running already: it is being trained by hand"):
        array.send()
    monkeypatch.setattr(by_hand, "place", lambda *_, **__: None)
    with submit.alone(array.directories[0].path), pytest.raises(ConfigError, match="by another command"):
        array.send()


def run_lines(lines, **environment):
    """What bash does with them: what starts in place of the job, or that its pickle is read."""
    begin = 'sleep() { :; }; python() { echo "$PYTHONPATH" "$@"; }'
    text = "\n".join([begin, *lines, "echo the pickle"])
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True).stdout


def test_a_task_without_its_pickle_starts_its_own_run(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "_python", lambda: "python -P")
    array = Array(tmp_path, monkeypatch)
    folder = array.directories[0].submission
    lines = slurm_parameters(array.requests[0], at_once=2, tasks=array.requests)["setup"]
    begin = next(index for index, line in enumerate(lines) if "_submitted.pkl" in line)
    said = run_lines(lines[begin:], SLURM_ARRAY_JOB_ID="8", SLURM_ARRAY_TASK_ID="1")
    b = array.directories[1]
    assert said == f"{b.code} -P -u -m megatron_qwen.job.call {b.path} 2\n"
    (folder / "8_1_submitted.pkl").touch()
    assert run_lines(lines[begin:], SLURM_ARRAY_JOB_ID="8", SLURM_ARRAY_TASK_ID="1") == "the pickle\n"
    assert "case $SLURM_ARRAY_TASK_ID" not in script(array.requests[0])


@pytest.fixture
def sbatch_job(run, monkeypatch):
    """Runs the first command of slurm/train.sbatch, as job 30; Slurm's jobs."""
    queue = {}
    monkeypatch.setattr(slurm, "is_there", lambda: True)
    monkeypatch.setattr(run_jobs, "known", lambda _: queue)
    monkeypatch.setattr(command, "check", lambda *_, **__: submit.Preflight((), None, None))
    monkeypatch.setattr(command, "freeze", lambda *_, **__: ["frozen"])
    monkeypatch.setenv("SLURM_JOB_ID", "30")
    words = ["freeze", "tiny_dense", "--run-dir", str(run.path), "--cluster", "cpu"]
    return queue, lambda: command.main(words)


def queued(job, state):
    return {job: slurm.QueuedJob(job, state, "None", "1:00", "9:00", "n1", "now", "run", "100")}


def test_a_job_of_train_sbatch_takes_no_run_from_another(run, sbatch_job, monkeypatch):
    queue, freeze = sbatch_job
    run.jobs.write_text(json.dumps({"jobs": ["7"], "scheduler": "slurm", "cluster": "cpu", "nodes": 1}) + "\n")
    run.write_status(RunState.CANCELLED, jobs=["7"])
    queue |= queued("7", "COMPLETING")
    with pytest.raises(ConfigError, match="has job 7, which still saves"):
        freeze()
    queue.clear()
    monkeypatch.setattr(by_hand, "place", lambda *_, **__: "process 5 here")
    with pytest.raises(ConfigError, match="is being trained by hand, as process 5 here"):
        freeze()
    monkeypatch.setattr(by_hand, "place", lambda *_, **__: None)
    entry = {"time": "2026-01-01T00:00:00+00:00", "scheduler": "slurm", "cluster": "cpu", "nodes": 1, "host": "other"}
    orphans.announce(run, entry, name="run", folder=run.submission, index=None)
    queue |= queued("9", "PENDING")
    monkeypatch.setattr(slurm, "named", lambda name, *, user: queue)
    monkeypatch.setattr(slurm, "show_job", lambda job: {"Command": f"{run.submission}/.submission_file_{job}.sh"})
    with pytest.raises(ConfigError, match="is already in progress as job 9"):
        freeze()
    assert run.state() is RunState.CANCELLED
    queue.clear()
    assert freeze() == 0
    assert run_jobs.submissions(run)[-1].jobs == ("30",)
    queue |= queued("30", "RUNNING")
    assert freeze() == 0, "its own job, at its next start"
