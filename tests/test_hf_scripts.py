"""The commands of examples/HF_SCRIPTS.md, run to the letter, shortened and on a CPU.

With the environment variable HF_SCRIPTS, a folder in which the official scripts lie (a checkout of Transformers, or the
files alone), they are what runs; without, stand-ins with the same arguments and the same kind of Trainer.
"""

import os
import re
import shlex
import shutil
from dataclasses import field, make_dataclass
from pathlib import Path

import pytest
import workspace
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples" / "HF_SCRIPTS.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if " -m hf_lqa run_" in line
]

#: The scripts' own arguments, as far as the page uses them, by their names in Transformers 5.
OWN = {
    "run_glue.py": "model_name_or_path task_name train_file validation_file max_seq_length",
    "run_clm.py": "model_name_or_path dataset_name dataset_config_name train_file validation_file",
    "run_qa.py": "model_name_or_path dataset_name max_seq_length doc_stride",
    "run_summarization.py": "model_name_or_path dataset_name source_prefix",
    "run_image_classification.py": "model_name_or_path dataset_name train_dir validation_dir label_column_name",
}

#: What all of them do, in their order. ``Trainer`` is replaced by each script's own.
STAND_IN = """
from dataclasses import field, make_dataclass

import torch
from transformers import (
    BertConfig, BertForSequenceClassification, HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments,
    T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments,
)
{imports}

Own = make_dataclass("Own", [(name, str, field(default=None)) for name in "{own}".split()])


def main():
    own, training_args = HfArgumentParser((Own, {arguments})).parse_args_into_dataclasses()
    size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(BertConfig(**size))
    rows = [dict(input_ids=torch.randint(4, 50, (6,)), labels=torch.tensor(i % 2)) for i in range(64)]
    if {arguments} is Seq2SeqTrainingArguments:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )
        rows = [dict(input_ids=row["input_ids"], labels=row["input_ids"]) for row in rows]
    trainer = {trainer}(model=model, args=training_args, train_dataset=rows, eval_dataset=rows[:16])
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-classification")


if __name__ == "__main__":
    main()
"""
TRAINER_QA = """
from transformers import Trainer


class QuestionAnsweringTrainer(Trainer):
    def __init__(self, *args, eval_examples=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
"""


def parts(command):
    launcher, _, rest = command.partition(" -m hf_lqa ")
    script, *argv = shlex.split(rest)
    return launcher, script, argv


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:7]))
def test_arguments_exist(command):
    launcher, script, argv = parts(command)
    if launcher != "python":
        assert launcher.startswith("accelerate launch --config_file ")
        assert (ROOT / launcher.split()[-1]).is_file()
    own = make_dataclass("Own", [(name, str, field(default="")) for name in OWN[script].split()])
    arguments = Seq2SeqTrainingArguments if script == "run_summarization.py" else TrainingArguments
    # No abbreviations: what is not known is an error.
    parser = HfArgumentParser((own, arguments), allow_abbrev=False)
    _, training_args = parser.parse_args_into_dataclasses(argv)
    assert training_args.optim == "lqa" and training_args.output_dir.startswith("out/")
    assert "learning_rate" not in command


def test_every_script_is_shown_both_ways():
    for script in OWN:
        launchers = {command.split()[0] for command in COMMANDS if f" {script} " in command}
        assert launchers == {"python", "accelerate"}, script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace with the scripts in it, and whether they are the official ones."""
    for module in ("datasets", "evaluate", "PIL", "yaml"):
        pytest.importorskip(module)
    folder = workspace.build(tmp_path_factory.mktemp("hf_scripts"))
    for file in ("train.csv", "validation.csv"):
        # run_glue.py wants numbers.
        text = (folder / file).read_text()
        for i, name in enumerate(workspace.CLASSES):
            text = re.sub(f"^{name},", f"{i},", text, flags=re.MULTILINE)
        (folder / file).write_text(text)
    official = os.environ.get("HF_SCRIPTS")
    if official:
        for name in (*OWN, "trainer_qa.py", "utils_qa.py"):
            (found,) = {*Path(official).rglob(name)} - {*Path(official).rglob(f"legacy/**/{name}")}
            shutil.copy(found, folder / name)
        return folder, True
    (folder / "trainer_qa.py").write_text(TRAINER_QA)
    for name, own in OWN.items():
        words = {"own": own, "arguments": "TrainingArguments", "trainer": "Trainer", "imports": ""}
        if name == "run_qa.py":
            words |= {
                "trainer": "QuestionAnsweringTrainer",
                "imports": "from trainer_qa import QuestionAnsweringTrainer",
            }
        if name == "run_summarization.py":
            words |= {"trainer": "Seq2SeqTrainer", "arguments": "Seq2SeqTrainingArguments"}
        (folder / name).write_text(STAND_IN.format(**words))
    return folder, False


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:7]))
def test_command(command, place):
    """Alone with ``python``, in two processes with ``accelerate``, whose configuration is replaced by one for CPUs."""
    folder, official = place
    _, script, argv = parts(command)
    if official and script == "run_image_classification.py":
        pytest.importorskip("torchvision")
    if official and script == "run_summarization.py":
        pytest.importorskip("nltk")
    output_dir = folder / argv[argv.index("--output_dir") + 1]
    shutil.rmtree(output_dir, ignore_errors=True)
    command = re.sub(r"configs/accelerate/\w+", "configs/accelerate/two_cpu_processes", command)
    printed = workspace.run(folder, f"{command} {workspace.SHORT}")
    assert workspace.probed(output_dir)
    assert workspace.state(output_dir)["global_step"] == 2
    # Of two processes one speaks.
    assert printed.count("LQA: no --learning_rate") == printed.count("LQA: learning rates") == 1
    assert (output_dir / "eval_results.json").is_file()
    assert "optimizer: Use lqa around" in (output_dir / "README.md").read_text()
