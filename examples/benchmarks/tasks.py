"""The registry of tasks: what each is, which part of the yardstick it belongs to, its default setting, what loads it.

Needs neither torch nor the data, so that the report and the plan of the stages can read it. A **split** is "search" for
tasks that a rule may be chosen on, "kept" for those that are run once it is chosen; both are reported apart. A **kind**
is the set-up: what is trained, and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Set-ups in the order of the report.
ENCODER, ENCODER_LORA, HEAD = "encoder", "encoder, LoRA", "encoder, head alone"
DECODER, DECODER_LORA = "decoder classifier", "decoder classifier, LoRA"
LANGUAGE, LANGUAGE_LORA, MASKED = "language model", "language model, LoRA", "masked language model"
SCRATCH, SEQUENCE, PAPER = "from scratch", "sequence to sequence", "paper"
KINDS = (ENCODER, ENCODER_LORA, HEAD, DECODER, DECODER_LORA, LANGUAGE, LANGUAGE_LORA, MASKED, SCRATCH, SEQUENCE, PAPER)
SPLITS = ("search", "kept")

SETTING = ("max_steps", "batch_size", "max_length", "max_eval_samples")


def _setting(*values: int | None) -> Mapping[str, Any]:
    return dict(zip(SETTING, values, strict=True))


#: What one core can do with texts; and the quickstart's setting, for tasks that are not registered.
SHORT, QUICKSTART = _setting(100, 8, 16, 400), _setting(220, 16, 64, None)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: on the command line and in the results.
        kind: one of `KINDS`.
        split: one of `SPLITS`.
        loader: function of a module in this folder that loads it, as ``module:function``.
        setting: its default: steps, rows of a batch, tokens of a row, validation rows.
        metric: what the field reports of it beside the loss; `None` where that is the loss itself.
        data: the data set, where it is not called as the task is.
        model: that is fine-tuned, "minilm" or "smollm2".
        part: that is trained of a pretrained model: "all", "lora" or "head".
        alpha: of LoRA, whose rank is 8; `lora_alpha` of PEFT. The more, the lower the rate that it wants.
    """

    name: str
    kind: str
    split: str
    loader: str
    setting: Mapping[str, Any]
    metric: str | None = None
    data: str = ""
    model: str = ""
    part: str = "all"
    alpha: int = 16


def _text(
    name: str,
    kind: str = ENCODER,
    split: str = "search",
    tokens: int = 16,
    metric: str = "accuracy",
    alpha: int = Task.alpha,
) -> Task:
    """A classifier or regression of texts, of which its name says the data and its kind the model."""
    setting = {**SHORT, "max_length": tokens}
    # A data set whose name has two parts is used as it is.
    data = name if kind == ENCODER else name.partition("_")[0]
    part = "lora" if kind in (ENCODER_LORA, DECODER_LORA) else "head" if kind == HEAD else "all"
    model = "smollm2" if kind in (DECODER, DECODER_LORA) else "minilm"
    return Task(name, kind, split, "texts:text", setting, metric, data, model, part, alpha)


_SHAKESPEARE: Any = ("search", "loaders:language", _setting(100, 2, 64, 16))
_DENSE = _setting(200, 128, None, None)
_TASKS = [
    _text("trec6"),
    _text("banking77"),
    _text("sms_spam"),
    _text("vader_tweets", metric="pearson"),
    # Reuters from PyPI, as in the quickstart.
    _text("r8"),
    # Posts to 20 newsgroups, tweets of two candidates, lines of six characters of a comedy. The last is next to
    # impossible: most of what there is to learn is who says most.
    _text("newsgroups", tokens=64),
    _text("election"),
    _text("friends"),
    _text("clinc150", split="kept"),
    # The similarity of two sentences.
    _text("stsb", split="kept", tokens=32, metric="pearson"),
    _text("trec6_lora", ENCODER_LORA),
    _text("stsb_lora", ENCODER_LORA, "search", 32, "pearson"),
    _text("banking77_lora", ENCODER_LORA),
    _text("clinc150_lora", ENCODER_LORA),
    _text("r8_lora", ENCODER_LORA),
    _text("trec6_lora_alpha2", ENCODER_LORA, alpha=2),
    _text("r8_lora_alpha2", ENCODER_LORA, alpha=2),
    _text("trec6_lora_alpha64", ENCODER_LORA, alpha=64),
    _text("r8_lora_alpha64", ENCODER_LORA, alpha=64),
    _text("election_lora", ENCODER_LORA, "kept"),
    _text("trec6_head", HEAD),
    _text("trec6_smollm2", DECODER),
    _text("r8_smollm2", DECODER),
    _text("election_smollm2", DECODER),
    _text("clinc150_smollm2", DECODER, "kept"),
    _text("trec6_smollm2_lora", DECODER_LORA),
    _text("r8_smollm2_lora", DECODER_LORA),
    _text("stsb_smollm2_lora", DECODER_LORA, "kept", 32, "pearson"),
    # SmolLM2-135M from PyPI on tinyshakespeare; MiniLM on it as a masked language model, part of whose head is fresh.
    Task("smollm2", LANGUAGE, *_SHAKESPEARE, model="smollm2"),
    Task("smollm2_lora", LANGUAGE_LORA, *_SHAKESPEARE, model="smollm2", part="lora"),
    Task("minilm_mlm", MASKED, "search", "loaders:masked", {**SHORT, "max_length": 32}, model="minilm"),
    # Small transformers: characters of tinyshakespeare, images of CIFAR-10.
    Task("gpt2_scratch", SCRATCH, "search", "scratch:characters", _setting(300, 32, 64, 256)),
    Task("vit_scratch", SCRATCH, "kept", "scratch:images", _setting(300, 64, None, None), "accuracy"),
    # Digits of a row in order, by a small T5; `max_length` is their number.
    Task("t5_scratch", SEQUENCE, "kept", "scratch:digits", _setting(300, 32, 16, 400), "accuracy"),
    Task("linear", PAPER, "search", "paper:load", _DENSE),
    Task("logistic", PAPER, "search", "paper:load", _DENSE, "accuracy"),
    Task("mlp_mnist", PAPER, "search", "paper:load", _DENSE, "accuracy"),
    Task("lenet_cifar", PAPER, "search", "paper:load", _DENSE, "accuracy"),
]
TASKS = {task.name: task for task in _TASKS}
#: A registered order for tables; what is not registered comes last.
ORDER = {name: place for place, name in enumerate(TASKS)}


def of(name: str) -> Task:
    """The task of that name; if it is not registered, the fine-tuning of an encoder on data that the user names."""
    return TASKS.get(name) or Task(name, ENCODER, "", "texts:text", QUICKSTART, "accuracy", name, "minilm")


def named(kind: str, split: str | None = None) -> list[str]:
    """Names of the tasks of one kind, and of one split where that is given."""
    return [task.name for task in _TASKS if task.kind == kind and split in (None, task.split)]
