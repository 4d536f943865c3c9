"""``python -m hf_lqa SCRIPT``, through the command line, with a script of the shape of the official examples."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import json
import os
import sys
from dataclasses import dataclass, field

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)


@dataclass
class ModelArguments:
    kind: str = field(default="trainer")


class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, eval_examples=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


def main():
    kind = sys.argv[sys.argv.index("--kind") + 1]
    arguments = Seq2SeqTrainingArguments if kind == "seq2seq" else TrainingArguments
    model_args, training_args = HfArgumentParser((ModelArguments, arguments)).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    rows = [{"input_ids": torch.randint(1, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(64)]
    cls = {"trainer": Trainer, "seq2seq": Seq2SeqTrainer, "own": QuestionAnsweringTrainer}[model_args.kind]
    trainer = cls(model=BertForSequenceClassification(config), args=training_args, train_dataset=rows)
    trainer.train()
    lqa = getattr(trainer, "lqa", None)
    with open("result.json", "w") as file:
        json.dump(
            {
                "argv": sys.argv,
                "name": __name__,
                "file": __file__,
                "path0": sys.path[0],
                "main": sys.modules["__main__"].__file__,
                "class": type(trainer).__name__,
                "is_own": isinstance(trainer, QuestionAnsweringTrainer),
                "probe_forwards": lqa.counts["probe_forwards"] if lqa else 0,
                "loss": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            },
            file,
        )


if __name__ == "__main__":
    main()
"""
FLAGS = (
    "--output_dir out --max_steps 6 --logging_steps 1 --use_cpu --report_to none --save_strategy no --disable_tqdm true"
)
CLASSES = {"trainer": "Trainer", "seq2seq": "Seq2SeqTrainer", "own": "QuestionAnsweringTrainer"}


def run(folder, *command, check=True):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def script(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "run_task.py").write_text(SCRIPT)
    return "scripts/run_task.py"


@pytest.mark.parametrize("kind", CLASSES)
def test_an_unmodified_script_is_probed(kind, script, tmp_path):
    flags = [*FLAGS.split(), "--kind", kind, "--optim", "lqa"]
    done = run(tmp_path, "-m", "hf_lqa", script, *flags)
    found = result(tmp_path)
    assert found["probe_forwards"] > 0
    assert found["class"] == CLASSES[kind]
    assert found["is_own"] == (kind == "own")
    assert found["argv"] == [script, *flags]
    assert found["name"] == "__main__"
    assert found["file"] == found["main"] == str(tmp_path / script)
    assert os.path.realpath(found["path0"]) == os.path.realpath(tmp_path / "scripts")
    assert "learning_rate" in done.stdout


def test_with_another_optim_it_is_as_without_the_runner(script, tmp_path):
    flags = [*FLAGS.split(), "--kind", "own", "--optim", "adamw_torch", "--learning_rate", "1e-3"]
    run(tmp_path, "-m", "hf_lqa", script, *flags)
    ours = result(tmp_path)
    run(tmp_path, script, *flags)
    assert result(tmp_path) == ours
    assert ours["probe_forwards"] == 0


def test_without_the_runner_the_name_is_unknown(script, tmp_path):
    done = run(tmp_path, script, *FLAGS.split(), "--kind", "own", "--optim", "lqa", check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("launcher", ["accelerate.commands.launch", "torch.distributed.run"])
def test_launchers(launcher, script, tmp_path):
    flags = [*FLAGS.split(), "--kind", "own", "--optim", "lqa"]
    options = ["--cpu", "--num_processes", "1"] if "accelerate" in launcher else ["--nproc_per_node", "1"]
    run(tmp_path, "-m", launcher, *options, "-m", "hf_lqa", script, *flags)
    assert result(tmp_path)["probe_forwards"] > 0


def test_processes_do_not_end_with_an_open_process_group(tmp_path):
    """Left to the interpreter's exit, gloo's threads abort the process now and then."""
    script = """
        import atexit, os, pathlib, torch, torch.distributed as dist, weakref

        class Cycle:  # as a Trainer is: only the garbage collector frees the model, which holds the group
            def __init__(self):
                self.itself, self.model = self, torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))

        def report(cycle):
            text = f"{dist.is_initialized()} {cycle() is None}"
            pathlib.Path(os.environ["RANK"]).write_text(text)

        dist.init_process_group("gloo")
        atexit.register(report, weakref.ref(Cycle()))
    """
    (tmp_path / "s.py").write_text(textwrap.dedent(script))
    run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_lqa", "s.py")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False True"] * 2


@pytest.mark.parametrize("command", [[], ["missing.py"], ["--optim", "lqa"], ["."]], ids=str)
def test_no_script_is_a_usage_line_and_exit_code_2(command, tmp_path):
    done = run(tmp_path, "-m", "hf_lqa", *command, check=False)
    assert done.returncode == 2
    assert "usage: python -m hf_lqa SCRIPT [ARGS...]" in done.stderr


@pytest.mark.parametrize(
    "body, code",
    [("raise SystemExit(7)", 7), ("import sys; sys.exit('no')", 1), ("def f():\n    1 / 0\nf()", 1), ("x = = 1", 1)],
)
def test_exit_codes_and_tracebacks_are_the_scripts_own(body, code, tmp_path):
    (tmp_path / "s.py").write_text(textwrap.dedent(body))
    ours, direct = run(tmp_path, "-m", "hf_lqa", "s.py", check=False), run(tmp_path, "s.py", check=False)
    assert ours.returncode == direct.returncode == code
    assert ours.stderr.splitlines() == direct.stderr.splitlines()
