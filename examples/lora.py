"""Fine-tune a language model through a low-rank adapter (PEFT), without choosing a learning rate.

Only the adapter's weights are probed: a probe copies them, not the model's.

::

    python examples/lora.py --optim lqa --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file train.txt \\
        --output_dir out/lora
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_lqa import LQATrainer
from hf_lqa.plot import plot


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Name of a model on the hub, or a folder."})
    train_file: str = field(metadata={"help": "Text file, one text per line."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapter."})


def parse(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def main(argv: list[str] | None = None) -> None:
    args, training_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.logging_first_step = True  # for the plot, however few the steps
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    model = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.print_trainable_parameters()

    data = load_dataset("text", data_files=args.train_file, split="train").filter(lambda row: row["text"].strip())
    with training_args.main_process_first(desc="tokenizing"):
        data = data.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length),
            batched=True,
            remove_columns=["text"],
        )
    trainer = LQATrainer(
        model=model,
        args=training_args,
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the adapter
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"adapter: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")


if __name__ == "__main__":
    main()
