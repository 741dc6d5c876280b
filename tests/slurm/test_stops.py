"""Where starting again would not help, a run stops: exit 93, the last good checkpoint named, no requeue loop."""

from tests.slurm.runs import SAVE_INTERVAL, TP2


def job_exit_code(run) -> int:
    """What Slurm says the job ended with."""
    shown = run.cluster.ask("scontrol", "show", "job", "-o", run.job)
    return int(shown.partition(" ExitCode=")[2].partition(":")[0])


def stopped(run) -> str:
    """The run has stopped, its job with 93, and nothing waits in the queue; returns what the controllers said."""
    run.wait_for_end("stopped")
    run.wait(lambda: not run.cluster.ask("squeue", "-h"), "end of the job", timeout_s=30)
    assert job_exit_code(run) == 93
    return run.end_of_story()


def test_numbers_that_are_not_finite(runs):
    patch = (
        "if iteration >= 20: self.components.model.modules[0].decoder.final_layernorm.weight.data.fill_(float('nan'))"
    )
    # A weight that changes without an update is another fault: silent corruption.
    run = runs.submit("nan", "resilience.weight_check_interval=0", patch=patch, nodes=1)
    text = stopped(run)
    (attempt,) = run.attempts()
    assert (attempt.reason, attempt.action) == ("numerics", "stop")
    assert f"iter_{SAVE_INTERVAL * 2 - 10:07d}" in text, "the last good checkpoint is named"
    assert "mq launch requeue" in text
    shown = runs.mq("status", run.path)
    assert "stopped" in shown
    assert "numerics" in shown


def test_a_configuration_that_is_wrong_on_the_node(runs):
    runs.mq("freeze", *runs.words(*TP2), "--cluster", runs.cluster_file(), "--nodes", 2, "--name", "wrong")
    run_yaml = runs.root / "wrong/run.yaml"
    code = runs.root / "wrong/code/megatron_qwen/train.py"
    text = code.read_text()
    assert "require_legal(config, world_size=info.world_size)" in text
    code.write_text(text.replace("world_size=info.world_size)", "world_size=3)"))
    run = runs.submit("wrong", *TP2)
    stopped(run)
    (attempt,) = run.attempts()
    assert (attempt.reason, attempt.exit_code, attempt.action) == ("configuration", 93, "stop")
    assert "must be divisible by TP x PP x CP = 2" in attempt.detail
    assert run_yaml.is_file()


def test_a_run_yaml_that_cannot_be_read(runs):
    runs.mq("freeze", *runs.words(), "--cluster", runs.cluster_file(), "--nodes", 1, "--name", "unreadable")
    code = runs.root / "unreadable/code/megatron_qwen/job/settings.py"
    code.write_text(code.read_text().replace('NAME = "job.json"', 'NAME = "gone.json"'))
    run = runs.submit("unreadable", nodes=1)
    assert "gone.json" in stopped(run)
    assert run.attempts() == []


def test_the_same_exception_twice(runs):
    patch = "if iteration == 25 and os.environ['SLURM_PROCID'] == '1': raise ValueError('the data of step 25 is odd')"
    run = runs.submit("twice_the_same", *TP2, patch=patch)
    text = stopped(run)
    first, second = run.attempts()
    assert (first.reason, first.action) == ("error", "restart")
    assert (second.reason, second.action) == ("error", "stop")
    assert first.error == second.error
    assert first.iteration == second.iteration == 24
    assert "rank 1 on n2: ValueError: the data of step 25 is odd" in first.detail
    assert "the same error occurred twice at the same iteration" in text
    assert "iter_0000020" in text


def test_an_unhealthy_node_is_avoided(runs):
    """The health check fails on one node; the job starts again on others."""
    runs.mq("freeze", *runs.words(*TP2), "--cluster", runs.cluster_file(), "--nodes", 2, "--name", "sick")
    script = runs.root / "sick/code/slurm/healthcheck.sh"
    lines = script.read_text().splitlines()
    index = next(index for index, line in enumerate(lines) if line.startswith("wrong=()"))
    lines.insert(index + 1, '[ "$node" != n1 ] || wrong+=("GPU 3 has 2 uncorrected ECC errors")')
    script.write_text("\n".join(lines) + "\n")
    run = runs.submit("sick", *TP2)
    run.wait_for_end()
    first, second = run.attempts()
    assert (first.reason, first.failed_nodes) == ("unhealthy node", ("n1",))
    assert "n1: GPU 3 has 2 uncorrected ECC errors" in first.detail
    assert "n1" not in second.nodes
    assert run.hashes() == runs.undisturbed(2, *TP2)
