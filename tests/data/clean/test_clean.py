"""What is dropped, by which stage, and that nothing goes missing on the way."""

import io
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import zstandard

from launch.demo import standard_library
from megatron_qwen.data.clean.duplicates import NearDuplicates, signature
from megatron_qwen.data.clean.filters import Contamination, LengthAndCharacters
from tests.conftest import ROOT, command, environment, run

TEXTS = [document["text"] for document in standard_library(250_000)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def kept(directory: Path) -> list[str]:
    texts = []
    for path in sorted(directory.glob("clean_*.jsonl.zst")):
        with zstandard.open(path) as file:
            texts += [json.loads(line)["text"] for line in io.TextIOWrapper(file, "utf-8")]
    return texts


def clean(output: Path, *arguments: object) -> dict:
    done = run("tools.data", "clean", "--output", output, "--json", *arguments, check=True)
    report = json.loads(done.stdout)
    assert report == json.loads((output / "report.json").read_text())
    dropped = sum(stage["documents"] for stage in report["dropped"].values())
    assert report["read"] == report["kept"] + report["empty"] + report["filtered"] + report["skipped"] + dropped
    return report


def test_no_stage_drops_nothing(tmp_path):
    report = clean(tmp_path / "out", write(tmp_path / "a.jsonl", [*TEXTS, ""]))
    assert kept(tmp_path / "out") == TEXTS
    assert (report["empty"], report["dropped"]) == (1, {})


def test_exact_duplicates(tmp_path):
    texts = [*TEXTS[:10], TEXTS[3] + "\n\n", TEXTS[5], "  " + TEXTS[0]]
    report = clean(tmp_path / "out", "--exact", write(tmp_path / "a.jsonl", texts))
    assert kept(tmp_path / "out") == TEXTS[:10]
    assert report["dropped"]["exact duplicates"]["documents"] == 3
    assert report["dropped"]["exact duplicates"]["samples"][0]["text"] == (TEXTS[3] + "\n\n")[:300]


def test_near_duplicates(tmp_path):
    """A word changed in a hundred is found; another text is not."""
    generator = random.Random(1)
    long = [text for text in TEXTS if len(text) > 3000][:10]
    changed = [re.sub(r"\w+", lambda word: "changed" if generator.random() < 0.01 else word[0], text) for text in long]
    report = clean(tmp_path / "out", "--near", 0.7, write(tmp_path / "a.jsonl", [*TEXTS, *changed]))
    assert report["dropped"]["near duplicates"]["documents"] == len(long) > 5
    assert kept(tmp_path / "out") == TEXTS


def test_similarity_is_what_it_is_said_to_be():
    words = [f"word{number}" for number in range(2000)]
    text = " ".join(words)
    half = " ".join(words[:1000] + [f"other{number}" for number in range(1000)])  # Jaccard of about a third
    for threshold, new in ((0.2, False), (0.6, True)):
        index = NearDuplicates(threshold)
        assert index.is_new(signature(text))
        assert index.is_new(signature(half)) is new


QUESTION = (
    "What is the capital of the country whose flag shows a red maple leaf on a white square between two red bars?"
)


@pytest.mark.parametrize(
    ("text", "drops"),
    [
        (QUESTION, True),
        (f"An introduction.\n\n{QUESTION}\n\nOttawa.", True),
        (QUESTION.replace("capital", "largest city").replace("shows", "has"), True),
        ("The capital of a country is where its government sits.", False),
        ("short", False),
    ],
)
def test_contamination(text, drops, qwen):
    stage = Contamination([QUESTION], tokenizer=qwen, whole=False)
    assert (stage.reason(text) is not None) is drops


def test_the_rule_counts_tokens_in_order(qwen):
    """13 tokens in common that are less than 0.6 of the shorter, or in another order, are no match."""
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    words = QUESTION.split()
    random.Random(0).shuffle(words)
    stage = Contamination([QUESTION], tokenizer=qwen, whole=False)
    assert stage.reason(" ".join(words)) is None
    half = " ".join(QUESTION.split()[:13] + ["something", "quite", "different"] * 10)
    tokens = load_tokenizer(qwen).encode_batch([QUESTION, half])
    assert len(tokens[0]) * 0.6 > 13
    assert stage.reason(half) is None


def test_many_tests_by_the_rule_itself(qwen):
    """What the index leaves out is out by the rule: every paragraph against every test, in order."""
    from rapidfuzz.distance import LCSseq

    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    lines = [line.strip() for text in TEXTS for line in text.splitlines() if len(line.strip()) > 40]
    tests, paragraphs = lines[:300:3], lines[:600:7]
    stage = Contamination(tests, tokenizer=qwen, whole=True)
    tokenizer = load_tokenizer(qwen)
    encoded = [ids for ids in tokenizer.encode_batch(tests) if len(ids) >= 13]
    matched = 0
    for paragraph in paragraphs:
        ids = tokenizer.encode_batch([paragraph])[0]
        expected = len(ids) >= 13 and any(
            LCSseq.similarity(ids, test) >= max(13, 0.6 * min(len(ids), len(test))) for test in encoded
        )
        assert (stage.reason(paragraph) is not None) is expected
        matched += expected
    assert 0 < matched < len(paragraphs)


def test_contamination_of_a_file(qwen, tmp_path):
    tests = write(tmp_path / "tests.jsonl", [QUESTION])
    source = write(tmp_path / "a.jsonl", [*TEXTS[:5], "Quiz\n\n" + QUESTION])
    report = clean(tmp_path / "out", "--tokenizer", qwen, "--test-set", tests, "--", source)
    assert kept(tmp_path / "out") == TEXTS[:5]
    (sample,) = report["dropped"]["contamination"]["samples"]
    assert "What is the capital" in sample["why"]


@pytest.mark.parametrize(
    ("settings", "text", "drops"),
    [
        ({"min_characters": 10}, "short", True),
        ({"max_characters": 10}, "a longer text", True),
        ({"min_letters": 0.5}, "1234 5678 ab", True),
        ({"min_letters": 0.5}, "mostly letters 12", False),
        ({"max_repetition": 0.3}, "a\na\na\nb", True),
        ({"max_repetition": 0.6}, "a\na\nb\nc", False),
        ({}, "x", False),
    ],
)
def test_length_and_characters(settings, text, drops):
    assert (LengthAndCharacters(**settings).reason(text) is not None) is drops


def test_quality_by_a_callable(tmp_path):
    (tmp_path / "scorer.py").write_text("def score(text):\n    return 1.0 if 'class' in text else 0.0\n")
    source = write(tmp_path / "a.jsonl", TEXTS)

    done = subprocess.run(
        command("tools.data", "clean", "--output", tmp_path / "out", "--quality", "scorer:score", source),
        env={**environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "out") == [text for text in TEXTS if "class" in text]


def test_quality_by_a_fasttext_model(tmp_path):
    import fasttext

    lines = [f"__label__code {' '.join(text.split()[:200])}" for text in TEXTS]
    lines += [f"__label__prose the quick brown fox number {number} jumps over the lazy dog" for number in range(40)]
    (tmp_path / "train.txt").write_text("\n".join(lines * 5))
    # The library's first weights are filled by ten blocks, one a thread: with fewer threads some stay as memory was.
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=20, verbose=0, thread=10)
    model.save_model(str(tmp_path / "model.bin"))
    source = write(tmp_path / "a.jsonl", [*TEXTS[:5], "the lazy dog jumps over the quick brown fox"])
    options = ["--quality", tmp_path / "model.bin", "--quality-label", "code", "--min-quality", 0.6]
    clean(tmp_path / "out", *options, source)
    assert kept(tmp_path / "out") == TEXTS[:5]
    done = run("tools.data", "clean", "--output", tmp_path / "no", *options[:2], "--quality-label", "bad", source)
    assert done.returncode == 2
    assert "it has" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--near", "2"], 2, "--near = 2.0: must be from 0 to 1"),
        (["--quality", "nowhere:f"], 2, "is neither a fastText model nor module:function"),
        (["--min-chars", "99999999"], 3, "no document is left"),
        (["--workers", "0"], 2, "--workers"),
    ],
)
def test_wrong_input(arguments, code, named, tmp_path):
    source = write(tmp_path / "a.jsonl", TEXTS[:3])
    done = run("tools.data", "clean", "--output", tmp_path / "out", *arguments, source)
    assert done.returncode == code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_test_set_needs_a_tokenizer(tmp_path):
    source = write(tmp_path / "a.jsonl", TEXTS[:3])
    done = run("tools.data", "clean", "--output", tmp_path / "out", "--test-set", source, "--", source)
    assert done.returncode == 2
    assert "requires --tokenizer" in done.stderr
