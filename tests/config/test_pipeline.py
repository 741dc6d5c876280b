"""How layers fall on pipeline stages."""

import pytest

from megatron_qwen.config.pipeline import StageSplitError, layers_per_stage
from megatron_qwen.config.sections import ParallelConfig


def split(layers: int, pp: int, vp: int | None = None, first: int | None = None, last: int | None = None) -> list[int]:
    return layers_per_stage(
        layers,
        ParallelConfig(
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        ),
    )


def test_even_and_uneven():
    assert split(80, 4, 5) == [20, 20, 20, 20]
    assert split(61, 4, first=16, last=15) == [16, 15, 15, 15]
    assert split(5, 2, first=2) == [2, 3]
    assert split(7, 2, first=3, last=4) == [3, 4]


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (81, {"pp": 4}),
        (80, {"pp": 4, "vp": 3}),
        (8, {"pp": 1, "first": 4}),
        (8, {"pp": 2, "first": 9}),
        (8, {"pp": 2, "first": 8}),
    ],
)
def test_what_does_not_split(layers, options):
    with pytest.raises(StageSplitError):
        split(layers, **options)
