"""Fine-tuning against transformers: every conversation alone in a forward pass, the mean over the whole batch."""

import itertools

import numpy as np
import pytest
import torch

from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.errors import DataError
from tests.distributed.layouts import CP2, EP2, PP2, SP, TP2
from tests.tiers import cases
from tests.training import ranks
from tests.training.attempts import attempt
from tests.training.cases import config_of
from tests.training.reference import IGNORED, exported, transformers_model

LENGTH, BATCH = 256, 8
NO_ROUTER = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}


def sft(recipe, documents, start=None, *, average="token", layout=None, micro=1, **sections):
    """Fine-tuning with unequal shares of tokens with loss."""
    sections.setdefault("data", {})
    return config_of(
        recipe,
        documents,
        start,
        objective={"kind": "sft", "average": average},
        data={"seq_length": LENGTH, "validation_fraction": 0.1} | sections.pop("data"),
        training={"micro_batch_size": micro, "global_batch_size": BATCH} | sections.pop("training", {}),
        optim={"clip_grad": 0.0},
        parallel=layout or {},
        model=NO_ROUTER if recipe == "tiny_moe" else {},
        **sections,
    )


def packed_rows(config, documents):
    """Which documents each row of the first step holds: the text is random, so its beginning names a document."""
    starts = np.cumsum([0, *documents.lengths])[:-1]
    first = {tuple(documents.tokens[start : start + 12]): number for number, start in enumerate(starts)}
    reader, rows = TrainingData(config).at(0), []
    for sample in range(BATCH):
        read = reader[sample]
        begins = [start for start in read.starts.tolist() if start < LENGTH - read.padding]
        rows.append([first[tuple(read.tokens[start : start + 12])] for start in begins])
    return rows


def expected(recipe, start, documents, average, rows):
    """Loss and gradient norm by transformers; the weight is what the mean is over."""
    model = transformers_model(recipe, exported(config_of(recipe, documents), start))
    starts = np.cumsum([0, *documents.lengths])
    total, weight = torch.zeros(()), 0
    for row in rows:
        losses = []
        for number in row:
            span = slice(starts[number], starts[number + 1])
            tokens = torch.from_numpy(documents.tokens[span].copy())
            labels = tokens[1:].clone()
            labels[documents.carries[span][1:] == 0] = IGNORED
            logits = model(tokens[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != IGNORED])
        units = [torch.cat(losses)] if average == "sample" else losses
        units = [unit for unit in units if len(unit)]
        if average == "token":
            total, weight = total + sum(unit.sum() for unit in units), weight + sum(len(unit) for unit in units)
        else:
            total, weight = total + sum(unit.mean() for unit in units), weight + len(units)
    loss = total / weight
    loss.backward()
    norm = torch.sqrt(
        sum(parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None)
    )
    return loss.item(), norm.item(), weight


ONE = [("one rank", 1, {}, 1), ("micro-batches of 2", 1, {}, 2), ("micro-batches of 4", 1, {}, 4)]
TWO = [("DP2", 2, {}, 1), ("CP2", 2, CP2, 1), ("TP2+SP", 2, TP2 | SP, 2), ("PP2", 2, PP2, 2)]
CASES = [("tiny_dense", "token", *one) for one in (*ONE, *TWO)]
CASES += [("tiny_dense", average, *one) for average in ("sequence", "sample") for one in (ONE[1], TWO[1])]
CASES += cases(
    [("tiny_moe", "token", "EP2", 2, EP2, 1)],
    [("tiny_dense", average, *one) for average in ("sequence", "sample") for one in (ONE[2], *TWO)]
    + [("tiny_moe", average, "EP2", 2, EP2, 2) for average in ("token", "sequence")]
    + [
        ("tiny_dense", "token", "TP2+SP x PP2", 4, TP2 | SP | PP2, 1),
        ("tiny_dense", "token", "TP2 x CP2", 4, TP2 | CP2, 1),
    ],
)


@pytest.mark.parametrize(("recipe", "average", "name", "size", "layout", "micro"), CASES)
def test_loss_and_gradient(recipe, average, name, size, layout, micro, pool, starts, masked_documents, tmp_path):
    config = sft(recipe, masked_documents, starts[recipe], average=average, layout=layout, micro=micro)
    rows = packed_rows(config, masked_documents)
    assert max(map(len, rows)) >= 3
    loss, norm, weight = _expected(recipe, starts[recipe], masked_documents, average, rows)
    for (step,) in pool[size].run(ranks.steps_from, config, tmp_path, 1):
        assert step["weight"] == weight
        assert step["loss"] == pytest.approx(loss, rel=1e-6)
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)
        carried = sum(int(masked_documents.carries[span][1:].sum()) for span in _spans(rows, masked_documents))
        held = sum(masked_documents.lengths[number] for row in rows for number in row)
        assert step["metrics"]["trained_fraction"] == pytest.approx(carried / held, rel=1e-6)


def _spans(rows, documents):
    starts = np.cumsum([0, *documents.lengths])
    return [slice(starts[number], starts[number + 1]) for row in rows for number in row]


_KEPT: dict = {}


def _expected(recipe, start, documents, average, rows):
    key = (recipe, average, repr(rows))
    if key not in _KEPT:
        _KEPT[key] = expected(recipe, start, documents, average, rows)
    return _KEPT[key]


def test_the_averages_differ(starts, masked_documents):
    """The control: one that were taken for another would be seen."""
    rows = packed_rows(sft("tiny_dense", masked_documents), masked_documents)
    losses = [
        _expected("tiny_dense", starts["tiny_dense"], masked_documents, one, rows)[0]
        for one in ("token", "sequence", "sample")
    ]
    assert min(abs(a - b) / b for a, b in zip(losses, [*losses[1:], losses[0]], strict=True)) > 2e-5


def test_held_out_conversations_are_read_as_training_reads_them(masked_documents):
    config = sft("tiny_dense", masked_documents, training={"eval_iters": 1})
    data = TrainingData(config)
    held_out = data.validation(data.at(0))
    assert held_out.is_packed
    assert held_out.windows == 6  # of 175 tokens each, none of which shares a row
    seen = set()
    for index in range(6):
        sample = held_out[index]
        assert sample.padding == LENGTH - 175
        assert sample.starts.tolist() == [0, 175]
        seen.add(tuple(sample.tokens[:12]))
    starts = np.cumsum([0, *masked_documents.lengths])[-7:-1]
    assert seen == {tuple(masked_documents.tokens[start : start + 12]) for start in starts}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 128}, r"conversations: are longer than data.seq_length = 128 and would be cut"),
        ({"packing": "windows"}, r"windows: lets conversations attend to one another and cuts them"),
    ],
)
def test_conversations_are_neither_cut_nor_mixed(changes, message, masked_documents):
    with pytest.raises(DataError, match=message):
        TrainingData(sft("tiny_dense", masked_documents, data=changes))


def test_lengths_of_a_stage_would_cut_conversations(masked_documents, tmp_path):
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        f"sources: {{chat: {{path: {masked_documents.prefix}, packing: best_fit}}}}\n"
        "stages: [{name: one, weights: {chat: 1.0}, seq_length: 256, lengths: {64: 1.0}}]\n"
    )
    config = sft("tiny_dense", masked_documents, data={"path": None, "blend": str(blend)})
    with pytest.raises(DataError, match="lengths of stage one: cuts conversations"):
        TrainingData(config)


def test_texts_alone_are_refused(documents):
    with pytest.raises(DataError, match="has no loss mask: every token would be trained"):
        TrainingData(sft("tiny_dense", documents))


@pytest.mark.parametrize(("size", "layout"), cases([(2, {}), (2, TP2 | SP)], [(1, {}), (2, PP2), (2, CP2)]))
def test_validation_tells_the_loss_by_who_wrote(size, layout, pool, starts, masked_documents, tmp_path):
    """Of the held-out conversations, each alone in transformers."""
    config = sft("tiny_dense", masked_documents, starts["tiny_dense"], layout=layout, training={"eval_iters": 1})
    config = config.with_section("training", train_iters=1).with_section("optim", learning_rate=1e-12)
    config = config.with_section("optim", min_learning_rate=0.0, lr_warmup_iters=0, lr_decay_iters=None)
    record = attempt(pool, size, config, tmp_path / "run")[-1]
    data = TrainingData(config)
    samples = data.validation(data.at(0))
    model = transformers_model("tiny_dense", exported(config, starts["tiny_dense"]))
    found = {"assistant": [], "prompt": []}
    for index in range(BATCH):
        sample = samples[index]
        tokens = torch.from_numpy(sample.tokens[:175].copy())
        losses = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        carries = torch.from_numpy(sample.loss_mask[:174]) > 0
        found["assistant"] += losses[carries].tolist()
        found["prompt"] += losses[~carries].tolist()
    for role, losses in found.items():
        assert record[f"validation_loss/data/{role}"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert record["validation_loss"] == pytest.approx(record["validation_loss/data/assistant"], rel=1e-5)


@pytest.mark.parametrize("packing", cases(["windows"], ["best_fit"]))
def test_texts_mixed_in_carry_loss_on_every_token(packing, pool, starts, documents, masked_documents, tmp_path):
    """A blend of conversations and pretraining text; the oracle knows rows, and where sequences begin in them."""
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        f"sources:\n  chat: {{path: {masked_documents.prefix}, packing: best_fit}}\n"
        f"  text: {{path: {documents.prefix}, packing: {packing}}}\n"
        "stages: [{name: one, weights: {chat: 1.0, text: 1.0}}]\n"
    )
    config = sft("tiny_dense", masked_documents, starts["tiny_dense"], data={"path": None, "blend": str(blend)})
    model = transformers_model("tiny_dense", exported(config, starts["tiny_dense"]))
    reader, total, weight, whole = TrainingData(config).at(0), 0.0, 0, 0
    for number in range(BATCH):
        sample = reader[number]
        bounds = [*sample.starts.tolist(), LENGTH]
        text = sample.loss_mask[: LENGTH - sample.padding - 1]
        whole += int((text > 0).mean() > 0.95)
        for begin, end in itertools.pairwise(bounds):
            carries = torch.from_numpy(sample.loss_mask[begin:end].copy()) > 0
            if carries.any():
                tokens, labels = (torch.from_numpy(row[begin:end].copy()) for row in (sample.tokens, sample.labels))
                with torch.no_grad():
                    losses = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], labels, reduction="none")
                total, weight = total + losses[carries].sum().item(), weight + int(carries.sum())
    assert BATCH // 2 <= whole < BATCH  # of the conversations some are answers alone
    (step,) = pool[2].run(ranks.steps_from, config, tmp_path / "run", 1)[0]
    assert step["weight"] == weight
    assert step["loss"] == pytest.approx(total / weight, rel=1e-6)
    validated = config.with_section("training", train_iters=1, eval_iters=2).with_section("optim", lr_decay_iters=None)
    validated = validated.with_section("optim", lr_warmup_iters=0)
    record = attempt(pool, 2, validated, tmp_path / "validated")[-1]
    parts = {name for name in record if name.startswith("validation_loss/")}
    assert parts == {"validation_loss/chat/assistant", "validation_loss/chat/prompt", "validation_loss/text/text"}
