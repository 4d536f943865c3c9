"""Small transformers that are trained from scratch: a GPT-2 on characters, a vision transformer, a T5 that sorts.

The digits that the T5 puts in order are drawn from a seed; the other two read tinyshakespeare and CIFAR-10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import paper
import tasks
import torch
from loaders import Loaded, accuracy, shakespeare, spread, trivial_metric
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

#: Rows of digits to train on; those of validation are `max_eval_samples`, or as many as here.
ROWS, VALIDATION_ROWS = 9600, 400
#: Share of the digits in order that are drawn anew: without it losses fall to nothing, and a ratio of two says little.
NOISE = 0.1
#: Of the T5: padding, the end, and the ten digits.
PAD, END, DIGIT = 0, 1, 2


def character_rows(path: Path, alphabet: str, size: int) -> list[dict[str, torch.Tensor]]:
    text = path.read_text(encoding="utf-8")
    ids = torch.tensor([alphabet.index(c) for c in text[: len(text) // size * size]]).view(-1, size)
    return [{"input_ids": block, "labels": block} for block in ids]


def characters(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    files, size = shakespeare(options), options.max_length
    alphabet = "".join(sorted(set("".join(file.read_text(encoding="utf-8") for file in files))))
    train, validation = (character_rows(file, alphabet, size) for file in files)

    def model() -> nn.Module:
        shape = {"n_positions": size, "n_embd": 128, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=len(alphabet), use_cache=False, attn_implementation="eager", **shape)
        return GPT2LMHeadModel(config)

    return Loaded(train, spread(validation, options.max_eval_samples), model)


class Vit(nn.Module):
    """A small vision transformer for CIFAR-10. Unlike that of Transformers it calls its input ``inputs``."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"image_size": 32, "patch_size": 4, "hidden_size": 96, "intermediate_size": 192}
        depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10}
        self.vit = ViTForImageClassification(ViTConfig(**shape, **depth, attn_implementation="eager"))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.vit(pixel_values=inputs).logits


def images(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    return paper.loaded(paper.cifar(options.data_dir), Vit, nn.functional.cross_entropy)


def digit_rows(rows: int, length: int, seed: int, noise: float = NOISE) -> list[dict[str, torch.Tensor]]:
    """Rows of `length` digits, and the same digits in order, but for a share that is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    drawn, wrong = (torch.randint(10, (rows, length), generator=generator) + DIGIT for _ in range(2))
    ordered = torch.where(torch.rand(rows, length, generator=generator) < noise, wrong, drawn.sort(1).values)
    ends = torch.full((rows, 1), END)
    inputs, labels = torch.cat([drawn, ends], 1), torch.cat([ordered, ends], 1)
    return [{"input_ids": row, "labels": target} for row, target in zip(inputs, labels, strict=True)]


def digits(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    train = digit_rows(ROWS, options.max_length, 0)
    validation = digit_rows(options.max_eval_samples or VALIDATION_ROWS, options.max_length, 1)

    def model() -> nn.Module:
        shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        tokens = {"vocab_size": DIGIT + 10, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
        return T5ForConditionalGeneration(T5Config(**shape, **tokens, use_cache=False))

    labels = [np.stack([row["labels"].numpy() for row in split]) for split in (train, validation)]
    return Loaded(train, validation, model, metric=accuracy, trivial=trivial_metric(*labels, False))
