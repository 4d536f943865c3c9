"""What a run leaves behind: TensorBoard's events, the model card, what goes to the hub, trials of a search."""

import base64
import json
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from common import arguments, logged, rows, tiny_bert, trained

from hf_lqa import LQATrainer


def test_tensorboard_has_the_rate_that_was_applied_and_what_it_came_from(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(tmp_path, report_to=["tensorboard"], optim_args="warmup=2")
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    names = ["learning_rate", "lqa_step_size", "lqa_level", "lqa_slope", "lqa_end_slope", "lqa_curvature"]
    names += ["lqa_probe_radius", "lqa_rejected", "lqa_skipped", "lqa_probe_forwards"]
    for name in names:
        scalars = events.Scalars(f"train/{name}")
        assert scalars and [s.value for s in scalars] == pytest.approx(logged(trainer, name)), name
    assert [s.step for s in events.Scalars("train/learning_rate")] == list(range(1, 13))


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
                clipped.append(self.lqa.policy.probe_interval)

    trainer = Watching(args=args, model_init=lambda: tiny_bert(), train_dataset=rows(64), eval_dataset=rows(64))

    def space(trial):
        return {"optim_args": trial.suggest_categorical("optim_args", ["probe_interval=1", "probe_interval=2"])}

    best = trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=2, direction="minimize")
    assert best.hyperparameters["optim_args"].startswith("probe_interval=")
    assert len(rates) == 16 and all(rate > 0 for rate in rates)
    assert set(clipped) <= {1, 2}


def test_a_trial_of_a_search_still_sees_its_gradients_clipped(tmp_path):
    trainer = LQATrainer(tiny_bert(), arguments(tmp_path, max_grad_norm=1e-3), train_dataset=rows())
    trainer.create_accelerator_and_postprocess()
    seen = []
    observe = type(trainer).create_optimizer

    def create_optimizer(self, *args, **kwargs):
        optimizer = observe(self, *args, **kwargs)
        original = optimizer.observe_clipping
        optimizer.observe_clipping = lambda norm, limit: (seen.append((float(norm), limit)), original(norm, limit))
        return optimizer

    trainer.create_optimizer = create_optimizer.__get__(trainer)
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


def test_start_and_end_are_announced(tmp_path, capsys):
    trained(tmp_path)
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LQA:")]
    for said in (
        "AdamW direction",
        "policy cross_batch",
        "probes at",
        "--learning_rate (5e-05) is not used",
        "linear",
    ):
        assert said in first
    for said in ("learning rates", "probe forwards", "rejected", "% of the time"):
        assert said in last
