"""Fine-tune a model to classify texts, or to give them a number, without choosing a learning rate.

From the hub::

    python examples/text_classification.py --optim lqa --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --output_dir out/sst2

From your own files::

    python examples/text_classification.py --optim lqa --model_name_or_path path/to/model \\
        --train_file train.csv --validation_file validation.csv --output_dir out/mine

All arguments may be in a file instead: ``python examples/text_classification.py arguments.yaml``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_lqa import LQATrainer
from hf_lqa.plot import plot

METRICS = Path(__file__).parent / "metrics"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Name of a model on the hub, or a folder."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "CSV or JSON file, instead of a data set."})
    validation_file: str | None = field(default=None, metadata={"help": "File of the same kind."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column with a second text, if any."})
    label_column: str = field(default="label", metadata={"help": "Column with the label: any string or number."})
    regression: bool = field(default=False, metadata={"help": "Take labels for numbers to predict, not for classes."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many rows for evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def load_data(args: DataArguments) -> DatasetDict:
    """The splits "train" and "validation", with the columns that are used."""
    if args.dataset_name is not None:
        splits = {"train": args.train_split, "validation": args.validation_split}
        data = load_dataset(args.dataset_name, args.dataset_config_name, split=splits)
    elif args.train_file is None or args.validation_file is None:
        raise ValueError("--train_file or --validation_file is missing: give both, or --dataset_name")
    else:
        kind = "csv" if args.train_file.endswith(".csv") else "json"
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    columns = [args.text_column, *filter(None, [args.text_pair_column]), args.label_column]
    data = data.select_columns(columns)
    for split, rows in data.items():
        for column in columns:
            if empty := rows.data.column(column).null_count:
                raise ValueError(f"column {column}: it is empty in {empty} rows of the {split} data; remove them")
    return data


def classes_of(data: DatasetDict, args: DataArguments) -> list[str]:
    """The names of the classes, in the order of their numbers; one nameless class for regression."""
    if args.regression:
        return [""]
    feature, values = data["train"].features[args.label_column], data["train"].unique(args.label_column)
    if isinstance(values[0], float):
        raise ValueError(
            f"--label_column {args.label_column} holds numbers such as {values[0]!r}: give --regression to predict them"
        )
    names = getattr(feature, "names", None) or [str(value) for value in sorted(values)]
    unknown = {str(value) for value in data["validation"].unique(args.label_column)} - {str(v) for v in values}
    if unknown:
        raise ValueError(
            f"--label_column {args.label_column}: the validation data have labels that the training data lack:"
            f" {', '.join(sorted(unknown))}"
        )
    return names


def metrics(regression: bool):
    """The `compute_metrics` for the Trainer, through `evaluate`; a hub name instead of a path works as well."""
    names = ["mse", "pearsonr"] if regression else ["accuracy"]
    # In memory, so that several processes need not share a cache file.
    modules = [evaluate.load(str(METRICS / name), keep_in_memory=True) for name in names]

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        scores = evaluated.predictions
        predictions = scores.squeeze(-1) if regression else np.argmax(scores, axis=-1)
        results = [m.compute(predictions=predictions, references=evaluated.label_ids) for m in modules]
        return {name: value for result in results for name, value in result.items()}

    return compute


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.logging_first_step = True  # for the plot, however few the steps
    set_seed(training_args.seed)

    data = load_data(data_args)
    classes = classes_of(data, data_args)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        problem_type="regression" if data_args.regression else "single_label_classification",
        ignore_mismatched_sizes=True,  # a classifier of other classes may be fine-tuned, too
    )
    # A column of the type ClassLabel holds the classes' numbers already.
    numbered = hasattr(data["train"].features[data_args.label_column], "names")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[data_args.text_column]]
        if data_args.text_pair_column is not None:
            texts.append(rows[data_args.text_pair_column])
        encoded = tokenizer(*texts, truncation=True, max_length=data_args.max_length)
        labels = rows[data_args.label_column]
        if data_args.regression:
            encoded["labels"] = [float(label) for label in labels]
        else:
            encoded["labels"] = labels if numbered else [classes.index(str(label)) for label in labels]
        return encoded

    with training_args.main_process_first(desc="tokenizing"):
        encoded: dict[str, Dataset] = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    # The Trainer pads each batch to its longest text, because it is given the tokenizer.
    trainer = LQATrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        compute_metrics=metrics(data_args.regression),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    results = trainer.evaluate()
    trainer.log_metrics("eval", results)
    trainer.save_metrics("eval", results)
    if trainer.is_world_process_zero():
        for name in ("mse", "pearsonr") if data_args.regression else ("accuracy",):
            print(f"{name}: {results[f'eval_{name}']:.4f}")
        print(f"model: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")
    return results


if __name__ == "__main__":
    main()
