"""The process of the FP8 check: whatever happens to it is a result."""

from pathlib import Path

import pytest

from launch.fp8_proof import Proof, prove, way_out


def interpreter(directory: Path, script: str) -> str:
    """Stands in for the Python of an environment."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("state", ["ok", "wrong", "not tried"])
def test_the_result_is_the_last_line(state, tmp_path):
    line = f'{{"state": "{state}", "found": "this", "fix": "that"}}'
    python = interpreter(tmp_path, f"echo a warning of a library\necho '{line}'")
    assert prove(python) == Proof(state, "this", "that")


def test_it_is_told_where_the_checkout_is(tmp_path):
    python = interpreter(tmp_path, f'echo "$@" >{tmp_path}/words\nenv >{tmp_path}/variables\nexit 1')
    prove(python)
    assert (tmp_path / "words").read_text() == "-P -m megatron_qwen.models.fp8_check\n"
    assert f"PYTHONPATH={Path(__file__).resolve().parents[2]}" in (tmp_path / "variables").read_text()


def test_a_crash(tmp_path):
    proof = prove(interpreter(tmp_path, "echo loading >&2; kill -SEGV $$"))
    assert proof.state == "wrong"
    assert proof.found == "the process was ended by SIGSEGV: loading"
    assert proof.fix


def test_a_hang(tmp_path):
    proof = prove(interpreter(tmp_path, "exec sleep 60"), timeout_s=0.2)
    assert (proof.state, proof.found) == ("wrong", "no answer in 0.2 s")


@pytest.mark.parametrize("script", ["exit 0", "echo no json", """echo '{"stat": 1}'"""])
def test_no_result(script, tmp_path):
    assert prove(interpreter(tmp_path, script)).state == "wrong"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("ImportError: transformer_engine_torch.so: undefined symbol: _ZN3c105Error", "another torch"),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "no code for this GPU"),
        ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", "newer than the driver"),
        ("OSError: libcudnn_graph.so.9: cannot open shared object file", "cuDNN"),
        ("ModuleNotFoundError: No module named 'einops'", "incomplete"),
        ("RuntimeError: Found empty `transformer-engine` meta package installed.", "incomplete"),
        ("something new", "report this message"),
    ],
)
def test_the_way_out(message, word, tmp_path):
    assert word in way_out(f"Traceback:\n{message}\n")
    (tmp_path / "message").write_text(message)
    proof = prove(interpreter(tmp_path, f"cat {tmp_path}/message >&2; exit 1"))
    assert proof.found == message
    assert word in proof.fix


def test_an_interpreter_that_is_not_there(tmp_path):
    assert prove(str(tmp_path / "python")).state == "wrong"
