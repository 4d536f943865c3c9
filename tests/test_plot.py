"""Pictures of a run, from its trainer_state.json alone."""

import json
import shutil
import subprocess
import sys

import pytest
from common import arguments, rows, tiny_bert, trained

from hf_lqa import LQATrainer, Verdict
from hf_lqa.plot import plot, probes, read_log

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lqa")
    trainer = trained(folder, max_steps=24, optim_args="probe_interval=1,warmup=0")
    trainer.save_state()
    return folder, trainer


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_run(run):
    path = plot(run[0])
    assert path == run[0] / "lqa.png" and is_png(path)


def test_a_window(run, tmp_path, monkeypatch):
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_fignums()))
    pyplot.switch_backend("Agg")
    pyplot.close("all")
    assert is_png(plot(run[0], output=tmp_path / "shown.png", show=True))
    assert len(shown) == 1 and len(shown[0]) == 1
    pyplot.close("all")


def test_compare_with_a_run_of_another_optimizer(run, tmp_path):
    trained(tmp_path / "adamw", optim="adamw_torch").save_state()
    path = plot(run[0], [tmp_path / "adamw"], output=tmp_path / "new" / "both.png")
    assert path == tmp_path / "new" / "both.png" and is_png(path)
    assert is_png(plot(tmp_path / "adamw"))


def test_runs_in_folders_of_the_same_name_are_both_drawn(run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("hf_lqa.plot._draw_runs", lambda make, logs: drawn.update(logs) or make())
    for name in ("a/out", "b/out"):
        shutil.copytree(run[0], tmp_path / name)
    plot(tmp_path / "a" / "out", [tmp_path / "b" / "out"])
    assert [*drawn] == [str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]


def test_every_probe_has_its_parabola_and_verdict(run):
    folder, trainer = run
    found = probes(read_log(folder))
    assert [entry["lqa_probe_step"] for entry in found] == list(range(1, 25))
    # The log rounds nothing, so that verdicts are those that the optimizer found.
    counts = {v: sum(entry["fit"].verdict is v for entry in found) for v in Verdict}
    assert counts == {v: trainer.lqa.counts[v.value] for v in Verdict}
    for entry in found:
        assert entry["fit"].slope == entry["lqa_slope"] and entry["fit"].curvature == entry["lqa_curvature"]
    assert is_png(plot(folder, probe=3))


def test_rounding_errors_and_bounds_are_seen_by_what_they_did():
    entry = {"lqa_probe_step": 1, "lqa_loss_minus": 1.1, "lqa_loss_center": 1.0, "lqa_loss_plus": 0.95}
    entry |= {"lqa_probe_radius": 1e-4}
    (accepted,) = probes([{**entry, "lqa_fit_step_size": 1.5e-4}])
    assert accepted["fit"].verdict is Verdict.ACCEPTED
    (clamped,) = probes([{**entry, "lqa_fit_step_size": 1e-4}])
    assert clamped["fit"].verdict is Verdict.CLAMPED and clamped["fit"].step_size == 1e-4
    (refused,) = probes([entry])
    assert refused["fit"].verdict is Verdict.BELOW_NOISE and refused["fit"].step_size is None


def test_the_last_checkpoint_will_do(tmp_path):
    trainer = LQATrainer(
        tiny_bert(), arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=10), train_dataset=rows()
    )
    trainer.train()
    assert not (tmp_path / "trainer_state.json").exists()
    assert max(entry["step"] for entry in read_log(tmp_path)) == 10


def test_the_schedule_is_what_lies_between_level_and_rate(run):
    for entry in read_log(run[0]):
        if "loss" in entry and entry["step"] > 12:  # the longest ramp
            factor = 1 - (entry["step"] - 1) / 24
            assert entry["learning_rate"] == pytest.approx(factor * entry["lqa_level"])


def test_command_line(run, tmp_path):
    command = [sys.executable, "-m", "hf_lqa.plot", str(run[0]), "--probe", "2", "--output", str(tmp_path / "p.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "p.png") and is_png(tmp_path / "p.png")


def test_wrong_input(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"OUTPUT_DIR=.*no trainer_state\.json"):
        plot(tmp_path)
    with pytest.raises(ValueError, match=r"--probe 999: no probe of this step was logged; there are: 1, 2, 3"):
        plot(run[0], probe=999)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    with pytest.raises(ValueError, match="no training loss"):
        plot(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf-lqa\[plot\]"'):
        plot(run[0])
