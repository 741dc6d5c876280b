"""Whatever text somebody writes into a field, a script keeps its lines and no secret is written down."""

import json
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import request as requests
from launch.cluster import Cluster, load, read
from launch.preflight import check
from launch.submission import environment_of_job, script
from megatron_qwen.config.fields import field_infos
from megatron_qwen.errors import ConfigError
from tests.conftest import command, environment

BASE = {"gpus_per_node": 8, "container": "apptainer", "container_image": "i.sif", "environment": {"A": "b"}}
TYPES = {name: str(info.type) for name, info in field_infos("cluster", Cluster).items()}
# Every field that takes free text; setup lines are shell by what they are for.
TEXTS = [name for name, kind in TYPES.items() if "str" in kind and "Literal" not in kind and name != "setup"]
# Any text, and text made of what shells and Slurm act on.
SPECIAL = "\n\r\0 ;&|$`'\"\\#%-=<>(){}\x85\u2028\x0b\x0caB"
NASTY = st.one_of(st.text(max_size=40), st.text(alphabet=SPECIAL, max_size=40))
# Put together here, for this file is part of the code that a run freezes.
CANARY = "-".join(["c4n4ry", "0123456789", "do", "not", "write", "me", "down"])


def make(cluster: Cluster, **changes):
    request = requests.make("tiny_dense", [], nodes=2, cluster="h100_infiniband", name="run", dry=True)
    return replace(request, cluster=cluster, **changes)


def lines_of(cluster: Cluster, **changes) -> list[str]:
    return script(make(cluster, **changes)).split("\n")


def field_with(name: str, text: str) -> dict[str, object]:
    """A field of any of the kinds that hold text, holding this one."""
    if "tuple" in TYPES[name]:
        return {name: [text]}
    return {name: {"KEY": text}} if "Mapping" in TYPES[name] else {name: text}


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=NASTY)
def test_a_field_of_the_cluster_adds_no_line(name, text):
    try:
        cluster = read({**BASE, **field_with(name, text)}, origin="x.yaml")
    except ConfigError:
        return  # refused, which is right
    harmless = {"time_limit": "1:00:00", "pass_environment": "HOME"}.get(name, "word")
    plain = read({**BASE, **field_with(name, harmless)}, origin="x.yaml")
    written = script(make(cluster)).splitlines()
    assert len(written) == len(script(make(plain)).splitlines())
    for line in written:
        if line.startswith("#SBATCH"):
            assert len(shlex.split(line.removeprefix("#SBATCH "))) == 1, line


@settings(max_examples=60, deadline=None)
@given(text=NASTY)
def test_a_run_directory_adds_no_line(text):
    request = make(load("h100_infiniband"), run_dir=Path("/runs") / f"x{text}".replace("/", "_"))
    if check(request, on_site=False).errors:
        return
    assert len(script(request).splitlines()) == len(script(make(load("h100_infiniband"))).splitlines())


@settings(max_examples=100, deadline=None)
@given(text=NASTY)
def test_a_name_is_a_word_or_refused(text):
    base = make(load("h100_infiniband"))
    try:
        named = requests.with_name(base, text, base.config)
    except ConfigError:
        return
    assert named.run_dir.parent == base.run_dir.parent
    assert len(script(named).splitlines()) == len(script(base).splitlines())


def test_a_name_from_a_directory_is_checked_too(tmp_path):
    source = tmp_path / "x\ntouch PWNED\n#" / "run.yaml"
    source.parent.mkdir()
    source.write_text("recipe: tiny_dense\n")
    with pytest.raises(ConfigError, match="--name"):
        requests.make(str(source), [], nodes=1, cluster="cpu", run_dir=tmp_path / "run")


@settings(max_examples=60, deadline=None)
@given(text=NASTY)
def test_a_text_of_the_configuration_with_a_control_character_is_refused(text):
    request = make(load("h100_infiniband"))
    config = request.config.with_section("metrics", wandb_project=text)
    found = check(replace(request, config=config), on_site=False)
    if len(text.splitlines()) > 1:
        assert any("metrics.wandb_project" in str(item.problem) for item in found.errors)


def test_setup_lines_stand_as_they_are():
    cluster = read({**BASE, "setup": ["source /opt/site.sh", "ulimit -n 65536"]}, origin="x")
    assert "source /opt/site.sh" in lines_of(cluster)
    with pytest.raises(ConfigError, match="control character"):
        read({**BASE, "setup": ["a\nb"]}, origin="x")


def test_only_listed_variables_reach_a_job():
    request = make(load("h100_infiniband"), environ={"PATH": "/bin", "WANDB_API_KEY": CANARY, "AWS_SECRET": "x"})
    assert environment_of_job(request) == {"PATH": "/bin", "WANDB_API_KEY": CANARY}
    assert environment_of_job(replace(request, cluster=load("cpu"))) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "words",
    [
        [f"metrics.wandb_project={CANARY}"],
        [f"data.tokenizer=/data/{CANARY}"],
        ["metrics.wandb_project=hf_abcdefghijklmnopqrstuvwxyz012345"],
    ],
)
def test_secrets_in_a_configuration_are_refused(words):
    request = requests.make("tiny_dense", words, nodes=1, cluster="h100_infiniband", dry=True)
    request = replace(request, environ={"MY_API_KEY": CANARY})
    found = check(request, on_site=False)
    assert any("pass it through the environment" in str(item.problem) for item in found.errors)
    assert CANARY not in "".join(str(item.problem) for item in found.errors)


def test_secrets_in_a_cluster_file_are_refused():
    by_value = read({**BASE, "environment": {"HARMLESS": CANARY}}, origin="x")
    by_name = read({**BASE, "environment": {"HF_TOKEN": "short"}}, origin="x")
    for cluster in (by_value, by_name):
        found = check(make(cluster, environ={"SOME_PASSWORD": CANARY}), on_site=False)
        assert any("pass it through the environment" in str(item.problem) for item in found.errors)


def _content(path):
    """Of a file; nothing if it is a temporary one whose writer has renamed it: it was listed under its name, too."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        assert path.name.endswith(".tmp"), path
        return b""


def test_planted_secrets_are_nowhere_after_a_submission(tokens, tokenizer, tmp_path):
    """In scripts, logs, run.yaml, pickles, the frozen code, and what the command printed."""
    hook = f"http://127.0.0.1:9/{CANARY}"  # a port at which nothing listens, so that the failure is logged
    planted = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "DB_PASSWORD": CANARY, "HARMLESS": CANARY, "HOOK": hook}
    run_dir, cluster = tmp_path / "run", tmp_path / "watched.yaml"
    watched = {"scheduler": "local", "gpus_per_node": 0, "alert_webhook_variable": "HOOK", "alert_on": ["done"]}
    cluster.write_text(json.dumps(watched))
    words = [
        f"data.path={tokens}",
        f"data.tokenizer={tokenizer}",
        "training.train_iters=4",
        "metrics.tensorboard=false",
    ]
    done = subprocess.run(
        command("launch.command", "submit", "tiny_dense", *words, "--cluster", cluster, "--run-dir", run_dir),
        env={**environment(), **planted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wait_for_end(run_dir)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    log, deadline = run_dir / "logs/controller.log", time.monotonic() + 60
    while "the webhook of $HOOK has not taken an event: Connection refused" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    searched = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in searched)
    assert [path for path in searched if CANARY.encode() in _content(path)] == []
    assert CANARY not in done.stdout + done.stderr


def wait_for_end(run_dir: Path) -> None:
    """Waits for a run without Slurm."""
    from tests.launch.test_local import wait_for_state

    wait_for_state(run_dir, "done")


def test_a_directory_that_others_can_write_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    request = make(load("cpu"), run_dir=run_dir)
    assert not [item for item in check(request, on_site=False).errors if "--run-dir" in str(item)]
    run_dir.chmod(0o770)
    assert any("chmod 700" in str(item) for item in check(request, on_site=False).errors)
    run_dir.chmod(0o700)
    tmp_path.chmod(0o777)
    try:
        assert any("everyone" in str(item) for item in check(request, on_site=False).errors)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    request = make(load("cpu"), run_dir=tmp_path / "file")
    assert any("is not a directory" in str(item) for item in check(request, on_site=False).errors)
