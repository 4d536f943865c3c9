"""``python -m hf_lqa SCRIPT`` and ``-m MODULE``, through the command line, against what ``python`` itself does."""

import abc
import copy
import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import workspace
from transformers import BertConfig, BertForSequenceClassification, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_lqa import LQA, LQATrainerMixin
from hf_lqa.__main__ import main, patch_trainer

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


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize(
    "launcher, target", [("accelerate", "script"), ("accelerate", "module"), ("torchrun", "module")]
)
def test_launchers(launcher, target, script, tmp_path):
    flags = [*FLAGS.split(), "--kind", "own", "--optim", "lqa"]
    flags += ["--ddp_backend", "gloo"] if launcher == "torchrun" else []
    program = [script] if target == "script" else ["-m", "scripts.run_task"]
    run(tmp_path, "-m", *LAUNCHERS[launcher], "-m", "hf_lqa", *program, *flags)
    found = result(tmp_path)
    assert found["probe_forwards"] > 0
    assert found["argv"][1:] == flags
    assert os.path.realpath(found["path0"]) == os.path.realpath(tmp_path / ("scripts" if target == "script" else ""))


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_processes_do_not_end_with_an_open_process_group(end, tmp_path):
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
        def main():
            cycle = Cycle()
            atexit.register(report, weakref.ref(cycle))
            END

        main()
    """
    (tmp_path / "s.py").write_text(textwrap.dedent(script).replace("END", end))
    run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_lqa", "s.py")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False True"] * 2


PROGRAM = """
import atexit, json, multiprocessing, pickle, sys

from {here}beside import NAME

number: int = 3


class Rows:
    length: int = 2


def double(rows):
    return 2 * rows.length


def plain(value):
    return value if isinstance(value, (str, int, type(None))) else type(value).__name__


def spec():
    return __spec__ and {{k: plain(getattr(__spec__, k)) for k in ("name", "origin", "parent", "cached", "loader")}}


def state():
    main = sys.modules["__main__"]
    return {{
        "globals": {{name: plain(value) for name, value in vars(main).items()}},
        "own": vars(main) is globals(),
        "argv": sys.argv,
        "path": sys.path,
        "annotations": [str(Rows.__annotations__), str(__annotations__)],
        "hook": sys.excepthook is sys.__excepthook__,
        "spec": spec(),
        "beside": NAME,
        "pickled": type(pickle.loads(pickle.dumps(Rows()))) is Rows,
    }}


if __name__ == "__main__":
    print(json.dumps(state(), sort_keys=True, default=str))
    # The interpreter forgets the file of a script, not of a module, when it has run.
    atexit.register(lambda: print(json.dumps({{**state(), "globals": None}}, sort_keys=True, default=str)))
    if not __file__.endswith("__main__.py"):  # which `multiprocessing` does not import again
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(double, [Rows()]))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the same program as a script, behind a link, as a module, in a package, and as its ``__main__``."""
    folder = tmp_path_factory.mktemp("programs")
    for place in (".", "scripts", "pkg", "pkg/inner"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "beside.py").write_text(f"NAME = {place!r}")
        here = "." if place.startswith("pkg") else ""
        for name in ("__main__", "program") if here else ("program",):
            (folder / place / f"{name}.py").write_text(PROGRAM.format(here=here))
    (folder / "pkg" / "inner" / "__init__.py").write_text("import sys\nprint(sys.argv)")
    (folder / "pkg" / "__init__.py").touch()
    (folder / "scripts" / "paths.py").write_text("import sys\nprint(sys.path, sys.argv)")
    (folder / "broken.py").write_text("import json\nx = = 1")
    (folder / "link.py").symlink_to(folder / "scripts" / "program.py")
    (folder / "namespace").mkdir()
    (folder / "namespace" / "part.py").write_text("import sys\n\ndef f():\n    raise KeyboardInterrupt\n\nf()")
    return folder


def both(folder, *program, options=()):
    """What became of a program under the runner and without it."""
    done = [run(folder, *options, *middle, *program, check=False) for middle in (["-m", "hf_lqa"], [])]
    assert done[0].returncode == done[1].returncode
    return done


@pytest.mark.parametrize(
    "command",
    [
        ["scripts/program.py", "--optim", "lqa"],
        ["./scripts/../link.py"],
        ["-m", "program", "-m", "x"],
        ["-m", "pkg"],
        ["-mpkg.inner", "--help"],
        pytest.param(
            ["-P", "scripts/paths.py"],
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is of Python 3.11"),
        ),
    ],
    ids=" ".join,
)
def test_a_program_finds_itself_as_without_the_runner(command, programs):
    options = [part for part in command if part == "-P"]
    ours, direct = both(programs, *command[len(options) :], options=options)
    assert direct.returncode == 0, direct.stderr
    assert ours.stdout == direct.stdout
    assert ours.stderr == direct.stderr


@pytest.mark.parametrize("name", ["no.such.module", "namespace", "broken", "namespace.part", "scripts/program.py"])
def test_a_module_that_does_not_run_says_so_as_python_m_does(name, programs):
    ours, direct = both(programs, "-m", name)
    assert ours.returncode != 0
    lines = ours.stderr.splitlines()
    if name == "scripts/program.py":
        assert lines.pop(0) == "python -m hf_lqa: 'scripts/program.py' is a file: to run it, leave out -m"
    assert lines == direct.stderr.splitlines()
    assert name in ours.stderr or name.rpartition(".")[2] in ours.stderr


@pytest.mark.parametrize(
    "command, message",
    [
        ([], "no SCRIPT given"),
        (["missing.py"], "SCRIPT='missing.py' is not a file"),
        (["--optim", "lqa"], "no SCRIPT given before '--optim'"),
        (["."], "SCRIPT='.' is not a file"),
        (["-m"], "no MODULE given after -m"),
        (["-m", "", "--optim", "lqa"], "no MODULE given after -m"),
    ],
)
def test_no_program_is_a_usage_line_and_exit_code_2(command, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_lqa", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    usage = "usage: python -m hf_lqa SCRIPT [ARGS...]\n       python -m hf_lqa -m MODULE [ARGS...]\n"
    assert capsys.readouterr().err == f"{usage}python -m hf_lqa: error: {message}\n"


MISUSED = """
import sys
import traceback
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

class Own(Trainer):
    def __init__(self, name, **kwargs):
        super().__init__(**kwargs)

class Passing(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

args = TrainingArguments("out", use_cpu=True, report_to="none")
wrong = {
    "unknown": lambda: Trainer(bogus=1),
    "unknown, of a subclass": lambda: Passing(args=args, bogus=1),
    "unknown, of a subclass of Transformers": lambda: Seq2SeqTrainer(args=args, bogus=1),
    "missing": lambda: Own(args=args),
    "surplus": lambda: Trainer(*range(20)),
    "twice": lambda: Passing(None, args, args=args),
    "self": lambda: Trainer(self=1),
    "nothing": lambda: Trainer.__init__(),
    "no model": lambda: Trainer(args=args),
    "no pair of optimizers": lambda: Trainer(lambda x: x, args, optimizers=3),
    "no arguments": lambda: Trainer(args, "out"),
}
for kind, build in wrong.items():
    try:
        build()
    except Exception as error:
        print(kind, type(error), error)
try:
    Passing(args=args, bogus=1)
except TypeError as error:
    raise RuntimeError("no trainer") from error
"""


def test_wrong_arguments_of_a_trainer_get_the_message_and_traceback_that_they_have_without_the_runner(tmp_path):
    (tmp_path / "s.py").write_text(MISUSED)
    ours, direct = both(tmp_path, "s.py")
    assert direct.stdout.count("Trainer.__init__() got an unexpected keyword argument 'bogus'") == 3
    assert ours.stdout == direct.stdout
    assert ours.stderr == direct.stderr
    assert direct.stderr.endswith("RuntimeError: no trainer\n")


@pytest.mark.parametrize(
    "body, code",
    [
        ("raise SystemExit(7)", 7),
        ("import sys; sys.exit('no')", 1),
        ("def f():\n    1 / 0\nf()", 1),
        ("x = = 1", 1),
        (
            "import sys\nsys.excepthook = lambda *e: print(e[2].tb_frame.f_code.co_name, file=sys.stderr)\n1 / 0",
            1,
        ),
    ],
)
def test_exit_codes_and_tracebacks_are_the_scripts_own(body, code, tmp_path):
    (tmp_path / "s.py").write_text(textwrap.dedent(body))
    ours, direct = both(tmp_path, "s.py")
    assert ours.returncode == code
    assert ours.stderr.splitlines() == direct.stderr.splitlines()


@pytest.fixture
def patched(monkeypatch):
    """Transformers as the runner leaves it, in this process."""
    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", original)
    patch_trainer()
    return original


def build(cls, tmp_path, optim="lqa", **kwargs):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **size))
    flags = {"use_cpu": True, "report_to": "none", "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
    args = Seq2SeqTrainingArguments(str(tmp_path), optim=optim, **flags)
    rows = [{"input_ids": torch.randint(1, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    return cls(model=model, args=args, train_dataset=rows, **kwargs)


def test_a_patched_trainer_looks_as_before(patched):
    assert inspect.signature(Trainer.__init__) == inspect.signature(patched)
    assert inspect.getfullargspec(Trainer.__init__) == inspect.getfullargspec(patched)
    assert inspect.getsource(Trainer.__init__) == inspect.getsource(patched)
    assert Trainer.__init__.__doc__ == patched.__doc__


class Strict(Trainer, abc.ABC):
    """Refuses subclasses that do not say what they are."""

    def __init__(self, *args, purpose, **kwargs):
        super().__init__(*args, **kwargs)
        self.purpose = purpose

    def __init_subclass__(cls, *, purpose):
        raise AssertionError(f"{cls} is a subclass that nobody has written")


def test_a_trainer_that_became_one_of_ours_is_still_of_its_class(patched, tmp_path):
    trainer = build(Strict, tmp_path, purpose="test")
    cls = type(trainer)
    assert isinstance(trainer, Strict) and isinstance(trainer, LQATrainerMixin)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        "Strict",
        "Strict",
        __name__,
        Strict.__doc__,
    )
    assert inspect.signature(cls) == inspect.signature(Strict)
    assert inspect.getsource(cls) == inspect.getsource(Strict)
    assert type(build(Strict, tmp_path, purpose="again")) is cls
    # As hyperparameter searches do, and scripts that build another like it.
    for again in (copy.copy(trainer), build(cls, tmp_path, purpose="of its class")):
        again.train()
        assert again.lqa.counts["probe_forwards"] > 0
    other = build(cls, tmp_path, optim="adamw_torch", purpose="not ours")
    other.train()
    assert other.lqa is None


@pytest.mark.parametrize("cls", [Trainer, Seq2SeqTrainer])
def test_trainers_with_another_optim_keep_their_class(cls, patched, tmp_path):
    assert type(build(cls, tmp_path, optim="adamw_torch")) is cls
    lqa = LQA(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    assert isinstance(build(cls, tmp_path, optim="adamw_torch", optimizers=(lqa, None)), LQATrainerMixin)


TRL = "--max_length 32 --max_steps 2 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --use_cpu"


@pytest.mark.parametrize("script", ["sft", "dpo", "reward"])
def test_trls_scripts_by_module(script, tmp_path):
    pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    sentences = [text for _, text in workspace.sentences(24)]
    workspace.tokenizer(sentences).save_pretrained(tmp_path / "model")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=200, max_position_embeddings=64, pad_token_id=0, num_labels=1, **size)
    (LlamaForSequenceClassification if script == "reward" else LlamaForCausalLM)(config).save_pretrained(
        tmp_path / "model"
    )
    rows = [{"prompt": text, "chosen": f" {text} dog", "rejected": f" {text} cat"} for text in sentences]
    if script == "sft":
        rows = [{"text": text} for text in sentences]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", "out", "--report_to", "none"]
    flags += [*TRL.split(), "--optim", "lqa", "--bf16", "False", "--dtype", "float32"]
    done = run(tmp_path, "-m", "hf_lqa", "-m", f"trl.scripts.{script}", *flags)
    assert done.stdout.count("LQA: ") == 2
    assert workspace.probed(tmp_path / "out" / "checkpoint-2")
    rates = [e["learning_rate"] for e in workspace.state(tmp_path / "out" / "checkpoint-2")["log_history"]]
    assert len(rates) == 2 and not {*rates} & {0, 5e-5, 1e-6, 1e-4}
