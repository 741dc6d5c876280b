"""``mq data prepare --chat`` and ``mq data inspect --chat``: what is prepared, what is left out and why."""

import json
import shutil
import signal
import subprocess
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_qwen.data.prepare import job
from megatron_qwen.data.token_files.manifest import read_manifest
from megatron_qwen.data.token_files.token_set import TokenSet
from tests.conftest import command, environment, run
from tests.data.chat.conftest import template
from tests.data.chat.conversations import Dice
from tests.data.chat.test_forms import WRONG
from tests.processes import kill_points
from tests.tiers import count

_UNREADABLE = {"a list": "[1]", "a text": '"hello"'}


@pytest.fixture(scope="module")
def chat(qwen, tmp_path_factory):
    """A tokenizer with Qwen2.5's template."""
    directory = tmp_path_factory.mktemp("instruct") / "tokenizer"
    run(
        "tools.data",
        "tokenizer",
        "import-tiktoken",
        next(qwen.parent.parent.rglob("*.tiktoken")),
        "--output",
        directory,
        check=True,
    )
    (directory / "chat_template.jinja").write_text(template("qwen2_5"))
    return directory


@pytest.fixture(scope="module")
def talks():
    """Conversations that pass the checks."""
    found = []
    for seed in range(300):
        messages, tools = Dice(seed, spelled=seed % 4 == 0).conversation(plain=seed % 2 == 0)
        for message in messages:
            if not message.get("content", "").strip() and "tool_calls" not in message:
                message["content"] = "Well."
        found.append({"messages": messages, **({"tools": tools} if tools else {})})
    return found


def write(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def prepare(chat, out, *words):
    return run("tools.data", "prepare", "--chat", "--tokenizer", chat, "--output", out, *words)


WEIGHED = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "a quarter", "weight": 0.25},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "<think>\nhidden\n</think>\n\nwhole"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "nothing", "weight": 0},
    {"role": "user", "content": "four?"},
    {"role": "assistant", "content": "some", "weight": 0.07},
]


def shown_as(chat, out, records, *words):
    done = prepare(chat, out, write(out.parent / f"{out.name}.jsonl", records), *words)
    assert done.returncode == 0, done.stderr
    told = run("tools.data", "inspect", "--chat", out, "--head", len(records), "--json", check=True)
    return json.loads(told.stdout)


@pytest.mark.parametrize("tools", [[], [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
def test_messages_count_in_part(tools, chat, tmp_path):
    """Without tools and with them: joined from what stands around turns, and by Jinja."""
    record = {"messages": WEIGHED, **({"tools": tools} if tools else {})}
    (found,) = shown_as(chat, tmp_path / "out", [record], "--message-weights")
    flat = [{name: value for name, value in one.items() if name != "weight"} for one in WEIGHED]
    (plain,) = shown_as(chat, tmp_path / "plain", [{**record, "messages": flat}])
    assert found["tokens"] == plain["tokens"]
    runs, before = [], 0
    for weight, carries in zip(found["mask"], plain["mask"], strict=True):
        if carries and not before:
            runs.append(set())
        if carries:
            runs[-1].add(weight)
        else:
            assert weight == 0
        before = carries
    assert runs == [{0.25}, {1.0}, {0.0}, {0.07}]
    assert read_manifest(tmp_path / "out").chat["loss_unit"] == 100
    assert TokenSet(tmp_path / "out").loss_unit == 100


def test_a_weight_in_part_is_refused_unless_it_is_asked_for(chat, tmp_path):
    done = prepare(chat, tmp_path / "out", write(tmp_path / "in.jsonl", [{"messages": WEIGHED}]))
    assert done.returncode == 3
    assert "--message-weights" in done.stderr


def test_parts_of_answers_without_loss(chat, tmp_path):
    words = ("--message-weights", "--no-loss-between", "<think>", "</think>\n\n")
    (found,) = shown_as(chat, tmp_path / "out", [{"messages": WEIGHED}], *words)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(chat / "tokenizer.json"))
    texts = ["".join(oracle.decode(ids) for ids in run_) for run_ in _runs_with_loss(found)]
    assert texts == ["a quarter<|im_end|>", "whole<|im_end|>", "some<|im_end|>"]
    open_ended = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think> on and on"}]
    done = prepare(chat, tmp_path / "bad", write(tmp_path / "bad.jsonl", [{"messages": open_ended}]), *words)
    assert done.returncode == 3
    assert "has <think> without </think>" in done.stderr


def test_thinking_that_the_prompt_begins_has_no_loss(chat, tmp_path):
    """As templates of models that always think: the generation prompt ends with <think>."""
    directory = tmp_path / "thinks"
    shutil.copytree(chat, directory)
    plain = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'"
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ " + plain + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42"}]
    words = ("--no-loss-between", "<think>", "</think>\n\n")
    (found,) = shown_as(directory, tmp_path / "out", [{"messages": talk}], *words)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(chat / "tokenizer.json"))
    texts = ["".join(oracle.decode(ids) for ids in run_) for run_ in _runs_with_loss(found)]
    assert texts == ["42<|im_end|>"]
    talk[1]["content"] = "hm</think>\n\n42"
    done = prepare(chat, tmp_path / "bad", write(tmp_path / "bad.jsonl", [{"messages": talk}]), *words)
    assert done.returncode == 3
    assert "the end of a part without loss, and not its beginning" in done.stderr


def _runs_with_loss(found):
    runs, before = [], 0
    for token, weight in zip(found["tokens"], found["mask"], strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append([token])
        before = weight
    return runs


def test_files_of_other_units_are_not_merged(chat, tmp_path):
    shown_as(chat, tmp_path / "a", [{"messages": WEIGHED}], "--message-weights")
    shown_as(chat, tmp_path / "b", [{"messages": WEIGHED[2:4]}])
    done = run("tools.data", "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    assert done.returncode == 3
    assert "has other units of weights" in done.stderr


def test_tokens_and_masks(chat, talks, tmp_path):
    plain = [one for one in talks if "<" not in json.dumps(one)]
    assert len(plain) > 50
    done = prepare(chat, tmp_path / "out", write(tmp_path / "in.jsonl", plain), "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(
        run("tools.data", "inspect", "--chat", tmp_path / "out", "--head", len(plain), "--json", check=True).stdout
    )
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(chat / "tokenizer.json"))
    oracle.chat_template = template("qwen2_5")
    for record, found in zip(plain, shown, strict=True):
        messages = [{**one, "content": one.get("content", "")} for one in record["messages"]]
        expected = oracle.apply_chat_template(messages, tools=record.get("tools"), return_dict=False)
        assert found["tokens"] == expected
        assert len(found["mask"]) == len(expected)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.documents == len(plain)
    assert manifest.chat["trained_tokens"] == sum(sum(one["mask"]) for one in shown)
    assert manifest.chat["longest"] == max(len(one["tokens"]) for one in shown)
    assert run("tools.data", "verify", tmp_path / "out", check=True).returncode == 0


def test_forms_are_one(chat, tmp_path):
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    alpaca = {"instruction": "a", "input": "", "output": "b"}
    both = {"prompt": "a", "completion": "b"}
    files = [write(tmp_path / f"{at}.jsonl", [one]) for at, one in enumerate((openai, sharegpt, alpaca, both))]
    table = pyarrow.Table.from_pylist([{**openai, "conversations": None, "id": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "4.parquet")
    assert prepare(chat, tmp_path / "out", *files, tmp_path / "4.parquet").returncode == 0
    shown = json.loads(
        run("tools.data", "inspect", "--chat", tmp_path / "out", "--head", 9, "--json", check=True).stdout
    )
    assert len(shown) == 5
    assert all(one == shown[0] for one in shown)


def test_the_same_bytes_with_other_workers_and_after_a_stop(chat, talks, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", talks * 4)
    assert prepare(chat, tmp_path / "one", source, "--workers", 1).returncode == 0
    assert prepare(chat, tmp_path / "two", source, "--workers", 2).returncode == 0
    for ending in (".bin", ".mask", ".idx"):
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()
    again = prepare(chat, tmp_path / "two", source)
    assert again.returncode == 0, "its own output is recognised"
    (chat / "chat_template.jinja").write_text(template("qwen2_5") + " ")
    other = prepare(chat, tmp_path / "two", source)
    (chat / "chat_template.jinja").write_text(template("qwen2_5"))
    assert other.returncode == 2, "another template is another output"


def test_killed_at_any_moment(chat, talks, tmp_path):
    """Before calls that change the state of its files; ten of them in the thorough tier."""
    source = write(tmp_path / "in.jsonl", talks * 3)
    words = ("--workers", 2, "--shard-gib", 0.0001)
    assert prepare(chat, tmp_path / "whole" / "set", source, *words).returncode == 0
    whole = _files(tmp_path / "whole")
    assert sum(name.endswith(".mask") for name in whole) > 2
    interrupted = with_parts = 0
    moments = count(quick=1, thorough=10)
    for number in range(30, 31) if moments == 1 else range(3, 100, 5):
        out = tmp_path / f"out{number}" / "set"
        process = subprocess.Popen(
            command("tools.data", "prepare", "--chat", "--tokenizer", chat, "--output", out, source, *words),
            env={**environment(), kill_points.VARIABLE: str(number)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if process.wait(timeout=120) == 0:
            break
        assert process.returncode == -signal.SIGKILL
        interrupted += 1
        with_parts += len(list(out.parent.rglob("*.work/*.mask"))) > 0
        assert prepare(chat, out, source, *words).returncode == 0
        assert _files(out.parent) == whole
        if interrupted == moments:
            break
    assert interrupted == moments
    assert with_parts


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_left_out_is_counted(chat, talks, tmp_path):
    wrong = [record for record, _, _ in WRONG.values()]
    long = {"messages": [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "ok"}]}
    no_json = ["{", '{"messages": NaN}', '"\\ud800"']
    lines = [json.dumps(one, ensure_ascii=False) for one in (*talks[:40], *wrong, long)] + no_json
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    stopped = prepare(chat, tmp_path / "out", source)
    assert stopped.returncode == 3
    assert "Traceback" not in stopped.stderr
    assert f"{source}:41" in stopped.stderr
    done = prepare(chat, tmp_path / "out", source, "--on-error", "skip", "--max-tokens", 800, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["read"] == len(lines)
    assert manifest["documents"] == 40
    assert manifest["filtered"] == 1
    assert manifest["skipped"] == len(wrong) + len(no_json)
    reasons = Counter(reason for _, reason, _ in WRONG.values())
    reasons |= {"no JSON": len(no_json), "longer than 800 tokens": 1}
    assert manifest["chat"]["reasons"] == dict(sorted(reasons.items()))
    kept = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert Counter(one["reason"] for one in kept) == reasons - Counter({"longer than 800 tokens": 1})
    assert all(one["where"].startswith(f"{source}:") for one in kept)


def test_a_rendering_that_differs_is_found(chat, talks, tmp_path, monkeypatch):
    """The control of the comparison: a way of rendering plain turns that is wrong is not used."""
    from megatron_qwen.data.chat import plain_turns
    from megatron_qwen.data.chat.options import ChatOptions
    from megatron_qwen.data.chat.template import chat_template_of
    from megatron_qwen.data.prepare.plan import make_plan
    from megatron_qwen.data.text.blocks import ReadOptions
    from megatron_qwen.data.text.inputs import find_inputs

    source = write(tmp_path / "in.jsonl", [one for one in talks if "tools" not in one])

    def made(name):
        plan = make_plan(
            find_inputs([source], text_field="messages").files,
            tokenizer=chat,
            prefix=tmp_path / name,
            options=ReadOptions(chat=True),
            chat=ChatOptions(chat_template_of(chat)),
        )
        return job.prepare(plan, workers=1)

    right = made("right")
    real = plain_turns.PlainTurns.render

    def spoilt(self, messages):
        text = real(self, messages)
        return None if text is None else text + "\n"

    monkeypatch.setattr(plain_turns.PlainTurns, "render", spoilt)
    monkeypatch.setattr(plain_turns, "_tried", lambda turns: [])
    found = made("wrong")
    assert right.encoder == "gigatoken"
    assert "rendered otherwise than by its template" in found.encoder
    assert found.bin_xxh3_128 == right.bin_xxh3_128


def test_wrong_words(chat, qwen, talks, tmp_path):
    source = write(tmp_path / "in.jsonl", talks[:3])
    for words, message in (
        (("--field", "x"), "--field: has no effect on conversations"),
        (("--max-tokens", "1"), "--max-tokens = 1: must be at least 2"),
        (("--template-variable", "x"), "must be NAME=VALUE"),
    ):
        done = prepare(chat, tmp_path / "out", source, *words)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    done = run("tools.data", "prepare", "--chat", "--tokenizer", qwen, "--output", tmp_path / "out", source)
    assert done.returncode == 3
    assert "has no chat template" in done.stderr
    done = run("tools.data", "prepare", "--tokenizer", qwen, "--output", tmp_path / "out", source, "--max-tokens", 9)
    assert (done.returncode, "--max-tokens: needs --chat" in done.stderr) == (2, True)


def test_what_json_and_tables_have_besides(chat, tmp_path):
    """Numbers of any size; fields of a table's objects that another row has; no texts, and no depth without end."""
    large = 123456789012345678901234
    call = {"name": "f", "arguments": {"id": large}}
    asked = {"role": "user", "content": "a"}
    record = {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    deep = json.dumps({"messages": [asked, {"role": "assistant", "content": "b"}], "tools": [{"name": "f", "x": 0}]})
    deep = deep.replace("0", "[" * 600 + "]" * 600)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(record) + "\n" + deep + "\n")
    rows = []
    for name, field in (("f", "x"), ("g", "y")):
        call = {"name": name, "arguments": {field: 1}}
        rows.append({"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    done = prepare(chat, tmp_path / "out", source, tmp_path / "in.parquet", "--on-error", "skip", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chat"]["reasons"] == {"nested too deeply": 1}
    words = ("--chat", tmp_path / "out", "--tokenizer", chat, "--head", 9)
    shown = run("tools.data", "inspect", *words, check=True).stdout
    assert str(large) in shown
    assert '"arguments": {"x": 1}' in shown
    assert '"arguments": {"y": 1}' in shown
    (tmp_path / "notes.txt").write_text("text")
    done = prepare(chat, tmp_path / "other", tmp_path / "notes.txt")
    assert (done.returncode, "is a text; conversations are" in done.stderr) == (3, True), done.stderr


def test_what_inspect_shows(chat, talks, tokens, tmp_path):
    assert prepare(chat, tmp_path / "out", write(tmp_path / "in.jsonl", talks[:20])).returncode == 0
    words = ("--chat", tmp_path / "out", "--tokenizer", chat)
    shown = run("tools.data", "inspect", *words, "--head", 2, check=True).stdout
    assert shown.count("with loss") == 2
    assert "\u27e6" in shown
    assert "<|im_end|>\u27e7" in shown
    page = tmp_path / "page.html"
    run("tools.data", "inspect", *words, "--random", 3, "--html", page, check=True)
    assert page.read_text().count('<div class="chat">') == 3
    other = run("tools.data", "inspect", "--chat", tokens, "--json")
    assert (other.returncode, "has no loss mask" in other.stderr) == (3, True)
    assert run("tools.data", "inspect", "--chat", tmp_path / "out").returncode == 2
    assert run("tools.data", "inspect", tmp_path / "out", "--head", 5).returncode == 2
    tokens_of = TokenSet(tmp_path / "out")
    assert np.isin(tokens_of.loss_mask(0, tokens_of.num_tokens), (0, 1)).all()
