"""Mappings become dataclasses by their annotations, and everything that is wrong with one is said at once."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal

import pytest

from megatron_qwen.config.fields import Bounds, Form, setting, type_name
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import EXIT_CONFIG, ConfigError


def minutes(value: object) -> int:
    number, unit = str(value)[:-1], str(value)[-1:]
    return int(number) * {"m": 1, "h": 60}[unit] if unit in "mh" else int("not one")


@dataclass(frozen=True, kw_only=True)
class Range:
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Listed:
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    nodes: Annotated[int, Bounds(minimum=1)] = 1
    lasts: Annotated[int, Form("a time such as 30m or 2h", minutes)] = 60


@dataclass(frozen=True, kw_only=True)
class File:
    kind: Literal["slurm", "local"]
    jobs: tuple[Job, ...]
    first: Job | None = None
    rates: Listed | Range | None = None
    share: float = setting(0.5, doc="", above=0, maximum=1)
    window: tuple[int, str] | None = None
    words: list[str] = field(default_factory=list)
    variables: Mapping[str, int] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    either: tuple[int, ...] | int = 0
    anything: Any = None
    strict: bool = False


RIGHT = {
    "kind": "slurm",
    "jobs": [{"name": "a", "nodes": 2}, {"name": 7, "lasts": "2h"}],
    "first": {"name": "b"},
    "rates": {"low": 1, "high": "1e-4"},
    "window": [3, "x"],
    "words": ["a", 1],
    "variables": {"A": 1},
    "sizes": {64: 0.5},
    "either": [1, 2],
    "anything": {"a": [1]},
    "strict": True,
}


def problems(content: object, **options: Any) -> list[str]:
    reader = YamlReader("f.yaml", **options)
    reader.read(File, content)
    return [str(problem) for problem in reader.problems]


def test_what_is_right():
    reader = YamlReader("f.yaml")
    found = reader.read(File, RIGHT)
    assert not reader.problems
    assert found == File(
        kind="slurm",
        jobs=(Job(name="a", nodes=2), Job(name="7", lasts=120)),
        first=Job(name="b"),
        rates=Range(low=1.0, high=1e-4),
        window=(3, "x"),
        words=["a", "1"],
        variables={"A": 1},
        sizes={64: 0.5},
        either=(1, 2),
        anything={"a": [1]},
        strict=True,
    )
    assert reader.read(File, {"kind": "local", "jobs": [], "either": 3}) == File(kind="local", jobs=(), either=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kidn": 1}, "kidn: no such field. Did you mean kind?"),
        ({"kind": "cloud"}, "kind = 'cloud': must be one of slurm, local."),
        ({"jobs": None}, "jobs = null: must be list of a mapping with name, nodes, lasts."),
        ({"jobs": {"name": "a"}}, "jobs = {'name': 'a'}: must be list of a mapping with name, nodes, lasts."),
        ({"jobs": [{"nodes": 1}]}, "jobs[0].name: is required."),
        ({"jobs": [{"name": "a"}, {"name": ""}]}, "jobs[1].name = '': must be str."),
        ({"jobs": [{"name": "a", "colour": 1}]}, "jobs[0].colour: no such field. Known fields: name, nodes, lasts."),
        ({"jobs": [{"name": "a", "nodes": 0}]}, "jobs[0].nodes = 0: must be at least 1."),
        ({"jobs": [{"name": "a", "nodes": True}]}, "jobs[0].nodes = True: must be int."),
        ({"jobs": [{"name": "a", "nodes": "8"}]}, "jobs[0].nodes = '8': must be int."),
        ({"jobs": [{"name": "a", "lasts": "long"}]}, "jobs[0].lasts = 'long': must be a time such as 30m or 2h."),
        ({"first": "a"}, "first = 'a': must be a mapping with name, nodes, lasts."),
        ({"rates": {"low": 1}}, "rates.high: is required."),
        ({"rates": {"values": ["x"]}}, "rates.values[0] = 'x': must be float."),
        (
            {"rates": {"low": 1, "values": [1]}},
            "rates = {'low': 1, 'values': [1]}: must be a mapping with values or a mapping with low, high or null.",
        ),
        ({"rates": 3}, "rates = 3: must be a mapping with values or a mapping with low, high or null."),
        ({"share": 0}, "share = 0.0: must be greater than 0."),
        ({"share": float("nan")}, "share = nan: must be a finite number."),
        ({"share": None}, "share = null: must be float."),
        ({"window": [1, "x", 2]}, "window = [1, 'x', 2]: must be list of 2 int."),
        ({"window": ["x", 1]}, "window[0] = 'x': must be int."),
        ({"words": "a"}, "words = 'a': must be list of str."),
        ({"variables": {"A": "x"}}, "variables.A = 'x': must be int."),
        ({"variables": [1]}, "variables = [1]: must be mapping of text to int."),
        ({"sizes": {"x": 1}}, "sizes.x = 'x': must be int."),
        ({"either": "x"}, "either = 'x': must be int."),
        ({"either": [1, "x"]}, "either[1] = 'x': must be int."),
        ({"either": {}}, "either = {}: must be list of int or int."),
        ({"strict": 1}, "strict = 1: must be true or false."),
    ],
)
def test_what_is_wrong(change, said):
    assert problems({**RIGHT, **change}) == [f"f.yaml: {said}"]


def test_everything_at_once():
    wrong = {"kind": 1, "jobs": [{"nodes": "x"}, 5], "first": {}, "share": "much", "wodrs": []}
    found = problems(wrong)
    places = [text.removeprefix("f.yaml: ").partition(":")[0].partition(" ")[0] for text in found]
    assert places == ["wodrs", "kind", "jobs[0].name", "jobs[0].nodes", "jobs[1]", "first.name", "share"]
    reader = YamlReader("f.yaml")
    assert reader.read(File, wrong) is None
    with pytest.raises(ConfigError) as caught:
        reader.raise_problems()
    assert caught.value.exit_code == EXIT_CONFIG == 2
    assert len(caught.value.problems) == 7


def test_what_is_left_can_be_checked():
    """An object in spite of problems: wrong optional fields have their defaults, numbers out of bounds stay."""
    reader = YamlReader("f.yaml")
    found = reader.read(File, {"kind": "local", "jobs": [{"name": "a", "nodes": 0}], "share": "x", "other": 1})
    assert found == File(kind="local", jobs=(Job(name="a", nodes=0),))
    assert len(reader.problems) == 3
    assert reader.read_fields(File, {"jobs": 1, "share": 0.25}) == {"share": 0.25}


def test_nothing_after_a_colon_is_the_default_of_a_list_or_mapping():
    assert not problems({"kind": "local", "jobs": [], "words": None, "variables": None, "first": None})


def test_a_file_that_is_no_mapping():
    assert problems([1]) == [f"f.yaml = [1]: must be {type_name(File)}."]


def test_other_fields_and_where_they_are_described():
    assert not problems({**RIGHT, "more": 1, "jobs": [{"name": "a", "device_hours": 1}]}, extra_fields=True)
    (said,) = problems({**RIGHT, "zzz": 1}, see="docs/x.md lists them.")
    assert said == "f.yaml: zzz: no such field. docs/x.md lists them."


def test_fields_without_a_file():
    reader = YamlReader()
    assert reader.value(int | None, "x", "model.num_layers") is MISSING
    assert str(reader.problems[0]) == "model.num_layers = 'x': must be int or null."
    assert reader.value(int | None, None, "model.num_layers") is None


@pytest.mark.parametrize("huge", [10**400, "1" * 5000])
def test_numbers_beyond_a_float(huge):
    reader = YamlReader()
    reader.value(float, huge, "a")
    reader.value(Annotated[int, Bounds(minimum=0)], 10**400, "b")
    assert all(problem.where == "a" for problem in reader.problems)
