"""The gate on executed warp-instructions: Triton's kernels within their budgets, and the table of
what was counted (tests/tools/triton_executed.csv)."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

import triton
from tools import executed_triton

LINES = {str(line): line for line in executed_triton.lines()}
QUICK = ("bf16 forward 1024 x 18", "bf16 backward 1024 x 18", "bf16 forward 512 x 55")


def committed(state):
    """{line: [rows]} of the table for this version of Triton."""
    found = {}
    for row in executed_triton.read():
        if row[:2] == [state, triton.__version__]:
            found.setdefault(row[2], []).append(row)
    return found


def test_the_table_is_within_the_budgets():
    now = committed("now")
    if not now:
        pytest.skip("no table for this version of Triton")
    assert set(executed_triton.BUDGETS) <= set(now)
    wrong = [executed_triton.beyond(LINES[name], rows) for name, rows in now.items()]
    assert not [text for text in wrong if text]


@pytest.mark.parametrize("name", QUICK)
def test_kernels_are_within_their_budgets(name):
    """Counted anew, whatever the table says: 10% beyond the budget fails."""
    line = LINES[name]
    rows = executed_triton.written("now", line)
    assert not executed_triton.beyond(line, rows)
    now = committed("now").get(name)
    if now is not None:
        assert executed_triton.total(rows) == pytest.approx(executed_triton.total(now), rel=0.02)


def test_a_kernel_beyond_its_budget_is_noticed():
    line = LINES[QUICK[0]]
    most = executed_triton.BUDGETS[str(line)]
    row = ["now", "", str(line), "kernel"]
    assert not executed_triton.beyond(line, [[*row, most], [*row, 0.09 * most]])
    assert "the budget is" in executed_triton.beyond(line, [[*row, most], [*row, 0.11 * most]])
