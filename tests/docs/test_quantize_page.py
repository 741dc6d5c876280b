"""docs/quantize.md: its table of sizes is what the formats have."""

from checkpoints_convert.quantize.sizes import MODELS, table
from tests.conftest import ROOT
from tests.tiers import THOROUGH

QUICK = ("0.5B", "1.5B")  # larger models have more layers, of the same kinds of tensor


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_sizes():
    page = (ROOT / "docs" / "quantize.md").read_text().splitlines()
    begin = page.index(table(())[0].replace("| GB |  |", f"| GB | {' | '.join(MODELS)} |"))
    names = tuple(MODELS) if THOROUGH else QUICK
    computed = [cells(line) for line in table(names)]
    for offset, row in enumerate(computed):
        shown = dict(zip(["", *MODELS], cells(page[begin + offset]), strict=True))
        assert [shown[""], *(shown[name] for name in names)] == row
