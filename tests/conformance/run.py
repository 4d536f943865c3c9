"""Runs Transformers' own trainer tests twice, with the stock Trainer and with LQA forced in, and prints the difference.

    python tests/conformance/run.py PATH_TO_A_TRANSFORMERS_CHECKOUT [-k EXPRESSION ...]

The checkout's version must be that of the installed Transformers. Everything after the path goes to pytest. Exit status
0: every test that passes with the stock Trainer passes with LQA, but for those in `EXPECTED`; and LQA really probed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

#: Tests that assert an optimizer's own trajectory, or its name: pattern of the test's name -> why it must differ.
EXPECTED: dict[str, str] = {
    r"::test_get_learning_rates$": "asserts the learning rate that AdamW was given; LQA's groups hold multipliers",
    r"::test_cosine_with_min_lr_schedule_with_warmup_lr_rate$": "asserts the rates of a schedule of learning_rate=0.2;"
    " LQA's schedule multiplies 1.0",
    r"::test_logging_inf_nan_filter$": "asserts that training diverges at learning_rate=1e9, which LQA does not use",
    r"::test_adafactor_lr_none$": "gives an Adafactor without a learning rate, which LQA refuses by name",
    r"::test_enum_coercions$": "asserts args.optim == 'adamw_torch', in whose place this script itself puts 'lqa'",
}

if [int(part) for part in re.findall(r"\d+", version("transformers"))[:3]] < [5, 5, 4]:
    EXPECTED[r"::test_gradient_accumulation$"] = (
        "Accelerate divides gradients by the accumulation steps there, which shows unless clipping hides it: the"
        " stock Trainer fails the test with learning_rate=0.5, LQA passes it with max_grad_norm=1e9"
    )

#: The folders that the suite has had; those that a checkout has are run.
SUITES = ("tests/trainer",)

PLUGIN = """
import json, os
import pytest

if os.environ["CONFORMANCE_KIND"] == "lqa":
    import transformers
    from hf_lqa.__main__ import patch_trainer
    from hf_lqa.prober import Prober

    own = transformers.TrainingArguments.__post_init__

    def __post_init__(self):
        stock = str(getattr(self.optim, "value", self.optim)) in ("adamw_torch", "adamw_torch_fused")
        if stock and not self.optim_args and not self.deepspeed:
            self.optim = "lqa"
        own(self)

    transformers.TrainingArguments.__post_init__ = __post_init__
    patch_trainer()
    probe, probes = Prober.probe, []

    def counting_probe(self, *args, **kwargs):
        probes.append(1)
        return probe(self, *args, **kwargs)

    Prober.probe = counting_probe
else:
    probes = []

outcomes = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        worse = outcomes.get(report.nodeid) in ("failed", "error")
        if not worse:
            outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    with open(os.environ["CONFORMANCE_RESULT"], "w") as file:
        json.dump({"outcomes": outcomes, "probes": len(probes)}, file)
"""


def run_suite(checkout: Path, kind: str, options: list[str]) -> dict[str, object]:
    """One run of the suite: ``{"outcomes": {test: outcome}, "probes": number}``."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "conformance_plugin.py").write_text(PLUGIN)
        result = Path(folder) / "result.json"
        environment = {
            **os.environ,
            "CONFORMANCE_KIND": kind,
            "CONFORMANCE_RESULT": str(result),
            "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        suites = [suite for suite in SUITES if (checkout / suite).is_dir()]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance_plugin", *suites, *options]
        # Not in this process: the patch must not reach the stock run. Failures are what is to be compared.
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not result.exists():
            raise SystemExit(f"pytest ended without a result: {' '.join(command)}")
        found: dict[str, object] = json.loads(result.read_text())
        return found


def difference(stock: dict[str, str], lqa: dict[str, str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tests that pass with the stock Trainer and not with LQA: (unexpected, [(expected, reason)])."""
    unexpected, expected = [], []
    for test, outcome in sorted(stock.items()):
        if outcome == "passed" and lqa.get(test) != "passed":
            reason = next((why for pattern, why in EXPECTED.items() if re.search(pattern, test)), None)
            if reason is None:
                unexpected.append(test)
            else:
                expected.append((test, reason))
    return unexpected, expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Transformers at the installed version")
    args, options = parser.parse_known_args()
    checkout = args.checkout.resolve()
    if not any((checkout / suite).is_dir() for suite in SUITES):
        parser.error(f"checkout={str(args.checkout)!r} has none of {', '.join(SUITES)}")
    runs = {kind: run_suite(checkout, kind, options) for kind in ("stock", "lqa")}
    stock, lqa = runs["stock"]["outcomes"], runs["lqa"]["outcomes"]
    assert isinstance(stock, dict) and isinstance(lqa, dict)
    unexpected, expected = difference(stock, lqa)
    for kind, outcomes in (("stock", stock), ("lqa", lqa)):
        counts = {o: list(outcomes.values()).count(o) for o in sorted(set(outcomes.values()))}
        print(f"{kind}: {counts}")
    print(f"probes: {runs['lqa']['probes']}")
    for test, reason in expected:
        print(f"expected: {test}: {reason}")
    for test in unexpected:
        print(f"DIFFERENT: {test}: passed with the stock Trainer, {lqa.get(test, 'missing')} with LQA")
    if not runs["lqa"]["probes"]:
        print("No probe was made: LQA was not forced in.")
        return 1
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
