"""The two tiers of the tests: ``mq test``, which CI runs, and ``mq test --thorough`` with its larger counts."""

import os

import pytest

THOROUGH = os.environ.get("MQ_TEST_TIER") == "thorough"


def thorough(reason: str) -> pytest.MarkDecorator:
    """A test of the thorough tier alone.

    Args:
        reason: what of its kind stays in every run.
    """
    return pytest.mark.skipif(not THOROUGH, reason=f"thorough tier: {reason}")


def count(*, quick: int, thorough: int) -> int:
    """How often a test repeats what it does, by the tier that runs."""
    return thorough if THOROUGH else quick


def cases[T](quick: list[T], more: list[T]) -> list[T]:
    """The cases of a test: those of every run, then those of the thorough tier alone."""
    return [*quick, *more] if THOROUGH else quick
