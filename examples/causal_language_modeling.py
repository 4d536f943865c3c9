"""Continue the training of a language model on plain text, without choosing a learning rate.

::

    python examples/causal_language_modeling.py --optim lqa --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --train_file train.txt --validation_file validation.txt --output_dir out/lm

All arguments may be in a file instead: ``python examples/causal_language_modeling.py arguments.yaml``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_lqa import LQATrainer
from hf_lqa.plot import plot


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Name of a model on the hub, or a folder."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Text file, instead of a data set."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file."})
    text_column: str = field(default="text", metadata={"help": "The data set's column with the text."})
    block_size: int = field(default=256, metadata={"help": "Tokens per row."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many blocks for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many blocks for evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def load_data(args: DataArguments) -> DatasetDict:
    if args.dataset_name is not None:
        splits = {"train": "train", "validation": "validation"}
        data = load_dataset(args.dataset_name, args.dataset_config_name, split=splits)
    elif args.train_file is None or args.validation_file is None:
        raise ValueError("--train_file or --validation_file is missing: give both, or --dataset_name")
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        data = load_dataset("text", data_files=files, keep_linebreaks=True)
    return data.select_columns([args.text_column])


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.logging_first_step = True  # for the plot, however few the steps
    set_seed(training_args.seed)
    data = load_data(data_args)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    def blocks(rows: dict[str, list]) -> dict[str, list]:
        """All texts one after the other, cut into blocks; what is left over is dropped."""
        ids = [i for text in tokenizer(rows[data_args.text_column])["input_ids"] for i in text]
        size = data_args.block_size
        cut = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    with training_args.main_process_first(desc="tokenizing"):
        data = data.map(blocks, batched=True, batch_size=10_000, remove_columns=data["train"].column_names)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if not len(data[split]):
            raise ValueError(f"--block_size {data_args.block_size}: the {split} data have fewer tokens than that")
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].select(range(limit))

    trainer = LQATrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,  # all rows have the same length
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    results = trainer.evaluate()
    results["eval_perplexity"] = math.exp(min(results["eval_loss"], 100))
    trainer.log_metrics("eval", results)
    trainer.save_metrics("eval", results)
    if trainer.is_world_process_zero():
        print(f"perplexity: {results['eval_perplexity']:.2f}")
        print(f"model: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")
    return results


if __name__ == "__main__":
    main()
