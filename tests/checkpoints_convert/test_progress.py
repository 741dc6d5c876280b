"""What a conversion is said to need in time: from a trial of the disk and of the hash."""

import pytest

from checkpoints_convert import progress


@pytest.mark.parametrize(("left", "written"), [(1 << 20, 1), (64 << 20, 2), (1 << 30, 32)])
def test_a_trial_writes_a_small_part_and_leaves_nothing(left, written, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(progress, "sync_stream", lambda _: sizes.append((tmp_path / ".trial").stat().st_size))
    assert progress.trial_write_rate(tmp_path, left) > 0
    assert sizes == [written << 20]
    assert list(tmp_path.iterdir()) == []


def test_the_rate_of_a_hash(monkeypatch):
    """Of the hash that is asked for, over the bytes that it was given."""
    hashed, times = [], iter([10.0, 10.5])

    class Digest:
        def update(self, data: bytes) -> None:
            hashed.append(len(data))

    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    assert progress.digest_rate(Digest) == 2 * sum(hashed)
    assert len(hashed) == 1
