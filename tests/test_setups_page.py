"""The compatibility page: every test it names exists, and every row names one."""

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.compile(r"`(test_\w+\.py)::([^`]+)`")


def test_every_row_names_tests_that_exist():
    page = (TESTS.parent / "hf_lqa" / "docs" / "compatibility.md").read_text()
    lines = page.splitlines()
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    rows = [line for line, following in pairs if line.startswith("| ") and not following.startswith("|---")]
    rows = [row for row in rows if ".py::" in row or "refused" in row or "works" in row]
    assert len(rows) > 40
    assert all(NAMED.search(row) for row in rows), [row for row in rows if not NAMED.search(row)]
    files = sorted({str(TESTS / file) for file, _ in NAMED.findall(page)})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-2000:]
    collected = {line.rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line}
    collected |= {test.partition("[")[0] for test in collected}
    missing = [f"{file}::{test}" for file, test in NAMED.findall(page) if f"{file}::{test}" not in collected]
    assert not missing, missing
