"""What calibration keeps of the inputs of a linear layer: sums over tokens, and the Hessian of its output error."""

import torch

from checkpoints_convert.layerwise.workers import Workers

# Columns of a panel of X^T X. Fixed, because another width would sum in another order.
_PANEL = 512


class InputStatistics:
    """Sums over the inputs of linear layers that share them.

    Args:
        columns: width of the inputs.
        hessian: whether X^T X is summed too, float32 [in, in], 4 in^2 bytes.
        workers: threads that share its panels.
        place: device of the sums.

    Attributes:
        tokens: inputs so far.
        largest: float32 [in], largest |x| of every column.
    """

    def __init__(self, columns: int, *, hessian: bool, workers: Workers, place: torch.device) -> None:
        self.tokens, self._columns, self._workers = 0, columns, workers
        self.largest = torch.zeros(columns, device=place)
        # Sums of up to a million values: float64 costs nothing here.
        self._absolute = torch.zeros(columns, dtype=torch.float64, device=place)
        self._squares = torch.zeros(columns, dtype=torch.float64, device=place)
        self._gram = torch.zeros(columns, columns, device=place) if hessian else None

    def add(self, inputs: torch.Tensor) -> None:
        """Takes inputs, [n, in].

        X^T X is summed in float32 by sequences: the upper triangle only, panel by panel.
        """
        values = inputs.to(self.largest.device, torch.float32)
        if not len(values):
            return
        self.tokens += len(values)

        def panel(start: int) -> None:
            columns = slice(start, min(start + _PANEL, self._columns))
            part = values[:, columns]
            size = part.abs()
            self.largest[columns] = torch.maximum(self.largest[columns], size.amax(0))
            self._absolute[columns] += size.sum(0, dtype=torch.float64)
            self._squares[columns] += part.square().sum(0, dtype=torch.float64)
            if self._gram is not None:
                self._gram[columns, start:] += part.t() @ values[:, start:]

        self._workers.map(panel, range(0, self._columns, _PANEL))

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean |x| of every column, float32 [in]; zeros without tokens."""
        return (self._absolute / max(1, self.tokens)).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """Mean x^2 of every column, float32 [in]; zeros without tokens."""
        return (self._squares / max(1, self.tokens)).float()

    def hessian(self) -> torch.Tensor:
        """2 X^T X / n, float32 [in, in], of ||W X - Q X||^2 / n (Frantar et al. 2022, section 3.1). Ends the summing.

        The memory of the sum becomes that of the result.
        """
        assert self._gram is not None
        found, self._gram = self._gram, None
        found *= 2 / max(1, self.tokens)
        for start in range(0, self._columns, _PANEL):
            stop = min(start + _PANEL, self._columns)
            found[start:stop, start:stop] = (
                found[start:stop, start:stop].triu() + found[start:stop, start:stop].triu(1).t()
            )
            found[stop:, start:stop] = found[start:stop, stop:].t()
        return found


def hessian_bytes(columns: int) -> int:
    """Memory of a Hessian while it is summed, 4 in^2."""
    return 4 * columns * columns
