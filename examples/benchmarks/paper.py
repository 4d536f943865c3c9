"""The paper's kinds of task (arXiv 2004.03260): linear and logistic regression, an MLP on MNIST, LeNet on CIFAR-10.

Their models return their loss, as a Trainer expects. The two sets of images are read from a folder
(``mnist_10k/mnist_10k.npz``, ``cifar10_6k/cifar10_6k_jpg.zip``) or, in full, by their names on the hub.
"""

from __future__ import annotations

import argparse
import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tasks
import torch
from loaders import Loaded, accuracy, minus_squared_error, trivial_metric
from torch import Tensor, nn

#: Training inputs and labels, validation inputs and labels.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class Arrays(torch.utils.data.Dataset):
    """Inputs and labels as a data set. Unlike from a list of rows, a batch is cut out at once."""

    def __init__(self, inputs: Tensor, labels: Tensor):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.__getitems__([i])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"inputs": self.inputs[indices], "labels": self.labels[indices]}


class WithLoss(nn.Module):
    """A module as a Trainer wants it. Unlike the one that it wraps it returns the loss, too."""

    def __init__(self, module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.module(inputs)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(predictions.squeeze(-1), labels)


def synthetic(classes: bool, rows: int = 6000, columns: int = 50) -> tuple[Tensor, Tensor]:
    """Gaussian columns whose scales run from 1 to 0.1; noise of standard deviation 0.5 (linear), or drawn classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -1, columns)
    weights = torch.randn(columns, generator=generator)
    scores = inputs @ weights
    if classes:
        return inputs, (torch.rand(rows, generator=generator) < torch.sigmoid(2 * scores)).long()
    return inputs, scores + 0.5 * torch.randn(rows, generator=generator)


def mnist(data_dir: Path | None) -> Parts:
    if data_dir is None:
        train, test = _hub("ylecun/mnist", "image")
    else:
        with np.load(data_dir / "mnist_10k" / "mnist_10k.npz") as file:
            train, test = ((file[f"x_{split}"], file[f"y_{split}"]) for split in ("train", "test"))
    parts = []
    for images, labels in (train, test):
        parts += [torch.tensor(images.reshape(len(images), -1) / 255, dtype=torch.float), torch.tensor(labels).long()]
    return tuple(parts)  # type: ignore[return-value]


def cifar(data_dir: Path | None) -> Parts:
    if data_dir is None:
        splits = _hub("uoft-cs/cifar10", "img")
    else:
        from PIL import Image

        found: dict[str, tuple[list, list]] = {"train": ([], []), "test": ([], [])}
        with zipfile.ZipFile(data_dir / "cifar10_6k" / "cifar10_6k_jpg.zip") as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            classes = sorted({Path(name).parent.name for name in names})
            for name in names:
                images, labels = found[Path(name).parts[-3]]
                images.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
                labels.append(classes.index(Path(name).parent.name))
        splits = [(np.stack(images), np.array(labels)) for images, labels in found.values()]
    parts = []
    for images, labels in splits:
        pixels = torch.tensor(images, dtype=torch.float).permute(0, 3, 1, 2) / 127.5 - 1
        parts += [pixels, torch.tensor(labels).long()]
    return tuple(parts)  # type: ignore[return-value]


def _hub(name: str, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
    from datasets import load_dataset

    data = load_dataset(name)
    return [
        (np.stack([np.asarray(image) for image in data[split][column]]), np.array(data[split]["label"]))
        for split in ("train", "test")
    ]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def loaded(parts: Parts, module: Callable[[], nn.Module], loss: Callable[[Tensor, Tensor], Tensor]) -> Loaded:
    """The data with models that are fresh modules and this loss."""
    regression = loss is squared_error
    metric = minus_squared_error if regression else accuracy
    trivial = trivial_metric(parts[1].numpy(), parts[3].numpy(), regression)
    train, validation = Arrays(*parts[:2]), Arrays(*parts[2:])
    return Loaded(train, validation, lambda: WithLoss(module(), loss), lambda batch: batch, metric, trivial)


def load(task: tasks.Task, options: argparse.Namespace) -> Loaded:
    if task.name == "lenet_cifar":
        return loaded(cifar(options.data_dir), lenet, nn.functional.cross_entropy)
    if task.name == "mlp_mnist":
        return loaded(mnist(options.data_dir), mlp, nn.functional.cross_entropy)
    classes = task.name == "logistic"
    inputs, labels = synthetic(classes)
    split = len(labels) * 5 // 6
    parts = inputs[:split], labels[:split], inputs[split:], labels[split:]
    module = functools.partial(nn.Linear, inputs.shape[1], 2 if classes else 1)
    return loaded(parts, module, nn.functional.cross_entropy if classes else squared_error)
