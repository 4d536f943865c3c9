"""Every file in configs/ is read by what it is written for."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ACCELERATE = sorted(path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_arguments_of_examples(name, monkeypatch):
    for module in ("datasets", "evaluate", *{"lora": ["peft"], "trl_sft": ["trl"]}.get(name, [])):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    # A configuration for a GPU is parsed where there may be none.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    path = str(ROOT / "configs" / f"{name}.yaml")
    example = importlib.import_module({"text_regression": "text_classification"}.get(name, name))
    if name == "trl_sft":
        parsed = example.TrlParser((example.Arguments, example.SFTConfig)).parse_args_and_config(["--config", path])
    else:
        parsed = example.parse([path])
    assert parsed[-1].optim == "lqa"
    for key, value in yaml.safe_load(Path(path).read_text()).items():
        assert [vars(part)[key] for part in parsed if key in vars(part)] == [value], key


def test_there_is_one_for_each_example_and_way_to_run():
    assert {"text_classification", "causal_language_modeling", "summarization", "image_classification"} < {*EXAMPLES}
    assert {*ACCELERATE} == {
        "one_cpu",
        "two_cpu_processes",
        "one_gpu_bf16",
        "one_gpu_fp16",
        "multi_gpu_ddp",
        "fsdp2",
    }


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_takes_it(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(ROOT / "configs" / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    assert args.num_processes == config.num_processes == (1 if name.startswith("one_") else 2)
    assert args.mixed_precision == {"one_gpu_fp16": "fp16"}.get(name, "no" if "cpu" in name else "bf16")
    assert args.use_cpu == ("cpu" in name)
    assert args.multi_gpu == (name in ("two_cpu_processes", "multi_gpu_ddp"))
    assert args.use_fsdp == (name == "fsdp2")
    if name == "fsdp2":
        assert args.fsdp_version == 2


@pytest.mark.parametrize("name, flags", [("one_cpu", []), ("two_cpu_processes", ["--cpu"])])
def test_on_the_cpu_it_runs(name, flags):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", f"configs/accelerate/{name}.yaml", "examples/accelerate_loop.py", "--epochs", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Every process for itself would print its own.
    assert done.stdout.count("accuracy:") == 1
