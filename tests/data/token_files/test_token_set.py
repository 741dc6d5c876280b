"""Where the tokens of a stream come from, in words."""

import pytest

from megatron_qwen.data.token_files.token_set import TokenSet
from tests.data.blends import write_source


@pytest.mark.parametrize(
    ("start", "stop", "place"),
    [
        (0, 1, "document 0, token 0"),
        (0, 10, "document 0, tokens 0 to 9"),
        (13, 17, "document 1, tokens 3 to 6"),
        (9, 11, "documents 0 (from token 9) to 1 (to token 0)"),
        (5, 25, "documents 0 (from token 5) to 2 (to token 4)"),
    ],
)
def test_every_document_of_a_span_is_named(start, stop, place, tmp_path):
    """Documents of ten tokens, the last of five."""
    tokens = TokenSet(write_source(tmp_path / "a", 25, document=10))
    assert tokens.places(start, stop) == [f"{tmp_path / 'a'}.bin, {place}"]


def test_no_tokens_have_no_place(tmp_path):
    tokens = TokenSet(write_source(tmp_path / "a", 25, document=10))
    assert tokens.places(10, 10) == tokens.places(25, 25) == []
