"""The list of deliberate faults is up to date: each can still be put into the code, by text that parses."""

import ast

import pytest

from tests.conftest import ROOT
from tests.faults.measure import faults


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_fault_can_be_put_in(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has changed: write the fault anew"
    changed = text.replace(fault.old, fault.new)
    assert changed != text
    if fault.file.endswith(".py"):
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert fault.tests
    assert all((ROOT / name).is_file() for name in fault.tests)
