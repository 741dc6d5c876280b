"""What tests of hostile input share: a refusal, and that it left nothing behind."""

from pathlib import Path

import pytest

from checkpoints_convert.convert import main
from megatron_qwen.errors import UserError

CANARY = "canary"


def refused(*words: object, exit_codes: tuple[int, ...] = (3, 4)) -> str:
    """Runs ``mq convert``, which must refuse; its message."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    assert caught.value.exit_code in exit_codes, caught.value.render()
    return caught.value.render()


def assert_untouched(folder: Path) -> None:
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out", CANARY))]
    assert not left, left
