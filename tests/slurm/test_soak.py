"""Twenty minutes of faults of every kind, drawn at random, on a run of eight ranks on four nodes: nobody acts."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_qwen.estimate.save_interval import lost_share
from megatron_qwen.files import is_temporary
from megatron_qwen.metrics.performance_card import goodput, read_attempts
from tests.slurm.failing_disk import Disk
from tests.slurm.runs import SAVE_INTERVAL, TP2, ClusterRun, Runs, kill
from tests.slurm.test_killed import batch_script, stepd_of_the_batch_script
from tests.slurm.test_storage_faults import run_on_a_disk_of_its_own
from tests.tiers import cases

STEPS = 450
PAUSE_S = 0.6
MINUTES = 20
# A step that also looks for the file that asks its rank to flip a bit of its weights.
PATCH = """
time.sleep({pause_s})
from pathlib import Path
asked = Path({place!r}) / f"flip_{{os.environ['SLURM_PROCID']}}"
if asked.exists():
    asked.unlink()
    next(self.components.model.modules[0].parameters()).data.view(__import__('torch').uint8).reshape(-1)[7] ^= 64
"""


class Faults:
    """What can happen to a run.

    Args:
        runs: the cluster, and runs on it.
        run: that they happen to.
        disk: its file system.
        place: where ranks are asked to flip bits.
        draw: chooses ranks and nodes.
    """

    def __init__(self, runs: Runs, run: ClusterRun, disk: Disk, place: Path, draw: random.Random) -> None:
        self.runs, self.run, self.disk, self.place, self.draw = runs, run, disk, place, draw

    def _a_rank(self) -> int:
        return self.draw.choice(sorted(self.run.rank_processes().values()))

    def killed_rank(self) -> None:
        kill(self._a_rank(), signal.SIGKILL)

    def stopped_rank(self) -> None:
        kill(self._a_rank(), signal.SIGSTOP)

    def killed_controller(self) -> None:
        kill(self.run.controller_process(), signal.SIGKILL)

    def killed_batch_script(self) -> None:
        kill(batch_script(self.run)[0], signal.SIGKILL)

    def killed_stepd(self) -> None:
        kill(stepd_of_the_batch_script(self.run)[0], signal.SIGKILL)

    def preemption(self) -> None:
        wrap = ("--output=/dev/null", "--wrap", "sleep 3")
        self.runs.cluster.ask("sbatch", "-p", "urgent", "-N", "4", "--exclusive", *wrap)

    def requeue(self) -> None:
        self.runs.cluster.ask("scontrol", "requeue", self.run.job)

    def lost_node(self) -> None:
        node = self.draw.choice(("n2", "n3", "n4"))
        self.runs.cluster.kill_node(node)
        time.sleep(30)
        self.runs.cluster.start_node(node)

    def slurmctld(self) -> None:
        self.runs.cluster.end_controller(signal.SIGKILL)
        time.sleep(5)
        self.runs.cluster.start_controller()

    def disk_fault(self) -> None:
        self.disk.fail(self.draw.choice(("quota", "read-only")))
        time.sleep(10)
        self.disk.mend()

    def stalled_disk(self) -> None:
        self.disk.fail("stalled")
        time.sleep(5)
        self.disk.mend()

    def flipped_bit(self) -> None:
        (self.place / f"flip_{self.draw.randrange(8)}").touch()

    def kinds(self) -> list[Callable[[], None]]:
        """All of them."""
        names = [name for name in vars(Faults) if not name.startswith("_") and name != "kinds"]
        return [getattr(self, name) for name in names]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", cases([], [20]))
def test_every_kind_of_fault_at_random(runs, tmp_path, seed):
    draw, happened = random.Random(seed), list[str]()
    patch = PATCH.format(place=str(tmp_path), pause_s=PAUSE_S)
    layout = (*TP2, "training.global_batch_size=4", f"training.train_iters={STEPS}", "checkpoint.keep_last=3")
    with run_on_a_disk_of_its_own(runs, "soak") as (path, disk):
        run = runs.submit("soak", *layout, "resilience.hang_timeout_s=20", nodes=4, gpus_per_node=2, patch=patch)
        faults = Faults(runs, run, disk, tmp_path, draw)
        kinds = list[Callable[[], None]]()
        run.wait_for_step(5)
        deadline = time.monotonic() + 60 * MINUTES
        while not is_over(run):
            wait(run, draw.uniform(20, 60))
            # The next fault comes when the last one is over; the end is no place for one.
            if is_over(run) or time.monotonic() > deadline or run.iteration() > STEPS - 3 * SAVE_INTERVAL:
                run.wait_for_end(timeout_s=900)
                break
            if not kinds:  # each kind once, then each again
                kinds = faults.kinds()
                draw.shuffle(kinds)
            happened.append(kinds[-1].__name__)
            print(f"{run.iteration()}: {happened[-1]}", flush=True)
            kinds.pop()()
        story = f"{Counter(happened)}\n{run.story()}"
        assert run.status()["state"] == "done", story
        assert run.hashes() == runs.undisturbed(8, *layout), story
        run.wait(lambda: not runs.cluster.ask("squeue", "-h"), "end of the job", timeout_s=30)
        assert run.rank_processes() == {}
        assert [one for one in path.rglob("*") if is_temporary(one)] == []
        measured, predicted = shares(run)
        print(f"{len(happened)} faults, {len(run.attempts())} attempts, goodput {measured:.3f}, model {predicted:.3f}")
        assert abs(measured - predicted) < 0.05, story


def is_over(run: ClusterRun) -> bool:
    return run.status()["state"] in ("done", "stopped", "cancelled")


def wait(run: ClusterRun, seconds: float) -> None:
    """Waits for a while, and until the run makes steps."""
    deadline = time.monotonic() + seconds
    run.wait(lambda: time.monotonic() > deadline or is_over(run), "pause", timeout_s=seconds + 60)
    newest = run.iteration()
    run.wait(lambda: run.iteration() > newest or is_over(run), "step", timeout_s=400)


def shares(run: ClusterRun) -> tuple[float, float]:
    """Goodput as measured, and as Young and Daly's model has it for these faults, saves and restarts.

    The pause of a step stands in front of the step's clock and counts as part of the step: it is what is left of the
    time, over all steps that were made.
    """
    spent = goodput(read_attempts(run.path / "performance.json"))
    whole = sum(seconds for name, seconds in spent.items() if name != "share")
    print(json.dumps({name: round(seconds, 3) for name, seconds in spent.items()}))
    again = spent["steps_done_again_s"] / (spent["steps_s"] / STEPS)
    step_s = spent["steps_s"] / STEPS + spent["other_s"] / (STEPS + again)
    faults = len(run.attempts()) - 1
    restarting_s = spent["between_attempts_s"] + spent["startup_s"]
    lost = lost_share(
        SAVE_INTERVAL * step_s,
        cost_s=spent["save_s"] / (STEPS / SAVE_INTERVAL),
        fault_s=(whole - restarting_s) / faults,
        restart_s=restarting_s / faults,
    )
    return STEPS * step_s / whole, 1 - lost
