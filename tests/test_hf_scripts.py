"""The commands of examples/HF_SCRIPTS.md: arguments and files that exist."""

import re
import shlex
from dataclasses import field, make_dataclass
from pathlib import Path

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples" / "HF_SCRIPTS.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]

#: The scripts' own arguments, as far as the page uses them, by their names in Transformers 5.
OWN = {
    "run_glue.py": "model_name_or_path task_name train_file validation_file max_seq_length",
    "run_clm.py": "model_name_or_path dataset_name dataset_config_name train_file validation_file",
    "run_qa.py": "model_name_or_path dataset_name max_seq_length doc_stride",
    "run_summarization.py": "model_name_or_path dataset_name source_prefix",
    "run_image_classification.py": "dataset_name train_dir validation_dir label_column_name",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:7]))
def test_command(command):
    launcher, _, rest = command.partition(" -m hf_lqa ")
    script, *argv = shlex.split(rest)
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
