"""A short form of the soak; `python tests/soak.py` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "flags",
    [[], ["--bf16"], ["--optim", "lqa_paper", "--optim_args", "probe_interval=1"]],
    ids=["fp32", "bf16", "paper"],
)
def test_three_hundred_steps(flags):
    # Fewer are no measure of memory: kernels for bfloat16 are compiled as their shapes come.
    command = [sys.executable, str(TESTS / "soak.py"), "--text", str(TESTS.parent / "LICENSE"), "--steps", "300"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"steps"')))
    assert found["steps"] == 300 and found["probes"] >= 30
    assert found["rejected"] > 0 or flags != ["--optim", "lqa_paper", "--optim_args", "probe_interval=1"]
    assert found["loss"][1] < found["loss"][0]
