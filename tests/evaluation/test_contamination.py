"""Planted items are found where a run has read them, and not where it has not."""

import json
import random

import numpy as np
import pytest

from megatron_qwen.evaluation.contamination import NGRAM, TestIndex, longest, merged
from tests.conftest import run
from tests.evaluation.tasks import CHOICE, write_tasks
from tests.tiers import count


def reference(item, tokens, ngram):
    """Longest common run of two lists, by a table (Wagner and Fischer's recurrence for substrings)."""
    best = 0
    before = [0] * (len(tokens) + 1)
    for one in item:
        row = [0] * (len(tokens) + 1)
        for at, other in enumerate(tokens, start=1):
            row[at] = before[at - 1] + 1 if one == other else 0
        best, before = max(best, *row), row
    return best if best >= ngram else 0


def test_against_a_table_of_all_pairs():
    """Small vocabularies, where runs repeat and overlap."""
    dice = random.Random(0)
    for trial in range(count(quick=40, thorough=400)):
        vocabulary, ngram = dice.choice([2, 3, 10]), dice.choice([5, 8])
        items = [[dice.randrange(vocabulary) for _ in range(dice.randrange(40))] for _ in range(8)]
        samples = [[dice.randrange(vocabulary) for _ in range(60)] for _ in range(4)]
        for sample, item in zip(samples, items, strict=False):  # a part of an item in a sample
            at, length = dice.randrange(40), dice.randrange(1, 20)
            sample[at : at + length] = item[:length]
        found = longest(
            TestIndex(items, ngram=ngram), [(number, "s", np.array(one)) for number, one in enumerate(samples)]
        )
        for number, item in enumerate(items):
            expected = max((reference(item, sample, ngram) for sample in samples), default=0)
            assert (found[number].tokens if number in found else 0) == expected, trial
        for number, one in found.items():
            run_ = items[number][one.start : one.start + one.tokens]
            assert samples[one.sample][one.position : one.position + one.tokens] == run_


def test_words_of_the_task_are_no_item():
    """An n-gram of many items is left out; runs that begin with one are found from there on, and back over it."""
    template = list(range(100, 120))
    items = [[*template, *range(1000 * number, 1000 * number + 30)] for number in range(1, 40)]
    index = TestIndex(items)
    assert index.common == len(template) - NGRAM + 1
    nothing = longest(index, [(0, "s", np.array([1, 2, *template, 3]))])
    assert nothing == {}
    (one,) = longest(index, [(0, "s", np.array([5, *items[7], 6]))]).items()
    assert (one[0], one[1].tokens, one[1].position, one[1].start) == (7, 50, 1, 0)


def test_parts_are_joined_as_one_pass_finds_it():
    dice = np.random.default_rng(0)
    item = dice.integers(0, 50_000, 40)
    samples = [(number, "s", dice.integers(0, 50_000, 200)) for number in range(6)]
    samples[4][2][10:30], samples[5][2][60:80] = item[:20], item[20:]
    index = TestIndex([item.tolist()])
    whole = longest(index, samples)
    assert (whole[0].sample, whole[0].tokens) == (4, 20)
    assert merged([longest(index, samples[5:]), longest(index, samples[:5])]) == whole


SEQ, STEPS, ITEMS = 64, 8, 72


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tokenizer, pool):
    """A run over two sources, of which it reads one; tasks with items from it, from the other, and from neither."""
    root = tmp_path_factory.mktemp("planted")
    dice = random.Random(1)
    words = [f"{dice.choice('bcdfgk')}{dice.choice('aeiou')}{dice.choice('lmnrst')}{number}" for number in range(4000)]
    texts = {name: " ".join(dice.choice(words) for _ in range(3000)) for name in ("read", "unread", "neither")}
    for name in ("read", "unread"):
        (root / f"{name}.jsonl").write_text(json.dumps({"text": texts[name]}) + "\n")
        prepare = ("prepare", "--tokenizer", tokenizer, "--output", root / name, root / f"{name}.jsonl")
        run("tools.data", *prepare, check=True)
    words = (
        f"data.path={root / 'read'}",
        f"data.tokenizer={tokenizer}",
        f"data.seq_length={SEQ}",
        "data.validation_fraction=0",
    )
    run(
        "launch.train",
        "tiny_dense",
        *words,
        f"training.train_iters={STEPS}",
        "checkpoint.save_interval=4",
        "training.eval_interval=0",
        "data.validation_fraction=0",
        "--run-dir",
        root / "run",
        check=True,
    )
    return root, texts


def test_what_a_run_has_read(planted, tokenizer, tmp_path):
    from checkpoints_convert.model_source import open_model_source
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
    from tools.evaluation.search import Item, WhatWasRead, search

    root, texts = planted
    checkpoint = open_model_source(root / "run", iteration=None).checkpoint
    read = WhatWasRead(checkpoint.config, checkpoint.state["data"])
    encoder = load_tokenizer(tokenizer)
    windows = [tokens.tolist() for _, _, tokens in read.samples(0, 4)]
    unread = encoder.encode_batch([texts["unread"]])[0]
    neither = encoder.encode_batch([texts["neither"]])[0]
    stream = encoder.encode_batch([texts["read"]])[0]
    place = next(at for at in range(len(stream)) if stream[at : at + SEQ] == windows[0][:SEQ])
    items = [
        windows[0][10:50],  # in the middle of a window
        windows[1],  # all of one
        [*neither[:30], *windows[2][5:25], *neither[30:60]],  # a part, in other text
        stream[place + SEQ - 9 : place + SEQ + 31],  # over the end of a window: 9 tokens here, and what follows it
        unread[100:140],
        neither[100:140],
        windows[0][10 : 10 + NGRAM - 1],  # too short
    ]
    found = search(read, [Item("t", number, one) for number, one in enumerate(items)], ngram=NGRAM, workers=2)
    assert {number: one.tokens for number, one in found.items() if number in (0, 1, 2)} == {0: 40, 1: SEQ + 1, 2: 20}
    assert (found[2].start, found[2].position, found[2].sample) == (30, 5, 2)
    assert found[0].sample == 0
    # The window behind it may have been read, too; the run never reaches over the end.
    assert 3 not in found or found[3].tokens <= 31
    assert not {4, 5, 6} & set(found)


def test_the_command(planted, tmp_path):
    """Scores with and without the items that were found; a later checkpoint has read more."""
    root, texts = planted
    words = {name: text.split() for name, text in texts.items()}
    records = [
        {"context": " ".join(words[name][at : at + 12]), "choices": [words[name][at + 12], "no"], "gold": 0}
        for name in ("read", "neither")
        for at in range(0, 40 * ITEMS, 40)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "planted.yaml").write_text(
        f"task: planted\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    asked = (root / "run", "--tasks", "planted", "--task-dir", folder, "--output", tmp_path / "out")
    run("tools.eval", *asked, check=True)
    by_iteration = []
    for iteration in (4, 8):
        done = run(
            "tools.eval", *asked, "--contamination", "--json", "--iteration", iteration, "--workers", 1, check=True
        )
        by_iteration.append(json.loads(done.stdout)["planted"])
    assert 0 < by_iteration[0]["found"] < by_iteration[1]["found"] <= ITEMS
    said = by_iteration[1]
    assert (said["items"], said["too_short"]) == (2 * ITEMS, 0)
    scores = said["scores"]["acc,none"]
    share = said["found"] / (2 * ITEMS)
    assert scores["all"] == pytest.approx(share * scores["found"] + (1 - share) * scores["others"])
    lines = [json.loads(line) for line in (tmp_path / "out/contamination/planted.jsonl").read_text().splitlines()]
    assert [bool(line["longest"]) for line in lines[ITEMS:]] == [False] * ITEMS
    done = run("tools.eval", *asked, "--contamination", "--ngram", 3, "--workers", 0)
    assert done.returncode == 2
    assert all(told in done.stderr for told in ("--ngram", "--workers"))


def test_no_ledger(planted, tmp_path):
    root, _ = planted
    run("checkpoints_convert.convert", "to-hf", root / "run", tmp_path / "hf", check=True)
    folder = write_tasks(tmp_path / "tasks", items=2)
    done = run("tools.eval", tmp_path / "hf", "--tasks", CHOICE, "--task-dir", folder, "--contamination")
    assert done.returncode == 3
    assert "does not say what it has read" in done.stderr
    assert "Traceback" not in done.stderr
