"""A run without a committed checkpoint loses only what came after its last local one, on real nodes."""

from tests.slurm.runs import PAUSE, TP2, Runs, lost_iterations

INTERVAL = 5
# Faults come some steps after a local checkpoint, and the second after many more steps of its attempt than the first:
# the same number would speak against the program.
FIRST, SECOND = 18, 44


def test_a_killed_rank_and_then_a_lost_node(runs: Runs, tmp_path):
    """Slurm avoids the node after its second failure, so what it has is lost as well."""
    patch = f"""
{PAUSE}
import shutil
if os.environ["SLURM_PROCID"] == "1" and (attempt, iteration) in (("1", {FIRST}), ("2", {SECOND})):
    if attempt == "2":
        shutil.rmtree("{tmp_path}/" + os.environ["SLURMD_NODENAME"], ignore_errors=True)
    os.kill(os.getpid(), 9)
"""
    words = (f"checkpoint.local_interval={INTERVAL}", f"checkpoint.local_dir={tmp_path}/%n")
    run = runs.submit("local", *TP2, *words, "checkpoint.save_interval=0", options=("--spares", 1), patch=patch)
    run.wait_for_end(timeout_s=150)
    first, second, third = run.attempts()
    assert [attempt.reason for attempt in (first, second, third)] == ["lost peer", "lost peer", "finished"], run.story()
    assert "n2" not in third.nodes
    assert run.hashes() == runs.undisturbed(2, *TP2)
    # A fault may come while the newest is being written.
    assert lost_iterations(run.path) <= 2 * INTERVAL
    logs = "".join(path.read_text() for path in run.path.glob("logs/attempt_*/rank_0.log"))
    assert logs.count("resumed from a local checkpoint") == 2
    assert "1 of 2 pieces from other nodes" in logs
    left = [path for node in third.nodes for path in (tmp_path / node).rglob("*.safetensors")]
    assert left == [], "a run that is done leaves nothing on its nodes"
