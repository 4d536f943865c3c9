"""Fine-tune a sequence-to-sequence model to write summaries, without choosing a learning rate.

::

    python examples/summarization.py --optim lqa --model_name_or_path google-t5/t5-small \\
        --source_prefix "summarize: " --train_file train.csv --validation_file validation.csv \\
        --predict_with_generate --output_dir out/summaries

All arguments may be in a file instead: ``python examples/summarization.py arguments.yaml``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_lqa import LQASeq2SeqTrainer
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
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    summary_column: str = field(default="summary", metadata={"help": "Column with its summary."})
    source_prefix: str = field(default="", metadata={"help": "Put before every text; T5 wants 'summarize: '."})
    max_source_length: int = field(default=512, metadata={"help": "Longer texts are cut to this many tokens."})
    max_target_length: int = field(default=64, metadata={"help": "Longer summaries are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many rows for evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, Seq2SeqTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, Seq2SeqTrainingArguments))
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
        kind = "csv" if args.train_file.endswith(".csv") else "json"
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    return data.select_columns([args.text_column, args.summary_column])


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.logging_first_step = True  # for the plot, however few the steps
    if not training_args.predict_with_generate:
        raise ValueError("--predict_with_generate is missing: without it there are no summaries to evaluate")
    set_seed(training_args.seed)
    data = load_data(data_args)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].select(range(limit))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [data_args.source_prefix + text for text in rows[data_args.text_column]]
        encoded = tokenizer(texts, truncation=True, max_length=data_args.max_source_length)
        targets = tokenizer(
            text_target=rows[data_args.summary_column], truncation=True, max_length=data_args.max_target_length
        )
        return {**encoded, "labels": targets["input_ids"]}

    with training_args.main_process_first(desc="tokenizing"):
        encoded = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    # In memory, so that several processes need not share a cache file.
    rouge = evaluate.load(str(METRICS / "rouge_l"), keep_in_memory=True)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        # -100 is padding, which no tokenizer knows.
        texts = [
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (evaluated.predictions, evaluated.label_ids)
        ]
        return rouge.compute(predictions=texts[0], references=texts[1])

    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length
    trainer = LQASeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    results = trainer.evaluate()
    trainer.log_metrics("eval", results)
    trainer.save_metrics("eval", results)
    if trainer.is_world_process_zero():
        print(f"rouge_l: {results['eval_rouge_l']:.4f}")
        print(f"model: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")
    return results


if __name__ == "__main__":
    main()
