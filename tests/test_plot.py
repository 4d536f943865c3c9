"""Pictures of a run, from its trainer_state.json alone."""

import json
import shutil
import subprocess
import sys

import pytest
from common import Recorder, arguments, rows, tiny_bert, trained

from hf_lqa import LQATrainer, Verdict
from hf_lqa import plot as module
from hf_lqa.logs import probes, read_log
from hf_lqa.plot import plot

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lqa")
    trainer = trained(folder, max_steps=24, optim_args="probe_interval=1")
    trainer.save_state()
    return folder, trainer


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to be looked into."""
    from matplotlib.figure import Figure

    figures = []

    class Kept(Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(module, "class_of_figures", lambda show: Kept)
    return figures


def curve(axes, label):
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return [*line.get_xdata()], [*line.get_ydata()]


def column(log, key):
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def test_one_run_is_its_loss_and_its_rate(run, drawn):
    path = plot(run[0])
    assert path == run[0] / "lqa.png" and is_png(path)
    log, (loss, rate) = read_log(run[0]), drawn[0].axes
    assert (loss.get_ylabel(), rate.get_ylabel()) == ("loss", "learning rate applied")
    assert [*loss.lines[0].get_ydata()] == column(log, "loss")[1]
    assert curve(rate, "applied") == column(log, "learning_rate")


def test_the_band_is_from_the_slowest_to_the_fastest_tensor(tmp_path, drawn):
    trainer = LQATrainer(tiny_bert(), arguments(tmp_path, max_steps=30), train_dataset=rows())
    recorder = Recorder(trainer)
    trainer.train()
    trainer.save_state()
    plot(tmp_path)
    (band,) = drawn[0].axes[1].collections
    vertices = band.get_paths()[0].vertices.tolist()
    for step, decided in enumerate(recorder.steps, start=1):
        multipliers, rate = decided["multipliers"] or [1.0], decided["step_size"]
        for end in (min(multipliers), max(multipliers)):
            assert [step, pytest.approx(rate * end)] in vertices
    assert min(recorder.steps[-1]["multipliers"]) < 1 < max(recorder.steps[-1]["multipliers"])


def test_details_are_everything_that_was_measured(run, drawn):
    folder, trainer = run
    path = plot(folder, details=True)
    assert path == folder / "lqa_details.png" and is_png(path)
    log, (_, rate, agreement, slopes, curvature, verdicts) = read_log(folder), drawn[0].axes
    label = "base step size, before ramp and schedule"
    assert curve(rate, label) == column(log, "lqa_base_step_size")
    measured = column(log, "lqa_probe_step")[1]
    steps, signs = column(log, "lqa_sign_agreement")
    assert ([*agreement.lines[0].get_xdata()], [*agreement.lines[0].get_ydata()]) == (steps, signs) and len(steps) > 10
    assert [*slopes.lines[0].get_xdata()] == measured and [*slopes.lines[0].get_ydata()] == column(log, "lqa_slope")[1]
    assert [*curvature.lines[0].get_ydata()] == column(log, "lqa_curvature")[1]
    counted = {
        line.get_text(): trainer.lqa.counts[line.get_text().replace(" ", "_")] for line in verdicts.get_yticklabels()
    }
    assert sorted(counted.values()) == sorted(len(line.get_xdata()) for line in verdicts.lines)
    assert sum(counted.values()) == len(measured) == 24


def test_details_of_the_published_rule_have_no_sign_agreement(tmp_path, drawn):
    trained(tmp_path, optim="lqa_paper", max_steps=4).save_state()
    plot(tmp_path, details=True)
    labels = [axes.get_ylabel().partition("\n")[0] for axes in drawn[0].axes]
    assert labels == ["loss", "learning rate", "slope", "curvature", "fits"]


def test_a_window(run, tmp_path, monkeypatch):
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_fignums()))
    pyplot.switch_backend("Agg")
    pyplot.close("all")
    assert is_png(plot(run[0], output=tmp_path / "shown.png", show=True))
    assert len(shown) == 1 and len(shown[0]) == 1
    pyplot.close("all")


def test_compare_with_a_run_of_another_optimizer(run, tmp_path, drawn):
    trained(tmp_path / "adamw", optim="adamw_torch").save_state()
    path = plot(run[0], [tmp_path / "adamw"], output=tmp_path / "new" / "both.png")
    assert path == tmp_path / "new" / "both.png" and is_png(path)
    loss, rate = drawn[0].axes
    assert loss.get_shared_x_axes().joined(loss, rate)
    for folder in (run[0], tmp_path / "adamw"):
        steps, losses = column(read_log(folder), "loss")
        assert (steps, losses) in [([*line.get_xdata()], [*line.get_ydata()]) for line in loss.lines]
        assert curve(rate, folder.name) == column(read_log(folder), "learning_rate")
    assert is_png(plot(tmp_path / "adamw"))


def test_runs_in_folders_of_the_same_name_are_both_drawn(run, tmp_path, drawn):
    for name in ("a/out", "b/out"):
        shutil.copytree(run[0], tmp_path / name)
    plot(tmp_path / "a" / "out", [tmp_path / "b" / "out"])
    labels = drawn[0].axes[1].get_legend_handles_labels()[1]
    assert labels == [str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]


def test_every_probe_has_its_parabola_and_verdict(run):
    folder, trainer = run
    found = probes(read_log(folder))
    assert [entry["lqa_probe_step"] for entry in found] == list(range(1, 25))
    # Verdicts are those that the optimizer found.
    counts = {v: sum(entry["fit"].verdict is v for entry in found) for v in Verdict}
    assert counts == {v: trainer.lqa.counts[v.value] for v in Verdict}
    for entry in found:
        assert entry["fit"].slope == entry["lqa_slope"] and entry["fit"].curvature == entry["lqa_curvature"]
    assert is_png(plot(folder, probe=3))


@pytest.mark.parametrize(
    "verdict, minimum", [("accepted", "its minimum: 0.2"), ("clamped", "bound, short of its minimum")]
)
def test_one_probe_is_its_three_losses_and_its_parabola(verdict, minimum, tmp_path, drawn):
    line = {"step": 3, "loss": 2.0, "learning_rate": 0.05, "lqa_probe_step": 3, f"lqa_verdict_{verdict}": 1}
    line |= {"lqa_slope": -2.0, "lqa_curvature": 10.0, "lqa_fit_step_size": 0.2, "lqa_probe_radius": 0.1}
    line |= {"lqa_loss_minus": 2.25, "lqa_loss_center": 2.0, "lqa_loss_plus": 1.85}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [line]}))
    plot(tmp_path, probe=3)
    axes = drawn[0].axes[0]
    assert curve(axes, "losses measured") == ([-0.1, 0, 0.1], [2.25, 2.0, 1.85])
    assert curve(axes, "step taken: 0.05") == ([0.05], [pytest.approx(1.9125)])
    assert any(line.get_label().startswith(minimum) for line in axes.lines) and verdict in axes.get_title()


def test_the_last_checkpoint_will_do(tmp_path):
    trainer = LQATrainer(
        tiny_bert(), arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=10), train_dataset=rows()
    )
    trainer.train()
    assert not (tmp_path / "trainer_state.json").exists()
    assert max(entry["step"] for entry in read_log(tmp_path)) == 10


def test_the_schedule_is_what_lies_between_base_step_size_and_rate(run):
    for entry in read_log(run[0]):
        if "loss" in entry and entry["step"] > 3:  # the ramp
            factor = 1 - (entry["step"] - 1) / 24
            assert entry["learning_rate"] == pytest.approx(factor * entry["lqa_base_step_size"])


def called(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, argv)])
    module.main()
    return capsys.readouterr().out.strip()


def test_command_line(run, tmp_path):
    command = [sys.executable, "-m", "hf_lqa.plot", str(run[0]), "--probe", "2", "--output", str(tmp_path / "p.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "p.png") and is_png(tmp_path / "p.png")


def test_runs_to_compare_may_all_be_given_behind_the_flag(run, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(run[0], tmp_path / "other")
    for argv in ([run[0], "--compare", other], ["--compare", run[0], other]):
        path = run[0] / "lqa_compare.png"
        path.unlink(missing_ok=True)
        assert called(monkeypatch, capsys, *argv) == str(path) and is_png(path)
    assert called(monkeypatch, capsys, run[0], "--details") == str(run[0] / "lqa_details.png")
    with pytest.raises(SystemExit):
        called(monkeypatch, capsys)
    assert "no OUTPUT_DIR given" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"hf_lqa\.plot: error: OUTPUT_DIR='nowhere': there is no such folder"):
        called(monkeypatch, capsys, "nowhere")


def test_wrong_input(run, tmp_path, monkeypatch):
    name = rf"OUTPUT_DIR='{tmp_path}': "
    with pytest.raises(ValueError, match=rf"{name}no trainer_state\.json"):
        plot(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}no trainer_state\.json"):
        plot(run[0], [tmp_path])
    with pytest.raises(ValueError, match=r"--probe 999: no probe of this step was logged; there are: 1, 2, 3"):
        plot(run[0], probe=999)
    with pytest.raises(ValueError, match="--compare, --details and --probe are pictures of their own"):
        plot(run[0], details=True, probe=1)
    for cut in ("", '{"log_history": [', "[]"):
        (tmp_path / "trainer_state.json").write_text(cut)
        with pytest.raises(ValueError, match=rf"{name}trainer_state\.json is not what a Trainer writes"):
            plot(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    with pytest.raises(ValueError, match=f"{name}.* no training loss"):
        plot(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf-lqa\[plot\]"'):
        plot(run[0])


def test_logs_of_other_optimizers_and_older_versions_have_loss_and_rate_only(tmp_path):
    line = {"step": 1, "loss": 2.0, "learning_rate": 1e-4}
    old = {"lqa_step_size": 1e-4, "lqa_level": 3e-4, "lqa_probe_step": 1, "lqa_slope": -1.0, "lqa_rejected": 0}
    for entry, said in ((line, "no probe of LQA in the log"), (line | old, "step 1 .* logged by an older hf_lqa")):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
        assert is_png(plot(tmp_path))
        for asked in ({"details": True}, {"probe": 1}):
            with pytest.raises(ValueError, match=rf"OUTPUT_DIR='{tmp_path}': {said}"):
                plot(tmp_path, **asked)
