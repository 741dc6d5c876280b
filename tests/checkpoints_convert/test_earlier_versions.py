"""What an earlier version wrote is converted to the same bytes, and compares as equal."""

import json
from pathlib import Path

import pytest

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import iteration_dir
from tests.checkpoints_convert.models import make
from tests.config import earlier


def write_earlier(root: Path) -> Path:
    """Makes a converted checkpoint one of an earlier version; its checkpoint."""
    checkpoint = iteration_dir(root / "checkpoints", 0)
    for run_yaml in (root / "run.yaml", checkpoint / "run.yaml"):
        earlier.rewrite(run_yaml)
        assert "rotary_base: 50000.0" in run_yaml.read_text()
    entries = {name: manifest.hash_file(checkpoint / name) for name in manifest.files_in(checkpoint)}
    manifest.write(checkpoint, entries, iteration=0, attempt=0)
    return checkpoint


@pytest.fixture
def hf(tmp_path):
    """A model whose RoPE base, 50,000, is not the default."""
    return make("qwen2 odd", tmp_path / "hf")


def test_checkpoint(hf, tmp_path):
    names = ("now", "before")
    for name in names:
        convert(hf, tmp_path / name, ImportOptions(quiet=True))
    write_earlier(tmp_path / "before")
    for name in names:
        assert main(["to-hf", str(tmp_path / name), str(tmp_path / f"{name}-hf")]) == 0
    now, before = ({path.name: path.read_bytes() for path in (tmp_path / f"{name}-hf").iterdir()} for name in names)
    assert now.keys() == before.keys()
    # The model card and the manifest name the checkpoint by its hash.
    same = now.keys() - {"README.md", "manifest.json"}
    assert {name: now[name] for name in same} == {name: before[name] for name in same}
    assert json.loads(before["config.json"])["rope_theta"] == 50_000.0
    assert b"RoPE base 50,000" in before["README.md"]
    assert main(["verify", str(tmp_path / "before"), str(hf)]) == 0


def test_manifest(hf, tmp_path):
    """The base in it counts: an export with another one differs."""
    convert(hf, tmp_path / "start", ImportOptions(quiet=True))
    assert main(["to-hf", str(tmp_path / "start"), str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "manifest.json"
    noted = json.loads(path.read_text())
    noted["configuration"] = earlier.at_earlier_places(noted["configuration"])
    path.write_text(json.dumps(noted))
    assert main(["verify", str(tmp_path / "start"), str(path)]) == 0
    noted["configuration"]["model"]["rotary_base"] = 60_000.0
    path.write_text(json.dumps(noted))
    assert main(["verify", str(tmp_path / "start"), str(path)]) == 1
