import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import yaml
from common import arguments, rows, tiny_bert, trained
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lqa import registration
from hf_lqa.options import NAMES, parse_options


@pytest.mark.parametrize("name", NAMES)
def test_the_name_works_wherever_arguments_are_made(name, tmp_path):
    assert arguments(tmp_path, optim=name).optim == name
    parser = HfArgumentParser(TrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
    given = {"output_dir": str(tmp_path), "optim": name}
    (tmp_path / "args.json").write_text(json.dumps(given))
    (tmp_path / "args.yaml").write_text(yaml.dump(given))
    for args in (
        parsed,
        parser.parse_dict(given)[0],
        parser.parse_json_file(tmp_path / "args.json")[0],
        parser.parse_yaml_file(tmp_path / "args.yaml")[0],
        copy.deepcopy(parsed),
        dataclasses.replace(parsed),
        TrainingArguments(**{k: v for k, v in parsed.to_dict().items() if k in given}),
        pickle.loads(pickle.dumps(parsed)),
    ):
        assert args.optim == name
        assert parse_options(args).name == name
    assert parsed.to_dict()["optim"] == name
    assert json.loads(parsed.to_json_string())["optim"] == name
    assert OptimizerNames(name).value == name


def test_registering_again_changes_nothing():
    before = list(OptimizerNames)
    registration.register()
    assert list(OptimizerNames) == before
    assert [n.value for n in before].count("lqa") == 1


def test_training_args_load_where_hf_lqa_is_not_imported(tmp_path):
    trained(tmp_path, max_steps=1).save_model(tmp_path)
    code = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False);"
        "assert 'hf_lqa' not in sys.modules; assert args.optim == 'lqa'; print(type(args.optim).__name__)"
    )
    path = str(tmp_path / "training_args.bin")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "str"


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_trainer_refuses(name, tmp_path):
    trainer = Trainer(tiny_bert(), arguments(tmp_path, optim=name), train_dataset=rows(16))
    with pytest.raises(ValueError, match=rf"(?s)optim='{name}'.*LQATrainer.*python -m hf_lqa"):
        trainer.train()


@pytest.mark.parametrize(
    "optim_args, message",
    [
        ("probe_intervall=3", r"probe_intervall='3' is not an option.*probe_interval"),
        ("probe_interval=0", r"probe_interval=0"),
        ("probe_interval=2.5", r"probe_interval='2.5': must be an integer"),
        ("tau=1.5", r"tau=1.5: must be in \(0, 1\)"),
        ("tau=much", r"tau='much': must be a number"),
        ("tau", r"'tau' is not of the form key=value"),
        ("probe_micro_batches=0", r"probe_micro_batches='0': must be an integer >= 1"),
        ("base=lqa", r"base='lqa'.*cannot be LQA itself"),
        ("base=adamm", r"base='adamm': Transformers knows no optimizer"),
        ("base=lomo", r"base='lomo': it steps inside backward"),
        ("base=galore_adamw_layerwise", r"base='galore_adamw_layerwise': it steps layer by layer"),
        ("base=schedule_free_adamw", r"base='schedule_free_adamw'.*direction"),
        ("base=adamw_torch,momentum=0.9", r"momentum='0.9' is not an option of optim='lqa' with base='adamw_torch'"),
    ],
)
def test_options_that_cannot_work_are_named(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_options(arguments(tmp_path, optim_args=optim_args))


@pytest.mark.parametrize("base", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_bases(base, tmp_path):
    trainer = trained(tmp_path, optim_args=f"base={base}", max_steps=8)
    assert trainer.lqa.counts["probe_forwards"] > 0
    assert trainer.lqa.step_size > 0
