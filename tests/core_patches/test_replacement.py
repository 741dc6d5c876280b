"""A function is wrapped once."""

from types import SimpleNamespace

from megatron_qwen.core_patches.replacement import is_wrapped, wrap


def test_once():
    owner = SimpleNamespace(answer=lambda: 1)
    made = []

    def more(plain):
        made.append(plain)
        return lambda: plain() + 1

    assert not is_wrapped(owner, "answer")
    wrap(owner, "answer", more)
    wrap(owner, "answer", more)
    assert is_wrapped(owner, "answer")
    assert owner.answer() == 2
    assert len(made) == 1
