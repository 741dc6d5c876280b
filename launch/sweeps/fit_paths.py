"""Where what is fitted goes, of a study or of a CSV."""

from pathlib import Path


def beside(source: Path, name: str, metric: str | None = None) -> Path:
    """The path in a study directory, or next to a CSV with its name as prefix; of a metric with its name in it."""
    if metric is not None:
        stem, _, kind = name.rpartition(".")
        name = f"{stem}.{metric.removeprefix('eval/').replace('/', '-')}.{kind}"
    return source / name if source.is_dir() else source.with_suffix(f".{name}")
