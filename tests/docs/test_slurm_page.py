"""docs/slurm.md says what the code does."""

import re

from launch.cluster import known_clusters, reference
from launch.submission import PASSED_ON
from megatron_qwen.resilience.rules import table
from tests.conftest import ROOT, run

PAGE = (ROOT / "docs/slurm.md").read_text()


def test_the_policy_is_the_one_that_acts():
    assert table() in PAGE, "./mq launch reference policy"


def test_the_fields_are_those_of_a_cluster_file():
    assert reference() in PAGE, "./mq launch reference cluster"


def test_examples_and_variables_are_named():
    for name in known_clusters():
        assert f"launch/clusters/{name}.yaml" in PAGE
    for name in PASSED_ON:
        assert name in PAGE or name.startswith(("MODULE", "LMOD", "LOADED")), name


def test_commands_of_the_page_exist():
    actions = set(re.findall(r"mq launch ([a-z-]+)", PAGE))
    text = run("launch.command", "--help", check=True).stdout
    assert {"submit", "status", "logs", "cancel", "requeue", "dry-run", "array"} <= actions
    for action in actions:
        assert action in text, action


def test_the_tables_can_be_printed():
    assert run("launch.command", "reference", "policy", check=True).stdout.strip() in PAGE
    assert run("launch.command", "reference", "cluster", check=True).stdout.strip() in PAGE
