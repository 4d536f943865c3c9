"""Every command of the documentation is run, here or by what is named here; every link leads to a file.

Sources are the Markdown files, the docstrings of the scripts in examples/, and the first lines of configs/*.yaml.
"""

import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import workspace

import hf_lqa.plot
from hf_lqa.rule import OPTIONS, DisplacementConfig, build
from hf_lqa.rule.multipliers import MultiplierConfig
from hf_lqa.rule.paper import PaperConfig
from hf_lqa.rule.prior import PriorConfig
from hf_lqa.rule.radius import RadiusConfig

ROOT = Path(__file__).parent.parent
MARKDOWN = [p for p in sorted(ROOT.rglob("*.md")) if not any(d[0] == "." for d in p.relative_to(ROOT).parts[:-1])]
#: With arguments: ``python -m hf_lqa`` alone is a name.
COMMAND = re.compile(r"(\w+=\S+ )?(python3?|accelerate launch|torchrun|pip|pytest|ruff|mypy|git|hf) (?!-m( \S+)?$)\S")

#: Commands that are run elsewhere: by which file, and the words there that run it.
ELSEWHERE = {
    'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[examples]" && python examples/quickstart.py': (
        ".ci/run",
        ".venv/bin/python examples/quickstart.py --short",
    ),
    'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest': (
        ".ci/run",
        "readme test-command",
    ),
    "pip install -e .": (".ci/run", "pip install --quiet --no-deps -e ."),
    'pip install -e ".[lightning]"': ("pyproject.toml", '"hf-lqa[lightning]"'),
    "python -m hf_lqa -m MODULE ARGS": ("tests/test_runner.py", 'f"trl.scripts.{script}"'),
    "python -m hf_lqa -m trl.scripts.sft --optim lqa ...": ("tests/test_runner.py", 'f"trl.scripts.{script}"'),
    "accelerate launch -m hf_lqa -m MODULE ARGS": (
        "tests/test_runner.py",
        '("accelerate", "module")',
    ),
    "torchrun --nproc_per_node 2 -m hf_lqa -m MODULE ARGS": (
        "tests/test_runner.py",
        '("torchrun", "module")',
    ),
    'pip install -e ".[examples]"': ("pyproject.toml", 'test = [\n    "hf-lqa[examples]"'),
    "python -m pytest tests/test_setups.py -k NAME": (".ci/run", "readme test-command"),
    "python -m pytest tests/test_gpu.py": (".ci/run", "readme test-command"),
    "HF_SCRIPTS=path/to/transformers/examples/pytorch pytest tests/test_hf_scripts.py": (
        "tests/test_hf_scripts.py",
        'os.environ.get("HF_SCRIPTS")',
    ),
}
#: Measurements that take minutes to hours: that the files and their arguments exist is all that is tested here.
BENCHMARKS = re.compile(r"python (examples/benchmarks|tests|tests/conformance)/\w+\.py")
#: Words that stand for something of the reader's, and what it is in the workspace.
STAND_FOR = {
    "OUTPUT_DIR": "out/mine",
    "OTHER_DIR": "out/adamw",
    "--optim lqa ...": "--optim lqa --output_dir out/script",
}
STAND_FOR |= {"SCRIPT ARGS": "my_script.py --optim lqa --output_dir out/script"}
#: What shortens a command.
FLAGS = {
    "quickstart.py": "--short --disable_tqdm True --use_cpu --report_to none",
    "parabola.py": "--cache_dir cache --step 1 --points 5 --batch_size 8 --output out/parabola.png",
    "pytorch_loop.py": "--steps 60",
    "accelerate_loop.py": "",
    "lightning_loop.py": "--steps 60",
    "minimal.py": "",
}
#: What comes out, as the table in examples/README.md says: a number of this name.
METRIC = {
    "minimal.py": "accuracy",
    "quickstart.py": "accuracy",
    "text_classification.py": "accuracy",
    "configs/text_regression.yaml": "mse",
    "causal_language_modeling.py": "perplexity",
    "summarization.py": "rouge_l",
    "image_classification.py": "accuracy",
    "pytorch_loop.py": "accuracy",
    "accelerate_loop.py": "accuracy",
    "lightning_loop.py": "accuracy",
}
MY_SCRIPT = """
import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

(training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
rows = [dict(input_ids=torch.randint(1, 50, (6,)), labels=torch.tensor(i % 2)) for i in range(64)]
trainer = Trainer(BertForSequenceClassification(BertConfig(**size)), training_args, train_dataset=rows)
trainer.train()
trainer.save_state()
"""


def in_markdown(text):
    """Lines of code blocks, and commands with arguments within sentences."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash", "sh", "shell")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in lines + re.findall(r"`([^`\n]+)`", prose) if COMMAND.match(line)]


def in_docstring(text):
    doc = re.match(r'"""(.*?)"""', text, re.DOTALL)
    lines = re.sub(r"\\\\\n\s*", " ", doc[1] if doc else "").splitlines()
    return [line.strip() for line in lines if line.startswith("    ") and COMMAND.match(line.strip())]


def documented():
    """Each command, and the files it is in."""
    found = {}
    for path in MARKDOWN:
        for command in in_markdown(path.read_text(encoding="utf-8")):
            found.setdefault(command, []).append(path.relative_to(ROOT))
    for path in sorted((ROOT / "examples").glob("*.py")):
        for command in in_docstring(path.read_text(encoding="utf-8")):
            found.setdefault(command, []).append(path.relative_to(ROOT))
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        command = first.removeprefix("# ").partition(",")[0]
        assert COMMAND.match(command), f"{path}: the first line says how to use it"
        found.setdefault(command, []).append(path.relative_to(ROOT))
    return found


COMMANDS = documented()
HERE = [c for c in COMMANDS if c not in ELSEWHERE and not BENCHMARKS.match(c) and " -m hf_lqa run_" not in c]
#: The README's three lines; those of examples/HF_SCRIPTS.md are run in test_hf_scripts.py.
HERE += [c for c in COMMANDS if " -m hf_lqa run_" in c and c.endswith("...")]
HERE.sort(key=lambda command: "hf_lqa.plot" in command)  # after the runs that they draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for module in ("datasets", "evaluate", "matplotlib", "peft", "PIL", "trl", "yaml"):
        pytest.importorskip(module)
    folder = workspace.build(tmp_path_factory.mktemp("docs"))
    for name in ("my_script.py", "run_glue.py"):
        (folder / name).write_text(MY_SCRIPT)
    return folder


def shortened(command):
    for word, meaning in STAND_FOR.items():
        command = command.replace(word, meaning)
    if "hf_lqa.plot" in command or ".yaml" in command.rpartition(".py")[2]:
        return command
    script = re.search(r"(\w+\.py)", command)[1]
    return f"{command} {FLAGS.get(script, workspace.SHORT)}"


def check(command, printed, folder):
    """What came out is what the documentation says comes out."""
    if "hf_lqa.plot" in command:
        assert (folder / printed.strip()).read_bytes()[:4] == b"\x89PNG"
        return
    for name in (name for name in METRIC if name in command):
        number = re.findall(rf"^{METRIC[name]}: (-?\d+\.\d+)", printed, re.MULTILINE)
        assert len(number) == 1 or (name == "text_classification.py" and "regression" in command), printed
    if "_loop.py" in command:
        assert int(re.search(r"probe forwards: (\d+)", printed)[1]) > 0
    elif "parabola.py" in command:
        assert (folder / "out" / "parabola.png").is_file()
    elif "adamw_torch" not in command:
        assert printed.count("LQA: ") == 2, printed  # of two processes one speaks
        output_dir = re.search(r"--output_dir (\S+)", command)
        if "examples/" in command:
            said = dict(re.findall(r"^(plot|model|adapter|next): (.*)$", printed, re.MULTILINE))
            picture, saved = folder / said["plot"], said.get("model") or said["adapter"]
            assert picture.read_bytes()[:4] == b"\x89PNG" and workspace.probed(picture.parent)
            assert [*(folder / saved).glob("*model.safetensors")], printed
            assert said["next"].startswith(f"python -m hf_lqa.plot {saved} --"), printed
        else:
            assert workspace.probed(folder / output_dir[1])
    if "lora" in command:
        assert [*folder.glob("out/*/adapter_model.safetensors")]


@pytest.mark.parametrize("command", HERE)
def test_command(command, folder, monkeypatch, capsys):
    if "lightning_loop.py" in command:
        pytest.importorskip("lightning")
    short = shortened(command)
    docstring_only = all(path.suffix == ".py" for path in COMMANDS[command])
    if not (docstring_only and short.startswith("python examples/")) and "hf_lqa.plot" not in short:
        printed = workspace.run(folder, short)
    elif "hf_lqa.plot" in short:  # in this process, which has imported what takes long
        for run in re.findall(r"out/\w+", short):
            if not (folder / run).is_dir():  # where this test runs alone
                workspace.run(folder, shortened(next(c for c in HERE if f"--output_dir {run}" in c)))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", shlex.split(short)[2:])
        hf_lqa.plot.main()
        printed = capsys.readouterr().out
    else:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setattr(sys, "argv", shlex.split(short)[1:])
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        runpy.run_path(sys.argv[0], run_name="__main__")
        printed = capsys.readouterr().out
    check(short, printed, folder)


def test_what_is_run_elsewhere_is_run_there():
    for command, (file, words) in ELSEWHERE.items():
        assert command in COMMANDS, f"no longer documented: {command}"
        if (ROOT / file).is_file():  # .ci/ is no part of a source distribution
            assert words in (ROOT / file).read_text(encoding="utf-8"), command


def test_arguments_of_benchmarks_exist():
    for command in filter(BENCHMARKS.match, COMMANDS):
        script, *argv = shlex.split(command)[1:]
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in (word for word in argv if word.startswith("--")):
            assert f'"{flag}"' in source, command


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target
    for named in re.findall(r"(?<![\w/.-])((?:examples(?!/pytorch)|configs|tests|hf_lqa)/[\w./-]*\w)", text):
        # Examples may call a file of their own by what follows their folder.
        assert (ROOT / named).exists(), named
    for key in re.findall(r"`(hf_lqa\.\w+)`", text):
        assert hasattr(hf_lqa, key.removeprefix("hf_lqa.")), key


def page(name):
    return (ROOT / "hf_lqa" / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_readme_and_the_pages_keep_their_length():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900
    for name, most in (("method", 140), ("design", 80)):
        assert len(page(name).splitlines()) <= most, name
    # Two pages of print.
    assert len((ROOT / "examples" / "benchmarks" / "NOTES.md").read_text(encoding="utf-8").split()) <= 1250


#: The records that hold the rules' constants, in the order of the method page's table.
CONFIGS = [PriorConfig, DisplacementConfig, MultiplierConfig, RadiusConfig, PaperConfig]


def row_of_constants(config):
    """A record's row in the method page: its fields and their defaults, other records left out."""
    values = {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}
    constants = ", ".join(f"`{name} = {value}`" for name, value in values.items())
    return f"| `{config.__module__.removeprefix('hf_lqa.')}.{config.__name__}` | {constants} |"


def test_the_method_page_has_every_constant_of_the_code():
    expected = "\n".join(map(row_of_constants, CONFIGS))
    found = page("method").partition("\n## Constants\n")[2].partition("|---|---|\n")[2].strip()
    assert found == expected, f"hf_lqa/docs/method.md: the rows at its end have to be\n\n{expected}\n"


#: What else pages say of constants: words, and the value that they are of.
SAID = [
    ("examples/TROUBLESHOOTING.md", "over {:.0f} % of the run", 100 * DisplacementConfig().ramp),
    (
        "examples/TROUBLESHOOTING.md",
        "changes the first batch's loss by at least `tau`, {:.0f} %.",
        100 * RadiusConfig().tau,
    ),
    ("examples/TROUBLESHOOTING.md", "start at {} times the logged rate", PriorConfig().head),
    ("examples/TROUBLESHOOTING.md", "within a factor of {} of that", MultiplierConfig().bound),
    ("examples/TROUBLESHOOTING.md", "it is taken for one of {:,} steps", PriorConfig().unknown),
    ("examples/TROUBLESHOOTING.md", "at the first step and every {} steps", DisplacementConfig().probe_interval),
    ("hf_lqa/docs/costs.md", "each of the first {} steps after the first one", 3 * DisplacementConfig().window - 1),
]


@pytest.mark.parametrize("file, words, value", SAID)
def test_pages_say_of_constants_what_they_are(file, words, value):
    spelled = {2.0: "two", 8.0: "eight"}
    text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert words.format(spelled.get(value, value)) in text


def test_the_readme_has_every_option_with_its_default():
    """Where this fails after a constant was changed: write the new default into the README's table of options."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| key | default | meaning |")[2]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table.partition("</details>")[0], re.MULTILINE)
    documented = {key: value for keys, value in rows for key in re.findall(r"`(\w+)`", keys)}
    assert documented.keys() == OPTIONS["displacement"].keys() | {"base", "probe_micro_batches"}
    rule, radius = build("displacement", {})
    assert documented["tau"] == str(radius.tau) and documented["eta"] == str(rule.config.multipliers.eta)
    paper = build("paper", {})[0].config.probe_interval
    assert documented["probe_interval"] == f"{rule.config.probe_interval} (`lqa_paper`: {paper}), none"


#: The rows of the README's table, by their first words, and what they are in the report: split, kind, steps.
OF_REPORT = {
    "encoder, whole: 7 settings": [("Search", "encoder", "500 and more")],
    "the same: 5 tasks": [("Search", "encoder", "101 to 499"), ("Search", "encoder", "up to 100")],
    "encoder, whole, kept": [("Kept", "encoder", "101 to 499")],
    "encoder, LoRA": [("Search", "encoder, LoRA", "up to 100")],
    "decoder as a classifier": [
        ("Search", kind, "up to 100") for kind in ("decoder classifier", "decoder classifier, LoRA")
    ],
    "language model": [
        ("Search", kind, "up to 100") for kind in ("language model", "language model, LoRA", "masked language model")
    ],
}


def test_the_readmes_table_is_the_reports():
    """Where this fails after runs were added: copy the figures from the first table of the split."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| set-up |")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == len(OF_REPORT)
    report = (ROOT / "examples" / "benchmarks" / "REPORT.md").read_text(encoding="utf-8")
    for row, (name, keys) in zip(rows, OF_REPORT.items(), strict=True):
        assert row.startswith(f"| {name}")
        columns = [[figure.strip("* ") for figure in cell.split(";")] for cell in row.strip("| ").split(" |")[1:]]
        worst = []
        for place, (split, kind, steps) in enumerate(keys):
            summary = report.partition(f"### {split} tasks")[2].partition("\n\nOn the settings")[0]
            line = summary.partition(f"\n| {kind} | {steps} |")[2].partition("\n")[0]
            own, *_, formula = (re.findall(r"[+-]?\d+\.\d+", cell) for cell in line.split("|")[:4])
            assert columns[0][place] == own[0], row
            if len(columns[1]) == len(keys):
                # Language models have no metric.
                metric = columns[4][place : place + 1] if len(columns) > 4 else []
                assert [columns[1][place], *metric] == own[1:], row
                assert [columns[2][place], columns[3][place]] == formula[:2], row
            worst.append(own[1])
        assert columns[1] in (worst, [max(worst)]), row


def test_the_design_page_names_every_module_and_no_other():
    package = ROOT / "hf_lqa"
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    rows = re.findall(r"^\| (`.*?) \|", page("design"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    assert sorted(named) == sorted(modules - {"__init__"})


def test_a_micro_batch_passes_six_files_at_most():
    walk = page("design").partition("\n## From a micro-batch to the applied step\n")[2].partition("\n## ")[0]
    files = {name for line in walk.splitlines() for name in re.findall(r"^\d\. `([\w/]+\.py)`", line)}
    assert 3 < len(files) <= 6 and all((ROOT / "hf_lqa" / name).is_file() for name in files), files
