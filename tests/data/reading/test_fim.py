"""Fill-in-the-middle: the rates, the order of the parts, what is lost, and that nothing else changes."""

from collections import Counter

import numpy as np
import pytest

from megatron_qwen.data.reading.fim import FillInTheMiddle
from megatron_qwen.data.reading.samples import ReadingOptions, window
from megatron_qwen.data.token_files.token_file import TokenFileWriter
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.errors import DataError

PRE, MID, SUF, END = 1001, 1002, 1003, 1000
NAMES = {"<|fim_prefix|>": PRE, "<|fim_middle|>": MID, "<|fim_suffix|>": SUF}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> TokenSet:
    """Documents of 30 ascending tokens and an end."""
    prefix = tmp_path_factory.mktemp("fim") / "a"
    with TokenFileWriter(prefix, vocab_size=2000) as writer:
        for start in range(0, 900, 30):
            writer.add([*range(start, start + 30), END])
    return TokenSet(prefix)


def sample_of(source: TokenSet, runs):
    return window(source, runs, stop=source.num_tokens, reading=ReadingOptions(False, False))


def pieces_of(sample) -> list[tuple[int, int, bool]]:
    ends = (np.flatnonzero(sample.tokens == END) + 1).tolist()
    starts = [0, *ends]
    pieces = [(start, end, True) for start, end in zip(starts, ends, strict=False)]
    return pieces if starts[-1] == len(sample.tokens) else [*pieces, (starts[-1], len(sample.tokens), False)]


def restored(made: list[int]) -> tuple[list[int], list[int], list[int], str]:
    """Prefix, middle and suffix of a rearranged document, and its order."""
    assert made[0] == PRE
    if made[1] == SUF:
        middle_at = made.index(MID)
        rest = made[middle_at + 1 :]
        return rest, [], made[2:middle_at], "spm"
    suffix_at, middle_at = made.index(SUF), made.index(MID)
    return made[1:suffix_at], made[middle_at + 1 :], made[suffix_at + 1 : middle_at], "psm"


@pytest.mark.parametrize("spm", [0.0, 1.0, 0.5])
def test_parts_come_back(spm, source):
    fim = FillInTheMiddle.of(NAMES, rate=1.0, spm_rate=spm, where="x")
    orders: Counter = Counter()
    for first in range(0, 20 * 31, 31):
        sample = sample_of(source, [(first, first + 62)])
        made = fim(sample, pieces_of(sample), key=(1, first))
        for begin in (0, 31):
            document = made.tokens[begin : begin + 31].tolist()
            assert document[-1] == END  # the end of a document stays the end
            prefix, middle, suffix, order = restored(document[:-1])
            # Without a prefix both orders are the same.
            orders[order] += document[1] != SUF or spm > 0
            original = sample.tokens[begin : begin + 30].tolist()
            if order == "psm":
                assert prefix + middle + suffix == original[:27]  # three tokens give way to the sentinels
            else:
                assert [*prefix, *suffix] == original[:27]
        # A label is always the token that follows.
        assert made.labels[:-1].tolist() == made.tokens[1:].tolist()
        assert len(made.tokens) == 62
    assert (orders["spm"] > 0) is (spm > 0)
    assert (orders["psm"] > 0) is (spm < 1)


def test_the_rate(source):
    fim = FillInTheMiddle.of(NAMES, rate=0.3, spm_rate=0.5, where="x")
    changed = 0
    for number in range(2000):
        sample = sample_of(source, [(31 * (number % 28), 31 * (number % 28) + 31)])
        changed += PRE in fim(sample, pieces_of(sample), key=(7, number)).tokens
    assert abs(changed / 2000 - 0.3) < 0.04


def test_a_document_that_goes_on_carries_no_loss_at_the_cut(source):
    fim = FillInTheMiddle.of(NAMES, rate=1.0, spm_rate=0.0, where="x")
    sample = sample_of(source, [(0, 51)])  # the second document breaks off after twenty tokens
    made = fim(sample, pieces_of(sample), key=(3,))
    assert made.loss_mask.tolist() == [1.0] * 50 + [0.0]


def test_none_and_short_documents_stay(source):
    sample = sample_of(source, [(0, 31)])
    never = FillInTheMiddle.of(NAMES, rate=0.0, spm_rate=0.5, where="x")
    assert never(sample, pieces_of(sample), key=(1,)).tokens.tolist() == sample.tokens.tolist()
    always = FillInTheMiddle.of(NAMES, rate=1.0, spm_rate=0.5, where="x")
    short = sample_of(source, [(0, 10)])
    assert always(short, pieces_of(short), key=(1,)).tokens.tolist() == short.tokens.tolist()


def test_same_key_same_sample(source):
    fim = FillInTheMiddle.of(NAMES, rate=1.0, spm_rate=0.5, where="x")
    sample = sample_of(source, [(0, 124)])
    one, again, other = (fim(sample, pieces_of(sample), key=key).tokens.tolist() for key in ((1, 2), (1, 2), (1, 3)))
    assert one == again != other


def test_a_tokenizer_without_sentinels():
    with pytest.raises(DataError, match=r"sources.code.fim_rate = 0.5: needs the control tokens <\|fim_prefix\|>"):
        FillInTheMiddle.of({}, rate=0.5, spm_rate=0.5, where="sources.code.fim_rate")


def test_in_a_run(source, tmp_path):
    """Through a blend: sentinels from the manifest, in windows and in packed rows; padding stays padding."""
    import json
    from dataclasses import asdict

    from megatron_qwen.data.token_files.manifest import Manifest
    from tests.data.blends import open_run

    for ending in (".bin", ".idx"):
        (tmp_path / f"a{ending}").write_bytes(source.prefix.with_name(f"a{ending}").read_bytes())
    counts = dict.fromkeys(("documents", "tokens", "read", "empty", "filtered", "skipped", "text_bytes"), 1)
    noted = Manifest(
        **counts,
        vocab_size=2000,
        end_of_text=END,
        control_tokens=NAMES,
        tokenizer_sha256="",
        encoder="",
        made_by="",
        bin_xxh3_128="",
    )
    (tmp_path / "a.json").write_text(json.dumps(asdict(noted)))
    for packing in ("windows", "best_fit"):
        blend = {
            "sources": {"a": {"path": str(tmp_path / "a"), "fim_rate": 1.0, "packing": packing}},
            "stages": [{"name": "s", "weights": {"a": 1}}],
        }
        reader = open_run(tmp_path, blend, seq_length=80).at(0)
        samples = [reader[number] for number in range(10)]
        assert all(PRE in sample.tokens for sample in samples)
        if packing == "best_fit":  # two documents of 31 and 18 tokens of padding
            assert all((sample.loss_mask[62:] == 0).all() for sample in samples)
            assert all((sample.tokens[62:] == END).all() for sample in samples)
