"""Routers' losses weigh the same whatever a mean is over."""

import shutil

import numpy as np
import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.manifest import LOSS_UNIT, Manifest, write_manifest
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.training.router_losses import divisor_per_token, with_router_losses
from tests.training import ranks
from tests.training.cases import ROUTER, config_of

LENGTH, DOCUMENT = 64, 32


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Documents of one length, half of whose tokens carry loss; and the same with weights in hundredths."""
    root = tmp_path_factory.mktemp("even")
    generator = np.random.default_rng(3)
    with TokenFileWriter(root / "plain", vocab_size=320) as writer:
        for _ in range(64):
            writer.add(generator.integers(0, 320, DOCUMENT).tolist())
    mask = np.tile(np.repeat(np.uint8([0, 1]), DOCUMENT // 2), 64)
    mask.tofile(root / "plain.mask")
    for ending in (".bin", ".idx"):
        shutil.copy(root / f"plain{ending}", root / f"parts{ending}")
    (mask * 100).astype(np.uint8).tofile(root / "parts.mask")
    counts = dict.fromkeys(("documents", "tokens", "read", "empty", "filtered", "skipped", "text_bytes"), 0)
    texts = dict.fromkeys(("tokenizer_sha256", "encoder", "made_by", "bin_xxh3_128"), "")
    noted = Manifest(**counts, **texts, vocab_size=320, end_of_text=0, control_tokens={}, chat={LOSS_UNIT: 100})
    write_manifest(root / "parts", noted)
    return root


def steps(pool, even, starts, tmp_path, name, average):
    config = config_of(
        "tiny_moe",
        type("Documents", (), {"prefix": even / name}),
        starts["tiny_moe"],
        objective={"kind": "sft", "average": average},
        data={"seq_length": LENGTH, "validation_fraction": 0.0},
        training={"train_iters": 3, "micro_batch_size": 2},
        optim={"clip_grad": 0.0},
    )
    place = tmp_path / f"{name}{average}"
    place.mkdir()
    (found,) = pool[1].run(ranks.steps_from, config, place, 3)
    return [(one["loss"], one["grad_norm"]) for one in found]


def test_they_do_not_depend_on_the_divisor(pool, even, starts, tmp_path):
    plain = steps(pool, even, starts, tmp_path, "plain", "token")
    without = ROUTER["moe_aux_loss_coeff"], ROUTER["moe_z_loss_coeff"]
    assert all(without)
    for name, average in (("parts", "token"), ("plain", "sequence"), ("plain", "sample")):
        found = steps(pool, even, starts, tmp_path, name, average)
        for (loss, norm), (other, wanted) in zip(found, plain, strict=True):
            assert loss == pytest.approx(other, rel=1e-5), (name, average)
            assert norm == pytest.approx(wanted, rel=1e-4), (name, average)


def test_factors(even):
    def factor(name, *words):
        path = [f"data.path={even / name}", f"data.seq_length={LENGTH}", "data.validation_fraction=0.0"]
        config = resolve("tiny_moe", [*path, "model.vocab_size=320", "objective.kind=sft", *words], RECIPES)
        return divisor_per_token(config, TrainingData(config))

    assert factor("plain") == 1.0
    assert factor("parts") == 100.0
    assert factor("plain", "objective.average=sequence") == pytest.approx(2 / DOCUMENT)
    assert factor("plain", "objective.average=sample") == pytest.approx(2 / LENGTH)


def test_a_batch_that_cannot_be_counted_is_refused(even):
    words = [f"data.path={even / 'parts'}", "data.seq_length=4096", "data.validation_fraction=0.0"]
    words += ["model.max_position_embeddings=4096", "model.vocab_size=320", "objective.kind=sft"]
    config = resolve("tiny_dense", [*words, "training.global_batch_size=8192"], RECIPES)
    with pytest.raises(ConfigError, match="are more than can be counted"):
        with_router_losses(config, TrainingData(config))
