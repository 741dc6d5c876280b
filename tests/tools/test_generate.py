"""``mq generate``: from every kind of source, under other layouts, and against transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConversionError
from tests.conftest import command, environment, run
from tests.processes.waiting import wait_for_lines
from tests.tiers import cases, count
from tools.generate import main

PROMPT = ("--prompt", "def f(x):", "--prompt", "import os")
TEXTS = ("def __init__(self,", "import ", "class Error(", "    return ", "for key in", "x = [")
GREEDY = ("--temperature", 0, "--max-new-tokens", 12, "--json", "--logprobs")


def generate(*words):
    return json.loads(run("tools.generate", *words, check=True).stdout)


@pytest.fixture(scope="module")
def hf(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    run("checkpoints_convert.convert", "to-hf", finished_run, out, check=True)
    return out


def test_a_run_and_its_export_say_the_same(finished_run, hf):
    found = generate(finished_run, *PROMPT, *GREEDY)
    assert [one["prompt"] for one in found] == ["def f(x):", "import os"]
    tokenizer = load_tokenizer(hf)
    for one in found:
        assert len(one["tokens"]) == len(one["logprobs"]) <= 12
        assert all(logprob <= 0 for logprob in one["logprobs"])
        stopped = one["finish_reason"] == "stop"
        assert one["text"] == tokenizer.decode(one["tokens"][:-1] if stopped else one["tokens"])
    assert generate(hf, *PROMPT, *GREEDY) == found
    assert generate(finished_run / "checkpoints", "--iteration", 8, *PROMPT, *GREEDY) == found
    assert generate(finished_run, "--iteration", 4, *PROMPT, *GREEDY) != found


def test_greedy_tokens_are_those_of_transformers(hf):
    import transformers

    number = count(quick=12, thorough=200)
    texts = [f"{TEXTS[index % len(TEXTS)]} # {index}" for index in range(number)]
    words = [word for text in texts for word in ("--prompt", text)]
    found = generate(hf, *words, *GREEDY)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokenizer = load_tokenizer(hf)
    for text, one in zip(texts, found, strict=True):
        ids = torch.tensor(tokenizer.encode_batch([text]))
        theirs = model.generate(
            ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert theirs.sequences[0, ids.shape[1] :].tolist() == one["tokens"]
        logprobs = torch.cat(theirs.logits).log_softmax(1).gather(1, torch.tensor(one["tokens"])[:, None])
        assert one["logprobs"] == pytest.approx(logprobs[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    cases(
        [{"tensor_model_parallel_size": 2, "sequence_parallel": "true"}],
        [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ),
)
def test_the_layout_changes_no_text(layout, finished_run):
    words = (*PROMPT, "--max-new-tokens", 16, "--samples", 2, "--seed", 5, "--json")
    overrides = [f"parallel.{field}={value}" for field, value in layout.items()]
    one, other = generate(finished_run, *words), generate(finished_run, *overrides, *words)
    assert [answer["tokens"] for answer in one] == [answer["tokens"] for answer in other]
    assert len({str(answer["tokens"]) for answer in one}) == 4, "every answer is drawn for itself"


def test_what_ends_an_answer(finished_run):
    words = ("--prompt", "def f(x):", "--temperature", 1, "--max-new-tokens", 40, "--seed", 3, "--json")
    (whole,) = generate(finished_run, *words)
    stop = whole["text"][5:7]
    (cut,) = generate(finished_run, *words, "--stop", stop)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--temperature", "-1", "--top-p", "0"], 2, ["--temperature", "--top-p"]),
        (["--temperature", "nan"], 2, ["--temperature"]),
        (["--max-new-tokens", "0"], 2, ["--max-new-tokens"]),
        (["--logprobs"], 2, ["needs --json"]),
        (["--with", "transformers", "--iteration", "4", "--json", "--logprobs"], 2, ["--iteration", "--logprobs"]),
        (["--prompt", ""], 2, ["--prompt"]),
        (["--output", "x"], 2, ["goes with --prompts"]),
        (["--prompts", "/nowhere", "--replicas", "0"], 2, ["is no file", "--replicas", "--output"]),
        (["parallel.tensor_model_parallel_size=3"], 2, ["KV heads"]),
        (["parallel.tensor_parallel_size=2"], 2, ["Did you mean parallel.tensor_model_parallel_size"]),
        (["--prompt", "x = 1\n" * 5000], 3, ["positions; shorten the text"]),
        (["--iteration", "5"], 4, ["5"]),
        (["--context", "1000000"], 2, ["positions; give at most that"]),
    ],
)
def test_what_is_refused(words, code, told, finished_run):
    done = run("tools.generate", finished_run, "--prompt", "x", *words)
    assert done.returncode == code
    assert all(text in done.stderr for text in told), done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_model(tmp_path, hf):
    assert run("tools.generate", tmp_path / "none", "--prompt", "x").returncode == 2
    done = run("tools.generate", tmp_path, "--prompt", "x")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    done = run("tools.generate", tmp_path, "--prompt", "x", "--with", "transformers")
    assert done.returncode == 2
    assert "not a Hugging Face directory" in done.stderr
    texts = run("tools.generate", hf, "--prompt", "def ", "--max-new-tokens", 5, "--with", "transformers", check=True)
    assert texts.stdout.startswith("def ")


def test_without_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConversionError, match=r"needs transformers: pip install 'megatron_qwen\[hf\]'"):
        main([str(tmp_path), "--prompt", "x", "--with", "transformers"])


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A file of prompts, two of them equal, and one with a field of its own."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"prompt": f"{TEXTS[index % len(TEXTS)]} # {index // 2}"} for index in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"id": 7, **records[3]}]) + "\n")
    return path


SAMPLED = ("--temperature", 0.9, "--seed", 3, "--max-new-tokens", 10, "--samples", 2)


@pytest.fixture(scope="module")
def answered(finished_run, asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    run("tools.generate", finished_run, "--prompts", asked, "--output", out, *SAMPLED, check=True)
    return out


def test_a_file_of_prompts(finished_run, asked, answered):
    records = [json.loads(line) for line in asked.read_text().splitlines() if line]
    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (record["prompt"], sample) for record in records for sample in range(2)
    ]
    assert [line.get("id") for line in lines[-2:]] == [7, 7]
    assert lines[-2:] == [{**line, "id": 7} for line in lines[6:8]], "equal prompts have equal answers"
    words = [word for record in records[:5] for word in ("--prompt", record["prompt"])]
    one_by_one = generate(finished_run, *words, *SAMPLED, "--json", "--logprobs")
    assert [line["tokens"] for line in lines[:10]] == [one["tokens"] for one in one_by_one]
    assert [line["logprobs"] for line in lines[:10]] == [one["logprobs"] for one in one_by_one]
    assert not answered.with_name("answers.jsonl.answered").exists()


@pytest.mark.parametrize("words", cases([("--replicas", 2)], [("parallel.pipeline_model_parallel_size=2",)]))
def test_a_file_of_prompts_goes_on_after_a_kill(words, finished_run, asked, answered, tmp_path):
    """Under another layout, to the same bytes."""
    out = tmp_path / "answers.jsonl"
    log = tmp_path / "answers.jsonl.answered"
    arguments = (finished_run, "--prompts", asked, "--output", out, *SAMPLED)
    process = subprocess.Popen(command("tools.generate", *arguments), env=environment(), stderr=subprocess.DEVNULL)
    wait_for_lines(process, log, 3)
    process.kill()
    process.wait()
    whole = log.read_bytes().rstrip(b"\n")
    log.write_bytes(whole[:-1])  # the last line is half a line
    kept = whole.count(b"\n") - 1  # a line says of what they are
    resumed = run("tools.generate", *arguments, *words, check=True)
    assert kept > 0
    assert f"{kept} of 82 answers are there from before" in resumed.stderr
    assert out.read_bytes() == answered.read_bytes()


def test_memory_does_not_grow_with_the_prompts(finished_run, tmp_path):
    """Twice as many: they are read some at a time, and the answers wait on the disk."""
    few, most = {}, count(quick=400, thorough=10_000)
    for number in (most // 2, most):
        path, out = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.out.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"def f_{index}(x):"}) + "\n" for index in range(number)))
        words = ("--prompts", path, "--output", out, "--max-new-tokens", 3, "--temperature", 0)
        process = subprocess.Popen(
            command("tools.generate", finished_run, *words), env=environment(), stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        assert out.read_bytes().count(b"\n") == number
        few[number] = usage.ru_maxrss / 1024
    assert few[most] < few[most // 2] + 30, f"MiB by prompts: {few}"


def test_answers_of_other_prompts_are_refused(finished_run, asked, tmp_path):
    out, log = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.answered"
    log.write_text('{"identity": {"prompts": "others"}}\n')
    done = run("tools.generate", finished_run, "--prompts", asked, "--output", out)
    assert done.returncode == 2
    assert "has answers of something else" in done.stderr
    assert log.exists()


def test_a_file_that_is_no_file_of_prompts(finished_run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n[1]\n{"prompt": ""}\n{"prompt": "x", "text": "y"}\nnothing\n')
    done = run("tools.generate", finished_run, "--prompts", path, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 3
    for told in (":2 ", ":3 ", ":4 ", ":5 ", "is not JSON", "rename it"):
        assert told.strip() in done.stderr
    assert "Traceback" not in done.stderr
