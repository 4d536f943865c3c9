"""What people train with: in each set-up the probe's loss is the training loss, and its slope the gradient's."""

import copy
import json
import math
import shutil
import weakref

import pytest
import torch
from common import (
    Recorder,
    Replays,
    arguments,
    assert_same_weights,
    language_rows,
    rows,
    tiny_bert,
    tiny_llama,
    trained,
    weights,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import hf_lqa
from hf_lqa import LQA, ReplayedLoss
from hf_lqa.checkpoint import GROUP_KEY
from hf_lqa.replay import rounding_error
from hf_lqa.rule.head import adapters, head_multipliers
from hf_lqa.rule.prior import PriorConfig

#: Small radii, so that the difference quotient is close to the derivative; a probe at every step.
EVERY = "probe_interval=1,tau=0.002"
PAPER = {"optim": "lqa_paper", "optim_args": "base=adamw_torch," + EVERY}


def run(folder, model=None, data=None, trainer_class=hf_lqa.LQATrainer, init=None, **changes):
    changes = {"max_steps": 3, **PAPER, **changes}
    model = tiny_bert() if model is None else model
    trainer = trainer_class(model, arguments(folder, **changes), train_dataset=data or rows(), **(init or {}))
    recorder, replays = Recorder(trainer), Replays(trainer)
    trainer.train()
    return trainer, recorder, replays


def check(recorder, replays, tolerance=0.05):
    """The replay is exact, and the probes' slope is ``<gradient, direction>``, which the radius rule reveals."""
    assert len(replays.pairs) == recorder.steps[-1]["step"]
    assert all(trained == again for trained, again in replays.pairs), replays.pairs
    for step, (loss, _) in zip(recorder.steps, replays.pairs, strict=True):
        assert step["losses"][1] == pytest.approx(loss, rel=1e-12)
        from_gradient = 0.002 * abs(loss) / step["radius"]
        assert abs(step["slope"]) == pytest.approx(from_gradient, rel=tolerance), step


def mean_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class FromGenerator(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows(64)


SETUPS = {
    "plain": ({}, {}),
    "clipping": ({"max_grad_norm": 1e-3}, {}),
    "no clipping": ({"max_grad_norm": 0.0}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, {}),
    "compute_loss_func": ({"gradient_accumulation_steps": 2}, {"compute_loss_func": mean_loss}),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, {}),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}),
    "average_tokens_across_devices=False": ({"average_tokens_across_devices": False}, {}),
    "weight decay": ({"weight_decay": 0.1}, {}),
}


@pytest.mark.parametrize("name", SETUPS)
def test_probes_are_exact_under(name, tmp_path):
    changes, init = SETUPS[name]
    # Decoupled decay is part of the direction, but its share of the slope is in the gradient's product with it.
    _, recorder, replays = run(tmp_path, init=init, **changes)
    check(recorder, replays)


def test_probes_are_exact_on_an_iterable_dataset(tmp_path):
    _, recorder, replays = run(tmp_path, data=FromGenerator())
    check(recorder, replays)


def padded(folder, **changes):
    from tokenizers import Tokenizer, models

    words = {"[PAD]": 0, "[UNK]": 1} | {str(i): i for i in range(2, 60)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    ragged = [
        {"input_ids": r["input_ids"][: 3 + i % 5].tolist(), "labels": int(r["labels"])} for i, r in enumerate(rows(64))
    ]
    init = {"data_collator": DataCollatorWithPadding(tokenizer)}
    return run(folder, data=ragged, init=init, **changes)


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_probes_are_exact_with_dynamic_padding(sampling, tmp_path):
    _, recorder, replays = padded(tmp_path, train_sampling_strategy=sampling, gradient_accumulation_steps=2)
    check(recorder, replays)


class StopsAtTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(("model", "data"), [(tiny_bert, rows), (tiny_llama, language_rows)])
def test_accumulation_measures_what_one_batch_does(model, data, tmp_path):
    """1 x 32 and 4 x 8; the second step is the shorter one at the end of the epoch, 1 x 16 and 2 x 8."""
    found, divisors = [], []
    for batch, accumulation in ((32, 1), (8, 4)):
        # The BERT classifier's own loss is the mean of each micro-batch, which the Trainer takes for scaled already.
        init = {"compute_loss_func": mean_loss} if model is tiny_bert else {}
        network = model(dropout=0.0) if model is tiny_bert else model()
        trainer, recorder, replays = run(
            tmp_path / str(batch),
            network,
            data(48),
            init=init | {"callbacks": [StopsAtTwo()]},
            max_steps=1000,  # so that the first step is short: a long one would magnify rounding
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="lqa",
            optim_args="base=sgd,probe_interval=1",
            lr_scheduler_type="constant",
        )
        assert all(a == b for a, b in replays.pairs)
        found.append(recorder.steps)
        divisors.append(trainer.accelerator.gradient_accumulation_steps)
    # Before Transformers 5.5.4 Accelerate divides once more, the loss and with it the gradient that is the direction.
    one_by, by = divisors
    assert one_by == 1 and by in (1, 4)
    for one, many in zip(*found, strict=True):
        assert [by * loss for loss in many["losses"]] == pytest.approx(one["losses"], rel=1e-6)
        assert many["radius"] / by == pytest.approx(one["radius"], rel=1e-5)
        assert many["slope"] * by**2 == pytest.approx(one["slope"], rel=1e-5)
        # A second difference of losses: their rounding, divided by their share of the second difference.
        minus, center, plus = one["losses"]
        noise = 4e-7 * center / abs(minus - 2 * center + plus)
        assert many["curvature"] * by**3 == pytest.approx(one["curvature"], rel=max(1e-5, noise))


@pytest.mark.parametrize("accumulation", [2, 8])
def test_the_first_step_does_not_depend_on_how_a_batch_is_cut(accumulation, tmp_path):
    """With a direction that does not know the gradient's scale, whatever Accelerate divides it by."""
    found = []
    for n in (1, accumulation):
        changes = {"max_steps": 1, "per_device_train_batch_size": 32 // n, "gradient_accumulation_steps": n}
        changes["adam_epsilon"] = 1e-15  # by which AdamW knows it, where a gradient is as small
        init = {"compute_loss_func": mean_loss}
        _, recorder, _ = run(
            tmp_path / str(n), tiny_bert(dropout=0.0), init=init, optim="lqa", optim_args=None, **changes
        )
        found.append(recorder.steps[0])
    one, many = found
    assert many["radius"] == pytest.approx(one["radius"], rel=1e-3)
    # The gradient of a key's bias is rounding alone, 0 or not as the batch is cut: 32 of 6,307 elements may count.
    assert many["step_size"] == pytest.approx(one["step_size"], rel=5e-3)


class KeepsScalars(hf_lqa.LQATrainer):
    """Knows what each micro-batch back-propagated."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        vars(self).setdefault("scalars", []).append(float(loss) / self.accelerator.gradient_accumulation_steps)
        return loss


@pytest.mark.parametrize("wanted", [1, 3])
def test_probing_part_of_the_micro_batches(wanted, tmp_path):
    """Those that are probed stand for all: 4 micro-batches at the first step, 2 at the second, the epoch's last."""
    options = f"{PAPER['optim_args']},probe_micro_batches={wanted}"
    changes = {"gradient_accumulation_steps": 4, "max_steps": 2, "optim_args": options}
    trainer, recorder, replays = run(tmp_path, data=rows(48), trainer_class=KeepsScalars, **changes)
    assert all(a == b for a, b in replays.pairs) and trainer.lqa.counts["probe_forwards"] == 4
    for step, scalars in zip(recorder.steps, (trainer.scalars[:4], trainer.scalars[4:]), strict=True):
        probed = scalars[:wanted]
        assert step["losses"][1] == pytest.approx(len(scalars) / len(probed) * sum(probed), rel=1e-6)


def test_what_is_recorded_are_inputs(tmp_path):
    """No graph and no activation of a micro-batch lives on until the step."""
    alive = []

    class Watched(hf_lqa.LQATrainer):
        outputs = ()

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if loss.requires_grad:
                self.outputs = (*self.outputs, weakref.ref(outputs.logits), weakref.ref(loss))
            return (loss, outputs) if return_outputs else loss

    class Counts(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            alive.append([ref() is not None for ref in trainer.outputs])

    init = {"callbacks": [Counts()]}
    trainer = Watched(
        tiny_bert(), arguments(tmp_path, gradient_accumulation_steps=3, **{**PAPER, "max_steps": 1}), **init
    )
    trainer.train_dataset = rows()
    trainer.train()
    assert trainer.lqa.counts["probe_forwards"] == 2
    assert alive == [[False] * 6]


# --- precision ---------------------------------------------------------------------------------------------------


def test_bf16_autocast(tmp_path):
    _, recorder, replays = run(tmp_path, bf16=True)
    assert all(a == b for a, b in replays.pairs)
    assert all(step["losses"][0] != step["losses"][2] for step in recorder.steps)


def test_bf16_weights(tmp_path):
    trainer, recorder, replays = run(tmp_path, tiny_bert().to(torch.bfloat16), optim_args="base=adamw_torch,tau=0.05")
    assert all(a == b for a, b in replays.pairs)
    assert all(torch.isfinite(p).all() and p.dtype == torch.bfloat16 for p in trainer.model.parameters())
    assert recorder.steps[0]["losses"][0] != recorder.steps[0]["losses"][2]


@pytest.mark.parametrize(
    ("frozen", "moved", "autocast", "expected"),
    [
        (torch.float32, torch.float32, None, 2 * 2.0**-23),
        (torch.float64, torch.float64, None, 2 * 2.0**-52),
        (torch.float32, torch.float32, torch.bfloat16, 2.0**-7 / 4),
        (torch.float32, torch.float32, torch.float16, 2.0**-10 / 4),
        (torch.bfloat16, torch.float32, None, 2.0**-7 / 4),  # adapters in float32 on a model in bfloat16
        (torch.bfloat16, torch.bfloat16, None, 2.0**-7 / 2),
    ],
)
def test_the_rounding_error_is_the_precisions(frozen, moved, autocast, expected):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].to(frozen).requires_grad_(False)
    model[1].to(moved)
    assert rounding_error(model, autocast) == expected


def test_below_the_noise_the_radius_grows(tmp_path):
    # So short a probe that bfloat16 sees next to no difference.
    settings = {"optim_args": "base=adamw_torch,tau=1e-4", "max_steps": 4, "bf16": True}
    trainer, recorder, _ = run(tmp_path, tiny_bert(dropout=0.0), lr_scheduler_type="constant", **settings)
    assert trainer.lqa.counts["below_noise"] == 4
    kept = json.loads(trainer.lqa.state_dict()["param_groups"][0][GROUP_KEY])["measurer"]["radius"]
    assert kept["scale"] == 16 and recorder.steps[3]["radius"] > 2 * recorder.steps[0]["radius"]


class HoldsAutocast(hf_lqa.LQATrainer):
    def training_step(self, *args, **kwargs):
        with self.accelerator.autocast():
            return super().training_step(*args, **kwargs)


def test_a_held_autocast_context_gives_no_stale_weights(tmp_path):
    _, recorder, _ = run(tmp_path / "plain", bf16=True)
    _, other, replays = run(tmp_path / "held", trainer_class=HoldsAutocast, bf16=True)
    assert all(a == b for a, b in replays.pairs)
    # Stale casts would make the three losses one.
    assert all(len(set(step["losses"])) == 3 for step in other.steps)
    assert other.steps[0]["losses"] == pytest.approx(recorder.steps[0]["losses"], rel=1e-2)


def scaled_steps(overflow_at, steps=6):
    """fp16's procedure on the CPU: scaled loss, unscaling, a step that is left out when gradients overflow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), "paper")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales, counts = [], []
    for step in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        loss = closure.record(lambda x=x: (model(x) - x.sum(1, keepdim=True)).square().mean())
        scaler.scale(loss).backward()
        if step in overflow_at:
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        optimizer.arm(closure)
        before = (weights(model), copy.deepcopy(optimizer.state_dict()))
        scaler.step(optimizer)
        scaler.update()
        if step in overflow_at:
            assert_same_weights(weights(model), before[0])
            assert repr(optimizer.state_dict()) == repr(before[1])
        scales.append(scaler.get_scale())
        counts.append(optimizer.counts["steps"])
    return scales, counts, optimizer


def test_grad_scaler_skips_a_step_and_the_next_probe_is_its_own():
    scales, counts, optimizer = scaled_steps(overflow_at={2})
    assert scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11, 2.0**11]  # halved once, growth as without LQA
    assert counts == [1, 2, 2, 3, 4, 5]
    assert optimizer.counts["probe_forwards"] == 2 * 5 and optimizer.last_probe.step == 4


# --- models ------------------------------------------------------------------------------------------------------


def test_lora_moves_only_the_adapters(tmp_path):
    model = lora()
    before = weights(model)
    trainer, recorder, replays = run(tmp_path, model)
    check(recorder, replays)
    moved = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert moved and all("lora" in n or "modules_to_save" in n for n in moved)
    copied = sum(p.numel() for g in trainer.lqa.param_groups for p in g["params"])
    assert (
        copied
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        < sum(w.numel() for w in before.values()) / 5
    )


@pytest.mark.parametrize("classes, rank", [(2, 2), (3, 2), (12, 2), (3, 8), (8, 8)])
def test_loras_head_is_found_whatever_its_number_of_classes_and_the_rank(tmp_path, classes, rank):
    """As many classes as ranks: the head has an adapter's shape. Twelve make it larger than adapters."""
    model = lora(classes, rank)
    trainer, _, _ = run(tmp_path, model, rows(num_labels=classes), optim="lqa", optim_args=None, max_steps=12)
    names = {p: name for name, p in model.named_parameters()}
    params = [names[p] for group in trainer.lqa.param_groups for p in group["params"]]
    found = dict(zip(params, trainer.lqa.multipliers, strict=True))
    head = [value for name, value in found.items() if "classifier" in name]
    adapters = {value for name, value in found.items() if "lora" in name}
    assert len(head) == 2 and all(4 <= value <= 16 for value in head)
    assert len(adapters) == 1 and 0.5 <= adapters.pop() <= 2, "adapters go together"


def first_multipliers(model):
    """By name, of what is trained."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    found = head_multipliers([*shapes.values()], adapters([*shapes.values()]), PriorConfig().head)
    return dict(zip(shapes, found, strict=True))


def test_loras_head_is_found_where_a_model_has_it_first():
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlm-roberta", vocab_size=60, **sizes))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    multipliers = first_multipliers(model)
    assert {*multipliers.values()} == {1, 8}
    assert all((multiplier == 8) == ("classifier" in name) for name, multiplier in multipliers.items())


#: Classifiers as their users have them, and what begins the names of their heads. XLM-RoBERTa has its head first;
#: ModernBERT's layers end with a small matrix, Mixtral's with a router, Phi-3's with one below the median.
HEADS = {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "xlm-roberta": ["classifier.dense", "classifier.out_proj"],
    "camembert": ["classifier.dense", "classifier.out_proj"],
    "deberta-v2": ["pooler.dense", "classifier"],
    "electra": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["head.dense", "classifier"],
    "gpt2": ["score"],
    "qwen2": ["score"],
    "phi3": ["score"],
    "mixtral": ["score"],
}


@pytest.mark.parametrize("name", HEADS)
def test_a_classifiers_head_is_found_and_nothing_of_its_layers(name):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name))
    multipliers = first_multipliers(model)
    found = [name for name, p in model.named_parameters() if p.dim() == 2 and multipliers[name] > 1]
    assert found == [f"{module}.weight" for module in HEADS[name]]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", AutoModelForCausalLM),
        ("mixtral", AutoModelForCausalLM),
        ("bert", AutoModelForMaskedLM),
        ("xlm-roberta", AutoModelForMaskedLM),
        ("t5", AutoModelForSeq2SeqLM),
    ],
)
def test_a_language_model_has_no_head_that_is_fresh(name, kind):
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(name))
    assert {*first_multipliers(model).values()} == {1}


def test_frozen_layers_stay(tmp_path):
    model = tiny_bert()
    model.bert.requires_grad_(False)
    before = weights(model)
    _, recorder, replays = run(tmp_path, model)
    check(recorder, replays)
    after = weights(model)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {"classifier.weight", "classifier.bias"}


def test_tied_weights_stay_tied_and_count_once(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    _, recorder, replays = run(tmp_path, model, language_rows())
    check(recorder, replays)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Classifier(nn.Module):
    """BatchNorm, a sparse embedding, and a parameter that gets no gradient."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 8, sparse=sparse)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, input_ids, labels):
        logits = self.head(torch.tanh(self.norm(self.embed(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_batch_norms_statistics_see_each_batch_once(tmp_path):
    model = Classifier()
    _, recorder, replays = run(tmp_path, model)
    check(recorder, replays)
    assert int(model.norm.num_batches_tracked) == 3
    assert torch.equal(model.unused, torch.ones(3))


def test_sparse_gradients():
    found = []
    for sparse in (False, True):
        model = Classifier(sparse=sparse)
        optimizer = LQA(torch.optim.SGD(model.parameters(), lr=1.0), "paper", probe_interval=1)
        for step in range(3):
            batch = {k: torch.stack([r[k] for r in rows(16 + step)]) for k in ("input_ids", "labels")}
            closure = ReplayedLoss(model)
            optimizer.zero_grad()
            closure.record(lambda model=model, batch=batch: model(**batch)["loss"]).backward()
            optimizer.step(closure)
        found.append((optimizer.last_probe.fit, weights(model)))
    (dense_fit, dense), (sparse_fit, scattered) = found
    assert sparse_fit.slope == pytest.approx(dense_fit.slope, rel=1e-5)
    # The curvature's rounding reaches the step sizes, which are of the order of 10.
    assert all(torch.allclose(dense[n], scattered[n], atol=2e-3) for n in dense)


def test_groups_with_their_own_rate_and_decay(tmp_path):
    model = tiny_bert()
    groups = [
        {"params": list(model.bert.parameters()), "lr": 0.1, "weight_decay": 0.1},
        {"params": list(model.classifier.parameters()), "lr": 1.0, "weight_decay": 0.0},
    ]
    lqa = LQA(torch.optim.AdamW(groups), "paper", probe_interval=1, tau=0.002)
    _, recorder, replays = run(tmp_path, model, init={"optimizers": (lqa, None)}, optim="adamw_torch", optim_args=None)
    check(recorder, replays)
    assert [g["initial_lr"] for g in lqa.param_groups] == [0.1, 1.0]  # multipliers, which the schedule scales


# --- runs --------------------------------------------------------------------------------------------------------


def test_evaluation_in_the_middle_changes_nothing(tmp_path):
    settings = {"max_steps": 6, "optim_args": "probe_interval=2"}
    # Without dropout: a stock Trainer's evaluation loader draws a seed from the global stream, too.
    plain = trained(tmp_path / "plain", tiny_bert(dropout=0.0), **settings)
    args = arguments(tmp_path / "eval", **settings, eval_strategy="steps", eval_steps=1)
    evaluated = hf_lqa.LQATrainer(tiny_bert(dropout=0.0), args, train_dataset=rows(), eval_dataset=rows(16))
    evaluated.train()
    assert_same_weights(weights(plain.model), weights(evaluated.model))
    assert evaluated.lqa.counts == plain.lqa.counts


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer = hf_lqa.LQATrainer(tiny_bert(), args, train_dataset=rows(), eval_dataset=rows(16))
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_training_twice_goes_on_with_what_was_measured(tmp_path):
    trainer = trained(tmp_path, max_steps=3)
    lqa, counts, probe = trainer.lqa, dict(trainer.lqa.counts), trainer.lqa.last_probe
    base, learned = lqa.base_step_size, lqa.rule.state
    trainer.train()
    assert trainer.lqa is lqa and lqa.counts == {**counts, "steps": 6}
    assert lqa.last_probe == probe and lqa.base_step_size == pytest.approx(base, rel=0.8)
    # Measured are all steps but the very first.
    assert lqa.rule.state.count == learned.count + 3 == 5 and lqa.rule.state.first == learned.first


class OutOfMemory(hf_lqa.LQATrainer):
    """The second micro-batch of a step does not fit until the batch has been halved."""

    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        if self.calls > 1 and len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_auto_find_batch_size(tmp_path):
    settings = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, recorder, replays = run(tmp_path, trainer_class=OutOfMemory, **settings)
    check(recorder, replays)
    assert trainer._train_batch_size == 4


def shallow():
    """One layer, without dropout: compilers take a while, and draw their own masks."""
    model = tiny_bert(dropout=0.0)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    return model


COMPILERS = ["aot_eager", "inductor"]


@pytest.mark.parametrize("backend", COMPILERS)
def test_torch_compile(backend, tmp_path):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler")
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    _, recorder, replays = run(tmp_path, shallow(), max_steps=2, **compiled)
    _, eager, _ = run(tmp_path / "eager", shallow(), max_steps=2)
    # With and without gradient are two graphs, which may round differently.
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in replays.pairs)
    for step, reference in zip(recorder.steps, eager.steps, strict=True):
        assert step["losses"] == pytest.approx(reference["losses"], rel=1e-5)


def lora(num_labels=3, rank=2):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=["query", "value"], lora_dropout=0.1)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_bert(num_labels=num_labels), config)


RESUMED = {
    **{name: (changes, init, tiny_bert) for name, (changes, init) in SETUPS.items()},
    "bf16 autocast": ({"bf16": True}, {}, tiny_bert),
    "bf16 weights": ({}, {}, lambda: tiny_bert().to(torch.bfloat16)),
    "paper": ({"optim": "lqa_paper"}, {}, tiny_bert),
    "group_by_length": ({"train_sampling_strategy": "group_by_length"}, {}, tiny_bert),
    "iterable": ({}, {"train_dataset": FromGenerator()}, tiny_bert),
    "LoRA": ({}, {}, lora),
    "tied weights": ({}, {"train_dataset": language_rows()}, lambda: tiny_llama(tie_word_embeddings=True)),
    "BatchNorm, a missing gradient": ({}, {}, lambda: Classifier()),
    "torch_compile": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}, shallow),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_as_if_never_interrupted(name, tmp_path):
    changes, init, model = RESUMED[name]
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes}
    settings["optim_args"] = "probe_interval=2"
    found = []
    for folder, checkpoint in (("run", None), ("other", str(tmp_path / "run" / "checkpoint-3"))):
        given = {"train_dataset": rows(), **init}
        trainer = hf_lqa.LQATrainer(model(), arguments(tmp_path / folder, **settings), **given)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append((weights(trainer.model), [e["learning_rate"] for e in trainer.state.log_history[:-1]]))
    (straight, rates), (resumed, again) = found
    assert_same_weights(straight, resumed)
    assert rates == again and len(set(rates)) > 1
