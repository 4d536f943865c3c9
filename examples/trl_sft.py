"""Supervised fine-tuning with TRL, without choosing a learning rate: the mixin goes before TRL's trainer.

::

    python examples/trl_sft.py --optim lqa --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file train.jsonl \\
        --output_dir out/sft

Each line of the file is ``{"text": ...}``, ``{"prompt": ..., "completion": ...}`` or ``{"messages": [...]}``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer, TrlParser

from hf_lqa import LQATrainerMixin
from hf_lqa.plot import plot


class LQASFTTrainer(LQATrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` without a learning rate to choose: ``optim`` may be ``lqa``, ``lqa_sgd`` or ``lqa_paper``."""


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Name of a model on the hub, or a folder."})
    train_file: str = field(metadata={"help": "JSON lines."})


def main(argv: list[str] | None = None) -> None:
    # TRL's own parser: like HfArgumentParser, and takes --config arguments.yaml.
    args, training_args = TrlParser((Arguments, SFTConfig)).parse_args_and_config(
        sys.argv[1:] if argv is None else argv
    )
    training_args.logging_first_step = True  # for the plot, however few the steps
    trainer = LQASFTTrainer(
        model=args.model_name_or_path,
        args=training_args,
        train_dataset=load_dataset("json", data_files=args.train_file, split="train"),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"model: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")


if __name__ == "__main__":
    main()
