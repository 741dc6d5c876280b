"""Samples of a token file: sample i is a pure function of (seed, i), on every rank and under every layout."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_qwen.config.sections import DataConfig
from megatron_qwen.data.permutation import KeyedPermutation
from megatron_qwen.data.token_file import TokenFile
from megatron_qwen.errors import DataError, Problem


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Args:
        tokens: inputs, [s].
        labels: the tokens that follow, [s].
        loss_mask: weight of each label's loss, [s].
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]


class WindowSource:
    """Windows of equal length over a run of documents, in a new order every epoch.

    Args:
        file: the tokens.
        first: first token of the run.
        stop: end of the run.
        seq_length: tokens of a sample.
        seed: key of the order.
        eod_mask_loss: whether the token after an end of document carries no loss.
    """

    def __init__(
        self, file: TokenFile, *, first: int, stop: int, seq_length: int, seed: int, eod_mask_loss: bool
    ) -> None:
        self.file, self.first, self.seq_length = file, first, seq_length
        self.seed, self.eod_mask_loss = seed, eod_mask_loss
        self.windows = max(0, (stop - first - 1) // seq_length)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of an endless stream; epoch ``index // windows``."""
        epoch, position = divmod(index, self.windows)
        window = KeyedPermutation(self.windows, self.seed, epoch)[position]
        start = self.first + window * self.seq_length
        tokens = self.file.tokens(start, start + self.seq_length + 1)
        mask = np.ones(self.seq_length, dtype=np.float32)
        if self.eod_mask_loss:
            mask[self.file.document_ends(start, start + self.seq_length) - start] = 0.0
        return Sample(tokens[:-1], tokens[1:], mask)


@dataclass(frozen=True)
class Split:
    """Training and validation samples of one token file; validation is None where nothing is held out."""

    train: WindowSource
    validation: WindowSource | None


def open_split(data: DataConfig, *, seed: int, validate: bool) -> Split:
    """Opens data.path and holds out its last documents for validation.

    Args:
        data: path, sequence length and fraction.
        seed: key of the sample order.
        validate: whether the run validates at all.

    Raises:
        DataError: the files cannot be used, or either part is shorter than one sample.
    """
    if data.path is None:
        raise DataError(Problem("data.path", "null", "must name a token file (`mq data prepare` makes one)."))
    file = TokenFile(data.path)
    # Held out whether or not this run validates: what is training data must not depend on that.
    held_out = max(1, round(file.num_documents * data.validation_fraction)) if data.validation_fraction else 0
    boundary = file.document_start(file.num_documents - held_out)

    def source(first: int, stop: int, key: int) -> WindowSource:
        return WindowSource(
            file, first=first, stop=stop, seq_length=data.seq_length, seed=key, eod_mask_loss=data.eod_mask_loss
        )

    train = source(0, boundary, seed)
    if train.windows == 0:
        why = f" ({held_out} of its {file.num_documents} documents are held out for validation)" if held_out else ""
        fix = f"its {boundary} training tokens{why} are fewer than data.seq_length + 1 = {data.seq_length + 1}."
        more = " Set data.validation_fraction=0 or prepare more documents." if held_out else " Prepare more text."
        raise DataError(Problem("data.path", data.path, fix + more))
    if not (held_out and validate):
        return Split(train, None)
    validation = source(boundary, file.num_tokens, seed + 1)
    if validation.windows == 0:
        fix = (
            f"holds out {file.num_tokens - boundary} tokens, fewer than one sample of {data.seq_length + 1}; "
            "raise it or set training.eval_iters=0."
        )
        raise DataError(Problem("data.validation_fraction", data.validation_fraction, fix))
    return Split(train, validation)
