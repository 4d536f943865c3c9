"""What a run leaves behind: TensorBoard's events, the model card, what goes to the hub, trials of a search."""

import base64
import json
import math
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from common import Recorder, arguments, logged, rows, tiny_bert, trained
from transformers.integrations import integration_utils

from hf_lqa import LQA, Fit, LQATrainer, ProbeRecord, Verdict
from hf_lqa.logs import counts, probe_measurements, probes
from hf_lqa.quadratic import rejected

MEASURED = ["slope", "curvature", "probe_radius", "probe_step", "loss_minus", "loss_center", "loss_plus"]
COUNTS = ["lqa_probe_forwards", "lqa_rejected", "lqa_searched", "lqa_skipped"]


def recorded(tmp_path, **changes):
    """A Trainer after training, and what its optimizer had decided at each step."""
    data = rows()
    trainer = LQATrainer(tiny_bert(), arguments(tmp_path, **changes), train_dataset=data, eval_dataset=data[:8])
    recorder = Recorder(trainer)
    trainer.train()
    return trainer, recorder.steps


def lines(trainer, having="loss"):
    return [entry for entry in trainer.state.log_history if having in entry]


def own(line):
    return {key: value for key, value in line.items() if key.startswith("lqa_")}


def test_an_ordinary_line_has_three_keys_at_most_and_what_is_measured_is_in_one(tmp_path):
    trainer, steps = recorded(
        tmp_path, max_steps=70, eval_strategy="steps", eval_steps=10, optim_args="probe_interval=25"
    )
    ordinary = [own(line) for line in lines(trainer) if "lqa_probe_step" not in line]
    assert len(ordinary) > 60 and all(0 < len(line) <= 3 and "lqa_base_step_size" in line for line in ordinary)
    probed = [i for i, step in enumerate(steps) if step["probe_step"] == i]
    assert [i + 1 for i in probed] == logged(trainer, "lqa_probe_step") and len(probed) > 1
    for i in probed:
        line, step = lines(trainer)[i], steps[i]
        losses = [line[f"lqa_loss_{at}"] for at in ("minus", "center", "plus")]
        assert losses == step["losses"] and line["lqa_probe_radius"] == step["radius"]
        assert line["lqa_slope"] == step["slope"] and line["lqa_curvature"] == step["curvature"]
        assert line["lqa_probe_forwards"] == step["forwards"]
        assert [value for key, value in line.items() if key.startswith("lqa_verdict_")] == [1]
    assert not any(own(line) for line in lines(trainer, "eval_loss"))
    assert {key: lines(trainer, "train_runtime")[0][key] for key in COUNTS} == counts(trainer.lqa)
    assert {value for line in trainer.state.log_history for value in map(type, line.values())} <= {int, float}


def test_what_is_left_out_is_what_was_logged_last(tmp_path):
    """Reading a log downwards, and keeping what a line does not have, gives back what every step had."""
    trainer, steps = recorded(tmp_path, max_steps=60)
    known, agreements = {"lqa_multiplier_min": 1.0, "lqa_multiplier_max": 1.0}, 0
    for line, step in zip(lines(trainer), steps, strict=True):
        known |= own(line)
        multipliers = step["multipliers"] or [1.0]
        assert (known["lqa_multiplier_min"], known["lqa_multiplier_max"]) == (min(multipliers), max(multipliers))
        if known.get("lqa_sign_agreement") != step["agreement"]:  # no room in the line
            assert len(own(line)) == 3
        agreements += "lqa_sign_agreement" in line
    assert agreements > 15 and known["lqa_multiplier_min"] < 1 < known["lqa_multiplier_max"]


@pytest.mark.parametrize("first", [False, True])
def test_of_several_probes_between_two_lines_the_last_is_logged(first, tmp_path):
    trainer, steps = recorded(
        tmp_path, max_steps=24, logging_steps=6, logging_first_step=first, optim_args="probe_interval=4"
    )
    at = [1] * first + [6, 12, 18, 24]
    assert [line["step"] for line in lines(trainer)] == at
    assert logged(trainer, "lqa_probe_step") == [steps[step - 1]["probe_step"] + 1 for step in at]
    assert logged(trainer, "lqa_probe_forwards")[:-1] == [steps[step - 1]["forwards"] for step in at]


@pytest.mark.parametrize("stop", [5, 9, 12])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(stop, tmp_path):
    """Also where a probe was taken before the interruption that no line had yet."""
    settings = dict(max_steps=24, logging_steps=3, save_strategy="steps", save_steps=stop)
    settings |= {"optim_args": "probe_interval=4"}
    whole = trained(tmp_path, **settings)
    checkpoint = str(tmp_path / f"checkpoint-{stop}")
    resumed = trained(tmp_path, tiny_bert(seed=9), resume_from_checkpoint=checkpoint, **settings)
    assert [own(line) for line in lines(resumed)] == [own(line) for line in lines(whole)]
    assert any("lqa_probe_step" in line for line in lines(resumed) if line["step"] > stop)


def test_a_second_training_does_not_log_the_first_ones_measurements(tmp_path):
    trainer = trained(tmp_path, max_steps=3)
    forwards = trainer.lqa.counts["probe_forwards"]
    trainer.train()
    assert not any("lqa_probe_step" in line for line in lines(trainer)[:1])
    assert all(line.get("lqa_probe_forwards", forwards + 1) > forwards for line in lines(trainer))


def test_counts_are_logged_when_they_change(tmp_path):
    class Poisoned(LQATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * math.nan if self.state.global_step in (5, 8) else loss

    trainer = trained(tmp_path, trainer_class=Poisoned, max_steps=14)
    assert [(line["step"], line["lqa_skipped"]) for line in lines(trainer) if "lqa_skipped" in line] == [(6, 1), (9, 2)]
    found = [line["lqa_rejected"] for line in lines(trainer) if "lqa_rejected" in line]
    assert found == list(range(1, rejected(trainer.lqa.counts) + 1)) and found


def test_what_is_not_finite_is_left_out_and_has_its_verdict(tmp_path):
    lqa = LQA(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    fit = Fit(math.nan, math.nan, None, Verdict.NON_FINITE)
    lqa.last_probe = ProbeRecord(3, 0.5, 1.0, 2.0, math.inf, fit)
    expected = {"lqa_probe_step": 4, "lqa_probe_radius": 0.5, "lqa_loss_minus": 1.0, "lqa_loss_center": 2.0}
    assert probe_measurements(lqa) == {**expected, "lqa_verdict_non_finite": 1}
    (found,) = probes([{**probe_measurements(lqa), "step": 4}])
    assert found["fit"].verdict is Verdict.NON_FINITE and found["fit"].step_size is None


def test_tensorboard_has_the_rate_that_was_applied_and_what_it_came_from(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    warned = []
    monkeypatch.setattr(integration_utils.logger, "warning", lambda *message: warned.append(message))
    trainer = trained(tmp_path, report_to=["tensorboard"], optim_args="probe_interval=4", max_steps=40)
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    names = {key for line in lines(trainer) for key in own(line)} | {"learning_rate"}
    verdicts = {name for name in names if name.startswith("lqa_verdict_")}
    measured = {f"lqa_{name}" for name in [*MEASURED, "fit_step_size", "base_step_size", "sign_agreement"]}
    never = {"lqa_searched", "lqa_skipped"}  # but at the end
    measured |= {"lqa_multiplier_min", "lqa_multiplier_max", "lqa_probe_forwards", "lqa_rejected", *never}
    assert measured | verdicts | {"learning_rate"} == names | never and verdicts
    for name in {*names, *never}:
        scalars = events.Scalars(f"train/{name}")
        assert scalars and [s.value for s in scalars] == pytest.approx(logged(trainer, name)), name
    assert [s.step for s in events.Scalars("train/learning_rate")] == list(range(1, 41))
    assert not warned


def test_model_card_tells_what_was_done(tmp_path):
    trainer = trained(tmp_path, optim_args="base=adamw_torch,probe_interval=2")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    rates = [r for r in logged(trainer, "learning_rate") if r]
    assert f"- learning_rate: measured, {min(rates):.2g} to {max(rates):.2g}\n" in card
    assert "- optimizer: Use lqa around adamw_torch with betas=(0.9,0.999)" in card
    assert "optimizer_args=base=adamw_torch,probe_interval=2" in card
    assert "5e-05" not in card.replace("measured, 5e-05", "")
    assert trainer.args.optim == "lqa" and trainer.args.learning_rate == 5e-5


def test_model_card_of_another_optimizer_is_the_parents(tmp_path):
    trained(tmp_path, optim="adamw_torch").create_model_card()
    assert "- learning_rate: 5e-05\n" in (tmp_path / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """The little of the hub's HTTP interface that an upload uses; keeps the files of each commit."""

    def _reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "whoami" in self.path:
            self._reply({"type": "user", "name": "someone", "auth": {"accessToken": {"role": "write"}}})
        else:
            self._reply({"id": "someone/model", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self._reply({"url": f"{self.server.url}/someone/model", "id": "someone/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._reply({"commitUrl": f"{self.server.url}/someone/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._reply({})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import sys
from common import trained
changes = dict(push_to_hub=True, hub_model_id="someone/model", hub_token="hf_none", save_strategy="steps")
trained(sys.argv[1], **changes).push_to_hub()
"""


def test_push_to_hub(tmp_path, hub):
    # A process of its own: huggingface_hub reads where the hub is, and whether to go there, when it is imported.
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", PUSH, str(tmp_path)], env=env, check=True, timeout=300)
    assert "- optimizer: Use lqa around" in hub.files["README.md"].decode()
    assert {"config.json", "model.safetensors", "training_args.bin"} <= hub.files.keys()


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    args = arguments(tmp_path, eval_strategy="epoch", max_steps=8, load_best_model_at_end=False)
    rates, clipped = [], []

    class Watching(LQATrainer):
        def log(self, logs, *more, **kwargs):
            super().log(logs, *more, **kwargs)
            if "loss" in logs:
                rates.append(logs["learning_rate"])
                clipped.append(self.lqa.rule.config.probe_interval)

    trainer = Watching(args=args, model_init=lambda: tiny_bert(), train_dataset=rows(64), eval_dataset=rows(64))

    def space(trial):
        return {"optim_args": trial.suggest_categorical("optim_args", ["probe_interval=1", "probe_interval=2"])}

    best = trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=2, direction="minimize")
    assert best.hyperparameters["optim_args"].startswith("probe_interval=")
    assert len(rates) == 16 and all(rate > 0 for rate in rates)
    assert set(clipped) <= {1, 2}


def test_a_trial_of_a_search_still_sees_its_gradients_clipped(tmp_path, monkeypatch):
    trainer = LQATrainer(tiny_bert(), arguments(tmp_path, max_grad_norm=1e-3), train_dataset=rows())
    trainer.create_accelerator_and_postprocess()
    seen = []
    observe = LQA.observe_clipping

    def observe_clipping(self, norm, limit, whole):
        seen.append((float(norm), limit))
        observe(self, norm, limit, whole)

    monkeypatch.setattr(LQA, "observe_clipping", observe_clipping)
    trainer.train()
    assert len(seen) == 12 and all(norm > limit == 1e-3 for norm, limit in seen)


def test_a_learning_rate_given_by_hand_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"learning_rate=0\.001 is not used with optim='lqa'.*Leave it out"):
        LQATrainer(tiny_bert(), arguments(tmp_path, learning_rate=1e-3), train_dataset=rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LQATrainer(tiny_bert(), arguments(tmp_path), train_dataset=rows())
        LQATrainer(tiny_bert(), arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3), train_dataset=rows())


def test_half_precision_without_a_device_for_it_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"fp16=True has no effect on a CPU.*Leave it out"):
        LQATrainer(tiny_bert(), arguments(tmp_path, fp16=True), train_dataset=rows())


def announced(capsys):
    begin, end = (line for line in capsys.readouterr().out.splitlines() if line.startswith("LQA: "))
    return begin, end


def test_start_and_end_are_announced(tmp_path, capsys):
    folder = tmp_path / "my run"
    trainer = trained(folder, lr_scheduler_type="cosine")
    command = f"python -m hf_lqa.plot '{folder}'"
    begin, end = announced(capsys)
    assert "no --learning_rate is needed: AdamW's is measured" in begin
    assert "--lr_scheduler_type cosine multiplies it" in begin
    assert "See learning_rate in the logs" in begin and begin.endswith(command)
    rates = logged(trainer, "learning_rate")
    assert f"learning rates from {min(rates):.2g} to {max(rates):.2g}; probes took " in end
    assert "skipped" not in end and end.endswith(f"To see them, after trainer.save_state(): {command}")
    trained(folder, lr_scheduler_type="cosine", save_strategy="epoch")
    assert announced(capsys)[1].endswith(f"To see them: {command}")
    trained(folder).save_state()  # what lies there is of the run before
    assert announced(capsys)[1].endswith(f"To see them, after trainer.save_state(): {command}")
    trained(folder, save_strategy="epoch")
    assert announced(capsys)[1].endswith(f"To see them, after trainer.save_state(): {command}")


def test_a_schedule_of_ones_own_and_skipped_steps_are_announced(tmp_path, capsys):
    model = tiny_bert()
    optimizer = LQA(torch.optim.SGD(model.parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)

    class Poisoned(LQATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs, **kwargs) * (math.nan if self.state.global_step < bad else 1)

    args = arguments(tmp_path, optim="sgd", max_steps=5)
    for bad, said in ((2, "learning rates from"), (5, "LQA: no step was taken")):
        trainer = Poisoned(model, args, train_dataset=rows(), optimizers=(optimizer, schedule))
        trainer.train()
        begin, end = announced(capsys)
        assert "SGD's is measured" in begin and "the StepLR that was given multiplies it" in begin
        assert said in end and f" {bad} steps were skipped, whose gradients were not finite" in end
