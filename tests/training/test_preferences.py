"""Preferences against TRL's trainers and against the definition, packed and under every layout."""

import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from launch.demo import standard_library
from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.errors import DataError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import ROOT, environment, run
from tests.data.chat.conftest import template
from tests.distributed import jobs
from tests.distributed.layouts import CP2, EP2, PP2, SP, TP2
from tests.tiers import cases
from tests.training.attempts import attempt

STEPS, BATCH, LENGTH, RATE = 5, 4, 192, 1e-3
# Objective, its loss, label smoothing, weight of the chosen answer's cross-entropy.
KINDS = [
    ("dpo", "sigmoid", 0.0, 0.0),
    ("orpo", "", 0.0, 0.0),
    ("dpo", "sigmoid", 0.0, 0.2),  # TRL's sigmoid has no smoothing: that is compared below
    ("dpo", "hinge", 0.0, 0.0),
    ("dpo", "ipo", 0.0, 0.0),
    ("dpo", "robust", 0.1, 0.0),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, pool):
    """A tokenizer, a model, pairs that each fill a row, and short ones of which several do."""
    root = tmp_path_factory.mktemp("pairs")
    texts = [document["text"] for document in standard_library(200_000)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(
        *("tools.data", "tokenizer", "train", "--vocab-size", 512, "--output", root / "tok", root / "text.jsonl"),
        check=True,
    )
    (root / "tok" / "chat_template.jinja").write_text(template("qwen2_5"))
    dice = random.Random(0)

    def words(count):
        return " ".join("".join(dice.choices("abcdefgh", k=3)) for _ in range(count))

    for name, size in (("long", 12), ("short", 2)):
        records = [
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": words(2)}],
                "chosen": words(dice.randrange(size // 2, size + 1)),
                "rejected": words(dice.randrange(size // 2, size + 1)),
            }
            for _ in range(64)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        done = run(
            *("tools.data", "prepare", "--pairs", "--tokenizer", root / "tok"),
            *("--output", root / name, root / f"{name}.jsonl"),
        )
        assert done.returncode == 0, done.stderr
    for recipe in ("tiny_dense", "tiny_moe"):
        config = configure(root, recipe, "long", "objective.kind=pretrain", start=False)
        config = config.with_section("data", path=str(root / "text"))
        (root / recipe).mkdir()
        run(
            *("tools.data", "prepare", "--tokenizer", root / "tok", "--output", root / "text", root / "text.jsonl"),
            check=True,
        )
        RunDirectory(root / recipe).claim(config)
        pool[1].run(jobs.train, config, 0, root / recipe / "checkpoints")
    return root


def configure(root, recipe, data, *words, start=True):
    model = ["model.vocab_size=512", f"model.max_position_embeddings={LENGTH}"]
    if recipe == "tiny_moe":
        model += ["model.moe_aux_loss_coeff=0.0", "model.moe_z_loss_coeff=0.0"]
    base = [f"data.path={root / data}", f"data.tokenizer={root / 'tok'}", f"data.seq_length={LENGTH}"]
    length = [f"training.train_iters={STEPS}", f"training.global_batch_size={BATCH}", "training.eval_iters=0"]
    optim = [f"optim.learning_rate={RATE}", "optim.lr_decay_style=constant", "optim.lr_warmup_iters=0"]
    optim += ["optim.weight_decay=0.1", "optim.clip_grad=1.0", "optim.adam_beta2=0.95", "optim.adam_eps=1e-8"]
    load = [f"checkpoint.load={root / recipe / 'checkpoints'}", "objective.kind=dpo"] if start else []
    more = ["data.validation_fraction=0.0", "training.micro_batch_size=2", "metrics.tensorboard=false"]
    return resolve(recipe, [*model, *base, *length, *optim, *load, *more, *words], RECIPES)


def pairs_of(config, samples):
    """Prompt, chosen and rejected ids of the pairs of some rows."""
    reader, found = TrainingData(config).at(0), []
    for number in samples:
        sample = reader.traced(number)[2]
        bounds = [*sample.starts.tolist(), LENGTH][: 2 * len(sample.documents) + 1]
        parts = []
        for begin, end in itertools.pairwise(bounds):
            carries = np.flatnonzero(sample.loss_mask[begin:end]) + begin + 1
            parts.append((sample.tokens[begin : carries[0]].tolist(), sample.tokens[carries].tolist()))
        for (prompt, chosen), (other, rejected) in zip(parts[::2], parts[1::2], strict=True):
            assert prompt == other
            found.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return found


@pytest.mark.parametrize(("objective", "kind", "smoothing", "nll"), cases(KINDS[:2], KINDS[2:]))
def test_steps_are_those_of_trl(objective, kind, smoothing, nll, place, pool, tmp_path):
    words = [f"objective.kind={objective}", "objective.beta=0.3"]
    if objective == "dpo":
        words += [f"objective.dpo_loss={kind}", f"objective.label_smoothing={smoothing}", f"objective.nll_coeff={nll}"]
    config = configure(place, "tiny_dense", "long", *words)
    rows = pairs_of(config, range(STEPS * BATCH))
    assert len(rows) == STEPS * BATCH
    run("checkpoints_convert.convert", "to-hf", place / "tiny_dense", tmp_path / "hf", check=True)
    (tmp_path / "trl").mkdir()
    spec = {
        "model": str(tmp_path / "hf"),
        "tokenizer": str(place / "tok"),
        "out": str(tmp_path / "trl"),
        "batch": BATCH,
    }
    spec |= {"rate": RATE, "rows": rows, "objective": objective, "loss": kind, "label_smoothing": smoothing}
    # TRL's cross-entropy is a mean over the tokens of a micro-batch: of one pair each, it is a mean over pairs.
    spec |= {"beta": 0.3, "nll_coeff": nll, "accumulate": BATCH if nll else 1}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-P", "-m", "tests.training.trl_pairs_run", str(tmp_path / "spec.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, timeout=500)
    theirs = json.loads((tmp_path / "trl" / "steps.json").read_text())
    ours = attempt(pool, 1, config, tmp_path / "run")
    gap = max(abs(one["loss"] - other["loss"]) for one, other in zip(ours, theirs, strict=True))
    print(f"{objective} {kind} {nll}: {ours[0]['loss']:.6f} to {ours[-1]['loss']:.6f}, largest gap {gap:.1e}")
    names = {"reward_margin": "rewards/margins", "logp_chosen": "logps/chosen"}
    if objective == "orpo":
        names = {"odds_ratio_log": "log_odds_chosen", "nll": "nll_loss"}
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5, rel=1e-5)
        for mine, their in ({"reward_accuracy": "rewards/accuracies"} | names).items():
            assert one[mine] == pytest.approx(other[their], abs=2e-4, rel=1e-5), mine


@pytest.mark.parametrize("data", ["long", "short"])
def test_the_first_step_is_ln_2_with_rewards_of_0(data, place, pool, tmp_path):
    config = configure(place, "tiny_dense", data)
    if data == "short":
        assert len(pairs_of(config, range(BATCH))) > BATCH
    first = attempt(pool, 1, config, tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["reward_chosen"] == first["reward_rejected"] == first["reward_margin"] == 0.0


LAYOUTS = [("tiny_dense", "TP2+SP", 2, TP2 | SP), ("tiny_dense", "PP2", 2, PP2), ("tiny_dense", "DP2", 2, {})]
MORE = [
    ("tiny_dense", "CP2", 2, CP2 | {"micro": 1}),
    ("tiny_dense", "TP2", 2, TP2),
    ("tiny_dense", "micro-batches of 1", 1, {"micro": 1}),
    ("tiny_dense", "micro-batches of 4", 1, {"micro": 4}),
    ("tiny_moe", "EP2", 2, EP2),
]
_ALONE: dict = {}


def _layouts():
    quick = [("dpo", *one) for one in (*LAYOUTS, MORE[0])] + [("orpo", *MORE[0])]
    return cases(quick, [("dpo", *one) for one in MORE[1:]] + [("orpo", *one) for one in (*LAYOUTS, *MORE[1:])])


@pytest.mark.parametrize(("objective", "recipe", "name", "size", "layout"), _layouts())
def test_a_layout_changes_nothing(objective, recipe, name, size, layout, place, pool, tmp_path):
    words = (f"objective.kind={objective}", "objective.beta=0.5", "data.validation_fraction=0.1")
    config = configure(place, recipe, "short", *words)
    config = config.with_section("training", eval_iters=1, eval_interval=2)
    if (objective, recipe) not in _ALONE:
        _ALONE[objective, recipe] = attempt(pool, 1, config, tmp_path / "alone")
    layout = dict(layout)
    micro = layout.pop("micro", 2)
    config = jobs.with_layout(config, layout).with_section("training", micro_batch_size=micro)
    for one, other in zip(attempt(pool, size, config, tmp_path / "run"), _ALONE[objective, recipe], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6, abs=2e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for key in ("reward_margin", "odds_ratio_log", "logp_chosen", "validation_loss", "validation_logp_chosen"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key
    assert "validation_logp_chosen" in other


def test_a_packed_batch_is_the_mean_over_its_pairs(place, pool, tmp_path):
    """By transformers, every answer alone in a forward pass, after some steps."""
    from transformers import AutoModelForCausalLM

    words = ("objective.beta=0.5", "objective.label_smoothing=0.2", "objective.nll_coeff=0.3")
    config = configure(place, "tiny_dense", "short", *words)
    steps = attempt(pool, 1, config, tmp_path / "run")
    shorter = config.with_section("training", train_iters=STEPS - 1)
    attempt(pool, 1, shorter, tmp_path / "shorter")
    models = []
    for name, source in (("first", place / "tiny_dense"), ("last", tmp_path / "shorter")):
        run("checkpoints_convert.convert", "to-hf", source, tmp_path / name, "--tokenizer", place / "tok", check=True)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())

    @torch.no_grad()
    def logp(model, prompt, answer):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

    losses = []
    for pair in pairs_of(config, range((STEPS - 1) * BATCH, STEPS * BATCH)):
        reference, policy = (
            [logp(model, pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids")] for model in models
        )
        margin = 0.5 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
        sigmoid = torch.nn.functional.logsigmoid
        nll = -policy[0] / len(pair["chosen_ids"])
        losses.append(-0.8 * sigmoid(margin) - 0.2 * sigmoid(-margin) + 0.3 * nll)
    assert len(losses) > BATCH
    assert steps[-1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=2e-6)


def test_resumed_it_is_the_same_run_and_keeps_its_reference(place, pool, tmp_path):
    config = configure(place, "tiny_dense", "short").with_section("checkpoint", save_interval=2, keep_last=9)
    whole = attempt(pool, 2, config, tmp_path / "whole")
    attempt(pool, 2, config.with_section("training", train_iters=2), tmp_path / "half")
    before = (tmp_path / "half" / "reference.safetensors").stat().st_mtime_ns
    resumed = attempt(pool, 2, config, tmp_path / "half")
    assert (tmp_path / "half" / "reference.safetensors").stat().st_mtime_ns == before
    assert [one["loss"] for one in resumed] == [one["loss"] for one in whole]
    last = f"checkpoints/iter_{STEPS:07d}"
    assert jobs.tensor_hashes(tmp_path / "half" / last) == jobs.tensor_hashes(tmp_path / "whole" / last)
    attempt(pool, 2, config.with_section("training", train_iters=2), tmp_path / "lost")
    (tmp_path / "lost" / "reference.safetensors").unlink()
    with pytest.raises(AssertionError, match=r"reference\.safetensors: is missing, damaged or of other data"):
        pool[2].run(jobs.attempt, config, tmp_path / "lost")


def test_adapters_have_their_base_for_a_reference(place, pool, tmp_path):
    config = configure(place, "tiny_dense", "short", "lora.rank=4")
    steps = attempt(pool, 2, jobs.with_layout(config, TP2 | SP), tmp_path / "run")
    assert steps[0]["reward_margin"] == 0.0
    assert steps[1]["reward_margin"] != 0.0


def test_pairs_are_for_preferences_and_conversations_are_not(place, pool, tmp_path):
    with pytest.raises(DataError, match=r"has pairs of answers, of which objective\.kind=sft would train the rejected"):
        TrainingData(configure(place, "tiny_dense", "short", "objective.kind=sft"))
    with pytest.raises(DataError, match=r"has pairs of answers, of which objective\.kind=pretrain"):
        TrainingData(configure(place, "tiny_dense", "short", "objective.kind=pretrain"))
    with pytest.raises(DataError, match=r"has no pairs of answers, which objective\.kind=dpo needs"):
        TrainingData(configure(place, "tiny_dense", "text"))


def test_a_source_that_the_reference_would_not_meet_is_refused(place, tmp_path):
    """Its pass is over the first stage's rows: it would look for the other pairs for ever."""
    sources = {name: {"path": str(place / name), "packing": "best_fit"} for name in ("short", "long")}
    stages = [
        {"name": "first", "tokens": LENGTH * BATCH * 2, "weights": {"short": 1.0}},
        {"name": "second", "weights": {"short": 0.5, "long": 0.5}},
    ]
    (tmp_path / "blend.yaml").write_text(json.dumps({"sources": sources, "stages": stages}))
    words = ("data.path=null", f"data.blend={tmp_path / 'blend.yaml'}")
    told = r"source long of stage second: is not in the first stage, first, whose rows the reference reads"
    with pytest.raises(DataError, match=told):
        TrainingData(configure(place, "tiny_dense", "short", *words))
    TrainingData(configure(place, "tiny_dense", "short", *words, "objective.kind=orpo"))
