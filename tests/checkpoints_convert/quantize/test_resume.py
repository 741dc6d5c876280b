"""A release that is killed is resumed by the same command and ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from tests.checkpoints_convert.big import SHARD_BYTES, big_model
from tests.checkpoints_convert.test_resume import hashes, start
from tests.tiers import cases, count

KILLS = count(quick=1, thorough=15)  # of each kind, at random moments
# One of each way in which a file is made: columns first, rows with groups, blocks.
FORMATS = cases(["gptq-int4"], ["awq-int4", "w4a16", "fp8-block", "w8a8"])


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return big_model(tmp_path_factory.mktemp("source") / "hf")


@pytest.mark.parametrize("name", FORMATS)
def test_killed_at_random_moments(name, hf, tmp_path):
    out = tmp_path / "out"
    options = ("--format", name, "--method", "nearest", "--max-shard-size", SHARD_BYTES / 1e9, "--json")
    words = ("quantize", hf, out, *options)
    answer = json.loads(start(*words).communicate(timeout=120)[0])
    assert answer["kept_bytes"] == 0
    expected = hashes(out)
    assert len(expected) > 5
    shutil.rmtree(out)
    dice, killed, kept = random.Random(5), 0, []
    while killed < KILLS:
        process = start(*words)
        while process.poll() is None and not out.with_name(".out.partial").exists():
            time.sleep(0.001)
        time.sleep(answer["seconds"] * dice.uniform(0.1, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            shutil.rmtree(out)
            continue
        killed += 1
        again = start(*words)
        kept.append(json.loads(again.communicate(timeout=120)[0])["kept_bytes"])
        assert again.returncode == 0
        assert hashes(out) == expected
        assert not list(tmp_path.glob(".out*")), "something is left beside the directory"
        shutil.rmtree(out)
    print(f"{name}: {killed} kills, the same bytes each time; kept in between: {kept}")
    assert any(kept), "no kill fell into the writing"


def test_a_folder_of_releases_is_completed(hf, tmp_path):
    """Killed in the second format: the first stays as it is, the second is resumed, the table comes at the end."""
    out = tmp_path / "out"
    words = ("quantize", hf, out, "--format", "fp8,w8a8", "--max-shard-size", SHARD_BYTES / 1e9, "--json")
    words = (*words, "--method", "nearest")
    process = start(*words)
    while process.poll() is None and not list(out.glob(".w8a8.partial/*.safetensors")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (out / "fp8" / "manifest.json").is_file()
    assert not (out / "w8a8").exists()
    assert not (out / "README.md").exists()
    before = hashes(out / "fp8")
    answer = json.loads(start(*words).communicate(timeout=120)[0])
    assert [one["complete_before"] for one in answer["formats"]] == [True, False]
    assert hashes(out / "fp8") == before
    assert (out / "README.md").read_text().count("\n| [") == 2
