"""What a prediction of step time assumes beyond the configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """What a prediction needs and a configuration does not contain.

    Args:
        imbalance: routed tokens of the busiest expert-parallel rank divided by the mean; 1 is forced balance.
        deduplicated: whether a routed token is sent to another node once, whatever the number of its experts there
            (DeepEP, HybridEP), or once per expert (all-to-all).
        tensor_overlap: fraction of tensor-parallel communication that is overlapped with GEMMs.
        power: fraction of its rated power that the device may draw; the rates of GEMMs and attention scale with it.
        achieved: achieved fraction of peak: what a step reaches of the rates in ``Hardware``, after kernels that are
            not counted, gaps and clocks. The default is what six steps on one H200 reached (``mq bench
            predictions``); ``mq plan --calibrate`` fits another.
    """

    imbalance: float = 1.0
    deduplicated: bool = False
    tensor_overlap: float = 0.0
    power: float = 1.0
    achieved: float = 0.98
