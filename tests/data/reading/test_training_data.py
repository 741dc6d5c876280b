"""Whatever changes while a run is under way, every source is read without losing or repeating a token."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data.loaders.batches import BatchRequest, BatchSlice, micro_batches
from megatron_qwen.data.order import stream
from megatron_qwen.data.order.phase import SourcePosition
from megatron_qwen.data.reading.replay import Replay
from megatron_qwen.data.reading.training_data import TrainingData, order_of
from megatron_qwen.data.token_files.manifest import Manifest, file_digest, with_ending, write_manifest
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.errors import ConfigError, DataError
from tests.data.blends import VOCABULARY, open_run, run_config, write_source
from tests.tiers import count
from tests.training.attempts import configure

TOTALS = {"a": 400, "b": 1500, "c": 90, "d": 777}

change = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("weights"), st.lists(st.integers(1, 9), min_size=4, max_size=4)),
    st.tuples(st.just("sources"), st.sets(st.sampled_from("abcd"), min_size=1)),
    st.tuples(st.just("length"), st.sampled_from([3, 8, 16, 50])),
    st.tuples(st.just("batch"), st.sampled_from([4, 8, 12])),
    st.tuples(st.just("ranks"), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("save"), st.none()),
    st.tuples(st.just("kill"), st.none()),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    path = Path(tempfile.mkdtemp())
    for name, total in TOTALS.items():
        write_source(path / name, total)
    return path


class Model:
    """A run as a person would follow it with pencil and paper: the settings, and every token that was seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = dict.fromkeys("ab", 1)
        self.settings = {"length": 16, "batch": 4, "ranks": 1}
        self.seen: dict[str, Counter] = {name: Counter() for name in TOTALS}
        self.consumed = 0
        self.data = self._open()
        self.saved: Any = None
        self._save()

    def apply(self, what: str, value: Any) -> None:
        """One change."""
        if what == "steps":
            for _ in range(value):
                self._step()
        elif what == "save":
            self._save()
        elif what == "kill":
            self._load()
        else:
            # A person stops the run, changes it, and starts it again.
            self._save()
            if what == "weights":
                self.weights = {name: value["abcd".index(name)] for name in self.weights}
            elif what == "sources":
                self.weights = {name: self.weights.get(name, 2) for name in sorted(value)}
            else:
                self.settings[what] = value
            self._load()

    def finish(self) -> None:
        """Reads what changes have left over, then to the end of an epoch: every token was seen as often as another."""
        state = self.data.state(self.consumed)
        for name, noted in state["positions"].items():
            order = order_of(self.data.sources[name], self.data.seed) if name in self.data.sources else None
            if order is None:
                continue
            position = SourcePosition.restored(noted)
            pieces = position.cut(order, position.seq_length + 1).pieces
            left = sum(piece.stop - piece.start for piece in pieces[:-1])
            total, read = TOTALS[name], sum(self.seen[name].values())
            rest = left + -(read + left) % total
            for begin, end in stream.segments(order.windows, pieces, 0, rest):
                self.seen[name].update(range(begin, end))
            assert set(self.seen[name].values()) <= {(read + rest) // total}, name
            assert len(self.seen[name]) in (0, total), name

    def _open(self) -> TrainingData:
        blend = {
            "sources": {name: {"path": str(self.folder / name)} for name in TOTALS},
            "stages": [{"name": "only", "weights": self.weights, "seq_length": self.settings["length"]}],
        }
        return open_run(self.folder, blend)

    def _step(self) -> None:
        reader = self.data.at(self.consumed)
        ranks, batch = self.settings["ranks"], self.settings["batch"]
        seen = []
        for rank in range(ranks):
            batch_slice = BatchSlice(rank, ranks, 0, 1, torch.device("cpu"))
            for micro in micro_batches(reader, batch_slice, BatchRequest(self.consumed, batch, 1)):
                seen.append(tuple(micro.tokens.flatten().tolist()))
        # Which source a sample is of the tokens do not say; the phase does, and the tokens must be those it names.
        expected = []
        for number in range(self.consumed, self.consumed + batch):
            name, runs, _ = reader.traced(number)
            tokens = [position for begin, end in runs for position in range(begin, end)]
            expected.append(tuple(tokens))
            self.seen[name].update(tokens)
        assert sorted(seen) == sorted(expected)
        self.consumed += batch
        counts = reader.phase.counts(self.consumed - reader.phase.first_sample)
        weight = sum(self.weights.values())
        for name, share in self.weights.items():
            assert abs(counts[name] - share / weight * sum(counts.values())) < 1

    def _save(self) -> None:
        seen = {name: Counter(counter) for name, counter in self.seen.items()}
        self.saved = json.dumps(self.data.state(self.consumed)), self.consumed, seen

    def _load(self) -> None:
        text, self.consumed, seen = self.saved
        self.seen = {name: Counter(counter) for name, counter in seen.items()}
        self.data = self._open()
        self.data.resume(json.loads(text))


@settings(max_examples=count(quick=200, thorough=500), deadline=None)
@given(st.lists(change, min_size=1, max_size=14))
def test_any_changes(folder, changes):
    sizes = stream._LEAST_BLOCK, stream._BLOCKS_OF_GROUP
    stream._LEAST_BLOCK, stream._BLOCKS_OF_GROUP = 32, 4  # so that small sources have many blocks and groups
    try:
        model = Model(folder)
        for what, value in changes:
            model.apply(what, value)
        model.finish()
    finally:
        stream._LEAST_BLOCK, stream._BLOCKS_OF_GROUP = sizes


def blend(folder: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    return {"sources": {name: {"path": str(folder / name)} for name in "ab"}, "stages": list(stages)}


TWO_STAGES = (
    {"name": "short", "tokens": 320, "seq_length": 16, "weights": {"a": 1, "b": 1}},
    {"name": "long", "seq_length": 50, "rotary_base": 5e5, "weights": {"b": 1}},
)


def test_stages_follow_one_another(folder):
    data = open_run(folder, blend(folder, *TWO_STAGES))
    stages, consumed = [], 0
    for _ in range(8):
        reader = data.at(consumed)
        stages.append((reader.stage.name, reader.seq_length, len(reader[consumed].tokens)))
        consumed += 6
    assert stages == [("short", 16, 16)] * 4 + [("long", 50, 50)] * 4  # the step that passes 20 samples is still short
    records = data.ledger(consumed)
    assert [(record.stage, record.first_sample, record.samples) for record in records] == [
        ("short", 0, 24),
        ("long", 24, 24),
    ]
    assert records[0].counts == {"a": 12, "b": 12}
    assert data.at(consumed).config.rope.base == 5e5


def test_looking_ahead_changes_nothing(folder):
    """A loader asks for later steps, beyond a stage's end, while the state of an earlier one is saved."""
    ahead, plain = (open_run(folder, blend(folder, *TWO_STAGES)) for _ in range(2))
    ahead.at(24)[24]
    ahead.at(30)[30]
    plain.at(12)
    assert ahead.state(12) == plain.state(12)
    assert ahead.at(12)[12].tokens.tolist() == plain.at(12)[12].tokens.tolist()


def test_a_stage_that_was_only_opened_has_not_begun(folder):
    """At the boundary, where the loader has the next stage open and no step has read of it."""
    data = open_run(folder, blend(folder, *TWO_STAGES))
    data.at(24)[24]
    assert data.latest(24).stage.name == "short"
    assert [(entry.stage, entry.samples) for entry in data.ledger(24)] == [("short", 24)]
    assert [phase["stage"] for phase in data.state(24)["phases"]] == ["short"]
    assert data.latest(30).stage.name == "long"


def test_a_replay_finds_what_a_step_saw(folder):
    data = open_run(folder, blend(folder, *TWO_STAGES))
    saw = []
    for consumed in range(0, 48, 6):
        reader = data.at(consumed)
        saw += [reader[number].tokens.tolist() for number in range(consumed, consumed + 6)]
        data.forget(consumed)
    replay = Replay(data.config, json.loads(json.dumps(data.state(48))))
    assert [replay[number][2].tokens.tolist() for number in range(48)] == saw
    with pytest.raises(ConfigError, match="is beyond the ledger"):
        replay[48]


def test_a_source_may_leave_and_come_back(folder):
    """It goes on where it was, and the sample order of the others does not depend on it."""
    data = open_run(folder, blend(folder, {"name": "s", "weights": {"a": 1, "b": 1}}))
    reader = data.at(0)
    first = [(reader.traced(number)[0], *reader[number].tokens) for number in range(20)]
    state = data.state(20)
    for weights in ({"b": 1}, {"a": 1, "b": 1}):
        data = open_run(folder, blend(folder, {"name": "s", "weights": weights}))
        data.resume(json.loads(json.dumps(state)))
        begin = sum(phase["samples"] for phase in state["phases"])
        reader = data.at(begin)
        first += [(reader.traced(number)[0], *reader[number].tokens) for number in range(begin, begin + 10)]
        state = data.state(begin + 10)
    assert len(set(first)) == len(first)
    assert [phase["weights"] for phase in state["phases"]] == [{"a": 0.5, "b": 0.5}, {"b": 1.0}, {"a": 0.5, "b": 0.5}]


def test_a_source_that_holds_other_tokens_is_refused(folder, tmp_path):
    data = open_run(folder, blend(folder, {"name": "s", "weights": {"a": 1}}))
    state = data.state(8)
    for name in "ab":
        write_source(tmp_path / name, 401)
    other = open_run(tmp_path, blend(tmp_path, {"name": "s", "weights": {"a": 1}}))
    with pytest.raises(DataError, match="source a: tokens = 401: the run has read it with tokens = 400"):
        other.resume(state)


def noted(prefix: Path, first: int) -> None:
    """A source of 400 tokens from ``first`` on, with the manifest that `mq data prepare` writes."""
    with TokenFileWriter(prefix, vocab_size=VOCABULARY) as writer:
        writer.add(range(first, first + 200))
        writer.add(range(first + 200, first + 400))
    counts = {"documents": 2, "tokens": 400, "read": 2, "empty": 0, "filtered": 0, "skipped": 0, "text_bytes": 0}
    made = {"vocab_size": VOCABULARY, "end_of_text": 0, "control_tokens": {}, "tokenizer_sha256": "", "encoder": ""}
    digest = file_digest(with_ending(prefix, ".bin"))
    write_manifest(prefix, Manifest(**counts, **made, made_by="", bin_xxh3_128=digest))


def test_a_source_of_the_same_size_with_other_tokens_is_refused(tmp_path):
    stage = {"name": "s", "weights": {"a": 1}}
    for name, first in (("one", 0), ("copy", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        noted(tmp_path / name / "a", first)
    one, copy, other = (
        open_run(tmp_path / name, {"sources": {"a": {"path": str(tmp_path / name / "a")}}, "stages": [stage]})
        for name in ("one", "copy", "other")
    )
    copy.resume(one.state(8))
    with pytest.raises(DataError, match="source a: digest"):
        other.resume(one.state(8))


def test_the_stage_under_way_must_stay(folder):
    data = open_run(folder, blend(folder, {"name": "s", "weights": {"a": 1}}))
    other = open_run(folder, blend(folder, {"name": "t", "weights": {"a": 1}}))
    with pytest.raises(ConfigError, match="is the current stage of the run, but the blend has only t"):
        other.resume(data.state(8))


def test_changing_only_weights_keeps_each_source_in_its_order(folder):
    one = open_run(folder, blend(folder, {"name": "s", "weights": {"a": 1}}))
    reader = one.at(0)
    order = [reader[number].tokens.tolist() for number in range(20)]
    other = open_run(folder, blend(folder, {"name": "s", "weights": {"a": 1, "b": 3}}))
    other.resume(one.state(10))
    reader = other.at(10)
    traced = [reader.traced(number) for number in range(10, 50)]
    assert [sample.tokens.tolist() for name, _, sample in traced if name == "a"][:10] == order[10:]


def test_a_config_file_that_was_not_changed_goes_on_in_the_same_phase(folder):
    config = run_config(folder, blend(folder, {"name": "s", "weights": {"a": 1, "b": 2}}))
    data = TrainingData(config)
    reader = data.at(0)
    order = [reader[number].tokens.tolist() for number in range(30)]
    again = TrainingData(config)
    again.resume(json.loads(json.dumps(data.state(12))))
    reader = again.at(12)
    assert [reader[number].tokens.tolist() for number in range(12, 30)] == order[12:]
    assert len(again.ledger(30)) == 1


def test_a_packed_source_goes_on_where_it_was(folder):
    content = {
        "sources": {"b": {"path": str(folder / "b"), "packing": "best_fit"}, "d": {"path": str(folder / "d")}},
        "stages": [{"name": "s", "weights": {"b": 2, "d": 1}, "seq_length": 80}],
    }
    straight = open_run(folder, content)
    reader = straight.at(0)
    order = [reader[number].tokens.tolist() for number in range(90)]
    data, state = open_run(folder, content), None
    for consumed in range(0, 90, 15):
        if state is not None:
            data = open_run(folder, content)
            data.resume(json.loads(json.dumps(state)))
        reader = data.at(consumed)
        assert [reader[number].tokens.tolist() for number in range(consumed, consumed + 15)] == order[
            consumed : consumed + 15
        ]
        state = data.state(consumed + 15)
    assert state["positions"]["b"]["cursor"]["pool"] > 0  # found without packing what came before
    assert len(state["phases"]) == 1


def test_what_is_training_data_does_not_depend_on_validating(tokens):
    config = configure("tiny_dense", tokens)
    readers = [TrainingData(config.with_section("training", eval_iters=iters)).at(0) for iters in (2, 0)]
    assert readers[0].data.sources["data"].stop == readers[1].data.sources["data"].stop
    assert (readers[0][5].tokens == readers[1][5].tokens).all()
