"""Sums over inputs against numpy."""

import numpy as np
import torch

from checkpoints_convert.quantize.hessian import hessian_bytes
from tests.checkpoints_convert.quantize.correlated import statistics_of

# More columns than a panel has, and no multiple of it.
INPUTS = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_hessian_is_that_of_the_output_error():
    found = statistics_of(INPUTS).hessian()
    values = INPUTS.double().numpy()
    assert np.allclose(found.numpy(), 2 * values.T @ values / 300, rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.t())


def test_sums_of_columns():
    found = statistics_of(INPUTS, hessian=False)
    values = INPUTS.double().numpy()
    assert found.tokens == 300
    assert np.allclose(found.mean_absolute.numpy(), np.abs(values).mean(0), rtol=1e-6)
    assert np.allclose(found.mean_square.numpy(), (values**2).mean(0), rtol=1e-6)
    assert np.array_equal(found.largest.numpy(), np.abs(values).max(0).astype(np.float32))


def test_the_number_of_workers_changes_no_bit():
    assert torch.equal(statistics_of(INPUTS, workers=1).hessian(), statistics_of(INPUTS, workers=3).hessian())


def test_nothing_seen():
    found = statistics_of(torch.empty(0, 8), parts=1)
    assert (found.tokens, float(found.mean_square.sum()), float(found.mean_absolute.sum())) == (0, 0.0, 0.0)
    assert not found.hessian().any()


def test_bytes_of_7b():
    assert hessian_bytes(18_944) == 1_435_500_544  # 4 in^2
