"""Train a model to classify images, without choosing a learning rate.

A folder has one folder per class in ``train/`` and in ``validation/``. Fine-tune::

    python examples/image_classification.py --optim lqa --model_name_or_path google/vit-base-patch16-224-in21k \\
        --image_folder images --remove_unused_columns False --output_dir out/images

or train a small ViT from nothing::

    python examples/image_classification.py --optim lqa --config_overrides image_size=32,patch_size=4 \\
        --image_folder images --remove_unused_columns False --output_dir out/images

All arguments may be in a file instead: ``python examples/image_classification.py arguments.yaml``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from hf_lqa import LQATrainer
from hf_lqa.plot import plot

METRICS = Path(__file__).parent / "metrics"


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Name of a model on the hub, or a folder; a new ViT if not given."}
    )
    config_overrides: str = field(default="", metadata={"help": "Of the new ViT: image_size=32,patch_size=4"})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Name of a data set on the hub."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder with train/CLASS/IMAGE and validation/CLASS/IMAGE, instead."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the image."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many images for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many images for evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


def load_data(args: DataArguments) -> DatasetDict:
    splits = {"train": "train", "validation": "validation"}
    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, split=splits)
    elif args.image_folder is None:
        raise ValueError("--image_folder is missing: give it, or --dataset_name")
    else:
        data = load_dataset("imagefolder", data_dir=args.image_folder, split=splits)
    return data.select_columns([args.image_column, args.label_column])


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.logging_first_step = True  # for the plot, however few the steps
    training_args.remove_unused_columns = False  # images become pixels when a batch is made
    set_seed(training_args.seed)
    data = load_data(data_args)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))
    names = data["train"].features[data_args.label_column].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    if model_args.model_name_or_path is not None:
        processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True, **labels
        )
    else:
        config = ViTConfig(num_labels=len(names), **labels)
        config.update_from_string(model_args.config_overrides)
        processor = ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})
        model = AutoModelForImageClassification.from_config(config)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row[data_args.image_column].convert("RGB") for row in rows]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([row[data_args.label_column] for row in rows]),
        }

    # In memory, so that several processes need not share a cache file.
    accuracy = evaluate.load(str(METRICS / "accuracy"), keep_in_memory=True)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        return accuracy.compute(predictions=np.argmax(evaluated.predictions, axis=-1), references=evaluated.label_ids)

    trainer = LQATrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    results = trainer.evaluate()
    trainer.log_metrics("eval", results)
    trainer.save_metrics("eval", results)
    if trainer.is_world_process_zero():
        print(f"accuracy: {results['eval_accuracy']:.4f}")
        print(f"model: {training_args.output_dir}")
        print(f"plot: {plot(training_args.output_dir)}")
        print(f"next: python -m hf_lqa.plot {training_args.output_dir} --compare DIR draws another run beside it")
    return results


if __name__ == "__main__":
    main()
