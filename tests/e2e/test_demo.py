"""`mq demo`, shortened: every stage on real text, under another layout than its own."""

from tests.conftest import run


def test_demo(tmp_path):
    out = tmp_path / "demo"
    done = run("launch.demo", "--output", out, "--steps", 12, "--layout", "pp=2", timeout_s=400)
    assert done.returncode == 0, done.stderr
    figures = {line[:56].strip(): line[56:].strip() for line in done.stdout.splitlines() if len(line) > 56}
    assert float(figures["validation loss, nats per token"]) > 0
    assert float(figures["unigram entropy of the same tokens"]) > 5
    ours, theirs = map(float, figures["loss, Megatron checkpoint / Hugging Face export"].split(" / "))
    assert abs(ours - theirs) < 1e-5
    assert float(figures["largest difference of a logit between the two"]) < 1e-4
    assert done.stdout.count("\n--- ") == 3, "three samples"
    page = (out / "report.html").read_text()
    assert "unigram entropy" in page
    assert page.count("<mark>") == 3
    assert (out / "run" / "hf" / "model.safetensors").is_file()
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_wrong_layout_is_said_before_anything_is_made(tmp_path):
    for layout, named in (("tp=4", "KV heads"), ("xp=2", "AXIS=SIZE"), ("pp=3", "do not split evenly")):
        done = run("launch.demo", "--output", tmp_path / "demo", "--layout", layout)
        assert done.returncode == 2
        assert named in done.stderr
        assert not (tmp_path / "demo").exists()
