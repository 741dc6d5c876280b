"""What --format words mean, and which are refused."""

import pytest

from checkpoints_convert.formats.registry import FORMATS
from checkpoints_convert.quantize.names import DEFAULT_METHODS, SAFETENSORS_FORMATS, Wanted, wanted_formats
from megatron_qwen.errors import ConfigError


def test_the_names_without_torch_are_those_of_the_formats():
    assert tuple(FORMATS) == SAFETENSORS_FORMATS == tuple(DEFAULT_METHODS)
    assert all(name == format_.name for name, format_ in FORMATS.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp8", Wanted(("fp8",))),
        ("gptq-int4,fp8-block", Wanted(("gptq-int4", "fp8-block"))),
        (" w4a16 , W8A8", Wanted(("w4a16", "w8a8"))),
        ("gguf:Q8_0", Wanted((), ("Q8_0",))),
        ("gguf:Q8_0,q4_k_m", Wanted((), ("Q8_0", "Q4_K_M"))),
        ("gguf:Q8_0,Q4_K_M,fp8,gguf:F16", Wanted(("fp8",), ("Q8_0", "Q4_K_M", "F16"))),
        ("awq-int4,gguf:Q2_K,w8a8", Wanted(("awq-int4", "w8a8"), ("Q2_K",))),
    ],
)
def test_words(text, expected):
    assert wanted_formats(text) == expected
    assert expected.is_single == (len(expected.formats) + bool(expected.gguf_kinds) == 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gptq-int5", "Did you mean gptq-int"),
        ("gptq-in4", "Did you mean gptq-int4?"),
        ("fp8_block", "Did you mean fp8-block?"),
        ("gguf", "names no kind: write gguf:Q8_0"),
        ("gguf:", "neither a kind of GGUF file"),
        ("Q8_0", "write gguf:Q8_0"),
        ("gguf:Q4_K", "Did you mean Q4_K_M?"),
        ("gguf:Q8_0,fp9", "neither a kind"),
        ("", "is no known format"),
        ("fp8,", "is no known format"),
        ("fp8,w8a8,FP8", "fp8: is named twice"),
        ("gguf:Q8_0,Q8_0", "Q8_0: is named twice"),
    ],
)
def test_refused_words(text, said):
    with pytest.raises(ConfigError) as caught:
        wanted_formats(text)
    assert said in caught.value.render()


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as caught:
        wanted_formats("fp9,w8a8,w8a8,gguf:Q7")
    assert len(caught.value.problems) == 3
