"""The tables of faults and threats name only tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEFINED = {
    path.name: set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    for path in (ROOT / "tests").glob("test_*.py")
}


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_named_exists(page):
    named, table = 0, "test_board_faults.py"
    for line in (ROOT / page).read_text().splitlines():
        whole = re.search(r"[Aa]ll in\s+`tests/(test_\w+\.py)`|^`tests/(test_\w+\.py)`", line)
        if whole:
            table = whole.group(1) or whole.group(2)
        module = table  # the file of a whole table, or the last one named in the row
        for file, name in re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?[^`]*`", line):
            module = file or module
            assert module in DEFINED, (page, module)
            if name:
                assert name in DEFINED[module], (page, module, name)
            named += bool(file or name)
    assert named > 15


def test_every_seam_has_a_row_in_the_ledger():
    ledger = (ROOT / "docs" / "vllm-seams.md").read_text()
    files = {path.name for path in (ROOT / "moe_monitor" / "capture" / "vllm").glob("*.py")} - {"__init__.py"}
    assert {file for file in files if f"\n| `{file}` |" in ledger} == files


def test_every_file_that_relies_on_vllm_is_checked():
    checks = (ROOT / "scripts" / "seam_checks.py").read_text()
    files = {path.stem for path in (ROOT / "moe_monitor" / "capture" / "vllm").glob("*.py")}
    files -= {"__init__", "imports"}  # that one knows no module by name
    assert {file for file in files if f'"{file}"' in checks} == files
