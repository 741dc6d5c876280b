"""A run leaves a node whose rank is slow, if it is told to, without losing a step."""

import json

import pytest

from tests import tiers
from tests.slurm.runs import TP2, Runs, lost_iterations

# Rank 1 of the first attempt works four times as long as its peer before each step.
_SLOW = """
slow = attempt == "1" and os.environ["SLURM_PROCID"] == "1"
time.sleep(0.4 if slow else 0.1)
"""


@pytest.mark.skipif(
    not tiers.THOROUGH, reason="in the thorough tier: CI has the ranks, the verdict and the table apart"
)
def test_a_run_leaves_a_slow_node(runs: Runs):
    run = runs.submit("slow_node", *TP2, "resilience.straggler_action=requeue", patch=_SLOW)
    run.wait_for_end()
    first, second = run.attempts()
    assert [first.reason, second.reason] == ["straggler", "finished"], run.story()
    node = first.nodes[1]
    assert first.failed_nodes == (node,)
    assert node not in second.nodes
    assert f"rank 1 on {node} is slow" in first.detail
    assert first.iteration is not None
    assert first.iteration <= 20
    assert lost_iterations(run.path) == 0, "it saved before it left"
    assert run.hashes() == runs.undisturbed(2, *TP2)
    lines = [json.loads(line) for line in (run.path / "stragglers.jsonl").read_text().splitlines()]
    assert [line["nodes"] for line in lines if "nodes" in line] == [list(first.nodes), list(second.nodes)]
