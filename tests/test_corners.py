"""Trainers with methods of their own: LQA is right with them, or says which method it cannot be right with."""

import functools
import warnings

import pytest
import torch
from accelerate import Accelerator
from common import Recorder, Replays, arguments, assert_same_weights, logged, rows, tiny_bert, trained, weights
from transformers import Adafactor, Trainer, TrainerCallback

import hf_lqa
from hf_lqa import LQA, LQATrainer
from hf_lqa.__main__ import patch_trainer

EVERY = {"optim": "lqa_paper", "optim_args": "base=adamw_torch,probe_interval=1,tau=0.002", "max_steps": 3}
SHORT = {"max_steps": 2}


def placed(cls):
    """The same methods over LQATrainer, behind the mixin, and as the runner makes them."""
    methods = {k: v for k, v in vars(cls).items() if not k.startswith("__")} | {"__module__": cls.__module__}
    behind = type(cls.__name__, (Trainer,), methods)
    return {
        "subclass": type(cls.__name__, (LQATrainer,), methods),
        "mixin": type("Mixed", (hf_lqa.LQATrainerMixin, behind), {}),
        "runner": functools.partial(under_the_runner, behind),
    }


def under_the_runner(cls, *args, **kwargs):
    original = Trainer.__init__
    patch_trainer()
    try:
        return cls(*args, **kwargs)
    finally:
        Trainer.__init__ = original


PLACES = ("subclass", "mixin", "runner")


# --- training_step -----------------------------------------------------------------------------------------------


class TwoPasses:
    """R-Drop's kind: two forwards with their own dropout, at the same weights."""

    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, dict(inputs), *args)
        return loss + Trainer.training_step(self, model, inputs, *args)


class Halves:
    """A batch in two pieces, each of which is back-propagated at once."""

    def training_step(self, model, inputs, *args):
        parts = ({k: v[part::2] for k, v in inputs.items()} for part in (0, 1))
        return sum(Trainer.training_step(self, model, part, *args) for part in parts) / 2


class Projected:
    """PGD's kind: several steps away, then back."""

    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, dict(inputs), *args)
        weight = model.get_input_embeddings().weight
        kept = weight.data.clone()
        for _ in range(2):
            weight.data += 0.1 * weight.grad / weight.grad.norm()
        Trainer.training_step(self, model, inputs, *args)
        weight.data = kept
        return loss


class Clamped:
    """WGAN's kind: weights are changed after the loss."""

    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, inputs, *args)
        for p in model.parameters():
            p.data.clamp_(-0.01, 0.01)
        return loss


class Penalised:
    """A penalty that is back-propagated by hand."""

    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, inputs, *args)
        penalty = sum(p.square().sum() for p in model.parameters())
        penalty.backward()
        return loss + penalty.detach()


class PenalisedBefore:
    def training_step(self, model, inputs, *args):
        sum(p.abs().sum() for p in model.parameters()).backward()
        return Trainer.training_step(self, model, inputs, *args)


class PenalisedThroughAccelerate:
    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, inputs, *args)
        self.accelerator.backward(sum(p.square().sum() for p in model.parameters()))
        return loss


class Noisy:
    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, inputs, *args)
        for p in model.parameters():
            p.grad.data.add_(torch.randn_like(p), alpha=1e-3)
        return loss


class Centralised:
    """Gradients are replaced, not written to."""

    def training_step(self, model, inputs, *args):
        loss = Trainer.training_step(self, model, inputs, *args)
        for p in model.parameters():
            p.grad = p.grad - p.grad.mean() if p.dim() > 1 else p.grad
        return loss


class ByHand:
    """Never calls ``super``, nor what it calls."""

    def training_step(self, model, inputs, *args):
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


class HalfByHand:
    def training_step(self, model, inputs, *args):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class Combined:
    """Two losses, one backward."""

    def training_step(self, model, inputs, *args):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, dict(inputs)) + self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cls", [TwoPasses, Halves])
def test_several_losses_at_the_same_weights_are_all_replayed(cls, place, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, **EVERY)
    trainer = placed(cls)[place](tiny_bert(), args, train_dataset=rows())
    recorder, replays = Recorder(trainer), Replays(trainer)
    trainer.train()
    assert len(replays.pairs) == 3 and all(a == b for a, b in replays.pairs)
    for step, (loss, _) in zip(recorder.steps, replays.pairs, strict=True):
        # The radius rule reveals the slope that the gradient has; with one of two losses it would be half.
        assert abs(step["slope"]) == pytest.approx(0.002 * abs(loss) / step["radius"], rel=0.1)


WRONG = {
    Projected: r"Projected\.training_step changes the weights between a loss and the step.* another --optim",
    Clamped: r"Clamped\.training_step changes the weights between a loss and the step",
    Penalised: r"Penalised\.training_step changes the gradients beside accelerator\.backward .*compute_loss",
    PenalisedBefore: r"PenalisedBefore\.training_step changes the gradients beside",
    PenalisedThroughAccelerate: r"PenalisedThroughAccelerate\.training_step called compute_loss 1 times and"
    r" accelerator\.backward 2 times",
    Noisy: r"Noisy\.training_step changes the gradients beside .*Tensor\.register_hook",
    Centralised: r"Centralised\.training_step changes the gradients beside",
    ByHand: r"ByHand\.training_step called compute_loss 0 times and accelerator\.backward 0 times.*super\(\)",
    HalfByHand: r"HalfByHand\.training_step called compute_loss 1 times and accelerator\.backward 0 times",
    Combined: r"Combined\.training_step called compute_loss 2 times and accelerator\.backward 1 times",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_a_gradient_that_no_recorded_loss_has_is_an_error_at_the_first_step(cls, place, tmp_path):
    trainer = placed(cls)[place](tiny_bert(), arguments(tmp_path, **SHORT), train_dataset=rows(32))
    with pytest.raises(ValueError, match=WRONG[cls]):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "training_step" not in vars(trainer)


class Late(LQATrainer):
    """FGM that begins after the first probe, and only at the last of a step's micro-batches."""

    def training_step(self, model, inputs, *args):
        loss = super().training_step(model, dict(inputs), *args)
        if self.state.global_step >= 2 and self.accelerator.sync_gradients:
            weight = model.classifier.weight
            kept = weight.data.clone()
            weight.data.add_(weight.grad)
            super().training_step(model, inputs, *args)
            weight.data.copy_(kept)
        return loss


def test_weights_that_are_changed_later_are_noticed_by_the_next_probe(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, **{**EVERY, "max_steps": 5})
    trainer = Late(tiny_bert(), args, train_dataset=rows())
    with pytest.raises(ValueError, match=r"Late\.training_step changes the weights"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_gradient_hooks_and_embeddings_with_a_largest_norm_are_no_change(tmp_path):
    model = tiny_bert(dropout=0.0)
    model.get_input_embeddings().max_norm = 0.05
    model.classifier.weight.register_hook(lambda grad: grad * (torch.arange(16) < 8))
    frozen = model.classifier.weight[:, 8:].clone()
    args = arguments(tmp_path, gradient_accumulation_steps=2, **EVERY)
    trainer = placed(TwoPasses)["subclass"](model, args, train_dataset=rows())
    trainer.train()
    assert trainer.lqa.counts["probe_forwards"] == 6
    assert torch.equal(model.classifier.weight[:, 8:], frozen)


# --- the optimizer -----------------------------------------------------------------------------------------------


def two_groups(model, rate, ratio):
    rates = {model.bert: rate, model.classifier: rate * ratio}
    return [{"params": module.parameters(), "lr": rate} for module, rate in rates.items()]


class Literal:
    def create_optimizer(self, *args):
        self.optimizer = torch.optim.AdamW(two_groups(self.model, 2e-5, 8))
        return self.optimizer


class LayerWise:
    def create_optimizer(self, *args):
        if self.optimizer is None:
            layers = [self.model.bert.embeddings, *self.model.bert.encoder.layer, self.model.classifier]
            rates = [self.args.learning_rate * 0.5 ** (len(layers) - 1 - i) for i in range(len(layers))]
            groups = [{"params": m.parameters(), "lr": r} for m, r in zip(layers, rates, strict=True)]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        return self.optimizer


class ByName:
    """PEFT's recipe for LoRA+, through the stock Trainer."""

    def create_optimizer(self, *args):
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
        rate = kwargs.pop("lr")
        self.optimizer = cls(two_groups(self.model, rate, 16), **kwargs)


class ByNameFromElsewhere:
    """The same with the arguments that the script has kept."""

    def create_optimizer(self, *args):
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.own_args, self.model)
        self.optimizer = cls(two_groups(self.model, kwargs.pop("lr"), 0.25), **kwargs)


class OwnChoice:
    def get_optimizer_cls_and_kwargs(self, args, model=None):
        return torch.optim.RMSprop, {"lr": 1e-4}


MULTIPLIERS = {
    Literal: ("AdamW", "create_optimizer", [1 / 8, 1.0]),
    LayerWise: ("AdamW", "create_optimizer", [1 / 8, 1 / 4, 1 / 2, 1.0]),
    ByName: ("AdamW", "create_optimizer", [1 / 16, 1.0]),
    ByNameFromElsewhere: ("AdamW", "create_optimizer", [1.0, 1 / 4]),
    OwnChoice: ("RMSprop", "get_optimizer_cls_and_kwargs", [1.0, 1.0]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cls", MULTIPLIERS, ids=lambda cls: cls.__name__)
def test_lqa_goes_around_an_optimizer_that_a_method_builds(cls, place, tmp_path):
    name, method, multipliers = MULTIPLIERS[cls]
    args = arguments(tmp_path, lr_scheduler_type="constant", **SHORT)
    trainer = placed(cls)[place](tiny_bert(), args, train_dataset=rows(32))
    trainer.own_args = args
    with pytest.warns(UserWarning, match=rf"optim='lqa' goes around the {name} that {cls.__name__}\.{method} gives"):
        trainer.train()
    lqa = trainer.lqa
    assert type(lqa.base).__name__ == name and trainer.args is args and lqa.counts["probe_forwards"] == 2
    assert [group["lr"] for group in lqa.param_groups] == pytest.approx(multipliers)
    assert logged(trainer, "learning_rate")[-1] == lqa.step_size > 1e-5


def test_the_same_groups_train_the_same_whatever_their_rates_were(tmp_path):
    """Rates 2e-5 and 1.6e-4 of a method's own are multipliers 1/8 and 1 of an LQA that was built by hand."""
    own = trained(tmp_path, trainer_class=placed(Literal)["subclass"], max_steps=6)
    model = tiny_bert()
    lqa = LQA(torch.optim.AdamW(two_groups(model, 1 / 8, 8)))
    args = arguments(tmp_path, optim="adamw_torch", max_steps=6)
    LQATrainer(model, args, train_dataset=rows(), optimizers=(lqa, None)).train()
    assert_same_weights(weights(own.model), weights(model))


@pytest.mark.parametrize("how", ["argument", "attribute", "prepared"])
def test_lqa_goes_around_an_optimizer_that_it_was_given(how, tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(two_groups(model, 1e-3, 4), momentum=0.9)
    given = {"optimizers": (optimizer, None)} if how == "argument" else {}
    trainer = LQATrainer(model, arguments(tmp_path, **SHORT), train_dataset=rows(32), **given)
    if how != "argument":
        trainer.optimizer = optimizer if how == "attribute" else trainer.accelerator.prepare(optimizer)
    with pytest.warns(UserWarning, match=r"goes around the SGD that optimizers=.*\(0.001 to 0.004\).*\(0.25 to 1\)"):
        trainer.train()
    assert trainer.lqa.base is optimizer and trainer.lqa.counts["probe_forwards"] == 2
    assert [group["initial_lr"] for group in trainer.lqa.param_groups] == [0.25, 1.0]


SCHEDULERS = torch.optim.lr_scheduler
HALVING = {
    "lambda": lambda opt: SCHEDULERS.LambdaLR(opt, lambda step: 0.5**step),
    "exponential": lambda opt: SCHEDULERS.ExponentialLR(opt, 0.5),
    "chained": lambda opt: SCHEDULERS.ChainedScheduler([SCHEDULERS.ExponentialLR(opt, 0.5)]),
    "sequential": lambda opt: SCHEDULERS.SequentialLR(
        opt, [SCHEDULERS.ExponentialLR(opt, 0.5), SCHEDULERS.ConstantLR(opt, 1.0)], milestones=[9]
    ),
}


class Multipliers(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("kind", HALVING)
def test_a_schedule_that_was_given_with_its_optimizer_goes_on_multiplying(kind, tmp_path):
    model, rates = tiny_bert(), Multipliers()
    optimizer = torch.optim.AdamW(two_groups(model, 1e-5, 2))
    given = {"optimizers": (optimizer, HALVING[kind](optimizer)), "callbacks": [rates]}
    LQATrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(32), **given).train()
    assert rates.seen == [pytest.approx([0.5 * 0.5**step, 0.5**step]) for step in range(3)]


class Both:
    """An optimizer and its schedule from one method."""

    def create_optimizer(self, *args):
        self.optimizer = torch.optim.AdamW(two_groups(self.model, 1e-5, 2))
        self.lr_scheduler = SCHEDULERS.LambdaLR(self.optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_that_comes_with_a_methods_optimizer_goes_on_multiplying(place, tmp_path):
    rates = Multipliers()
    args = arguments(tmp_path, max_steps=3)
    placed(Both)[place](tiny_bert(), args, train_dataset=rows(32), callbacks=[rates]).train()
    assert rates.seen == [pytest.approx([0.5 * 0.5**step, 0.5**step]) for step in range(3)]


class OneCycle:
    """A schedule of absolute rates."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = SCHEDULERS.OneCycleLR(self.optimizer, max_lr=3e-5, total_steps=num_training_steps + 1)
        return self.lr_scheduler


@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_of_absolute_rates_multiplies(place, tmp_path):
    rates = Multipliers()
    args = arguments(tmp_path, max_steps=9)
    trainer = placed(OneCycle)[place](tiny_bert(), args, train_dataset=rows(), callbacks=[rates])
    with pytest.warns(UserWarning, match=r"OneCycleLR that OneCycle\.create_scheduler gives.*3e-05"):
        trainer.train()
    first = [seen[0] for seen in rates.seen]
    assert first[0] == pytest.approx(1 / 25) and max(first) == pytest.approx(1, abs=0.1) and first[-1] < 0.1


def test_a_cycle_between_two_rates_goes_up_to_one(tmp_path):
    model, rates = tiny_bert(), Multipliers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    cycle = SCHEDULERS.CyclicLR(optimizer, base_lr=1e-5, max_lr=4e-5, step_size_up=2, cycle_momentum=False)
    given = {"optimizers": (optimizer, cycle), "callbacks": [rates]}
    LQATrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(32), **given).train()
    assert [seen[0] for seen in rates.seen] == pytest.approx([0.25, 0.625, 1.0])


class Noam:
    """Schedules as a class of its own, of which nothing is known."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.param_groups[0]["lr"] = 1e-4


def test_a_schedule_whose_rates_cannot_be_found_is_refused(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = (optimizer, Noam(optimizer))
    trainer = LQATrainer(model, arguments(tmp_path, **SHORT), train_dataset=rows(32), optimizers=given)
    with pytest.raises(ValueError, match=r"optimizers=.* with a Noam .* largest rate of 1"):
        trainer.train()
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("mixed", [False, True])
def test_a_class_and_its_rate_as_arguments(mixed, tmp_path):
    cls = type("Mixed", (hf_lqa.LQATrainerMixin, Trainer), {}) if mixed else LQATrainer
    chosen = (torch.optim.NAdam, {"lr": 1e-4})
    args = arguments(tmp_path, lr_scheduler_type="constant", **SHORT)
    trainer = cls(tiny_bert(), args, train_dataset=rows(32), optimizer_cls_and_kwargs=chosen)
    with pytest.warns(UserWarning, match=r"goes around the NAdam that optimizer_cls_and_kwargs gives.*\(0\.0001\)"):
        trainer.train()
    assert {group["lr"] for group in trainer.lqa.param_groups} == {1.0} and trainer.lqa.step_size > 1e-5


def test_nothing_is_said_of_the_trainers_own_optimizer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(tmp_path, **SHORT)


@pytest.mark.parametrize("loraplus_lr_ratio", [4, 16])
def test_lora_plus(loraplus_lr_ratio, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    args = arguments(tmp_path, lr_scheduler_type="constant", max_steps=4)
    cls, kwargs = LQATrainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs["lr"] == 1.0
    optimizer = create_loraplus_optimizer(model, cls, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)
    trainer = LQATrainer(model, args, train_dataset=rows(32), optimizers=(optimizer, None))
    trainer.train()
    found = sorted({group["lr"] for group in trainer.lqa.param_groups if group["params"]})
    assert found == pytest.approx([1 / loraplus_lr_ratio, 1.0])


class Searched:
    def create_optimizer(self, *args):
        self.built = getattr(self, "built", 0) + 1
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1 * self.built)


def test_each_try_of_a_search_gets_its_own(tmp_path):
    args = arguments(tmp_path, **SHORT)
    trainer = placed(Searched)["subclass"](args=args, train_dataset=rows(32), model_init=lambda trial: tiny_bert())
    trainer.train()
    first = trainer.lqa
    trainer.train()
    assert trainer.built == 2 and trainer.lqa is not first and type(trainer.lqa.base) is torch.optim.SGD


class Built:
    def create_optimizer(self, *args):
        self.optimizer = LQA(torch.optim.AdamW(self.model.parameters(), lr=0.5))
        return self.optimizer


@pytest.mark.parametrize("place", PLACES)
def test_an_lqa_of_a_methods_own_is_left_alone(place, tmp_path):
    trainer = placed(Built)[place](tiny_bert(), arguments(tmp_path, **SHORT), train_dataset=rows(32))
    trainer.train()
    assert trainer.lqa.param_groups[0]["initial_lr"] == 0.5 and trainer.lqa.counts["probe_forwards"] == 2


class Switches(torch.optim.SGD):
    """Has the two modes of schedule-free optimizers."""

    def train(self): ...

    def eval(self): ...


class Lomo(torch.optim.SGD):
    pass


class Estimates(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group |= {"d": 1e-6, "growth_rate": 2.0}


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


CANNOT = {
    "LBFGS": (torch.optim.LBFGS, "it evaluates the loss itself"),
    "Switches": (Switches, "its weights during training"),
    "Lomo": (Lomo, "it steps inside backward"),
    "Estimates": (Estimates, "a learning rate of its own"),
    "NoRate": (NoRate, "no 'lr'"),
    "Adafactor": (lambda params: Adafactor(params, lr=None), "no 'lr'"),
    "zero": (lambda params: torch.optim.SGD(params, lr=0.0), "must be > 0"),
    "none": (lambda params: None, "it is no torch.optim.Optimizer"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_an_optimizer_that_cannot_be_a_base_is_refused_with_the_methods_name(kind, tmp_path):
    build, reason = CANNOT[kind]

    class Builds(LQATrainer):
        def create_optimizer(self, *args):
            self.optimizer = build(self.model.parameters())

    with pytest.raises(ValueError, match=rf"Builds\.create_optimizer gives .*{reason}"):
        Builds(tiny_bert(), arguments(tmp_path, **SHORT), train_dataset=rows(32)).train()


@pytest.mark.parametrize("kind", [kind for kind in CANNOT if kind != "zero"])
def test_an_optimizer_that_cannot_be_a_base_is_refused_without_a_trainer(kind):
    build, reason = CANNOT[kind]
    base = build([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=rf"base={type(base).__name__}: .*{reason}.* Use e\.g\. AdamW"):
        LQA(base)


def test_a_prepared_optimizer_is_no_base():
    prepared = Accelerator(cpu=True).prepare(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0))
    with pytest.raises(ValueError, match=r"base=AcceleratedOptimizer: .*its \.optimizer, and prepare LQA"):
        LQA(prepared)
    LQA(prepared.optimizer)


class Replaces(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.optimizer = torch.optim.AdamW(self.trainer.model.parameters(), lr=1e-3)


def test_an_optimizer_that_is_replaced_in_training_is_an_error(tmp_path):
    callback = Replaces()
    trainer = LQATrainer(tiny_bert(), arguments(tmp_path, **SHORT), train_dataset=rows(32), callbacks=[callback])
    callback.trainer = trainer
    with pytest.raises(ValueError, match=r"optim='lqa', but trainer\.optimizer is a AdamW .* before train\(\)"):
        trainer.train()


class OwnLoop(LQATrainer):
    """A training loop of its own, which never calls ``training_step``."""

    def _inner_training_loop(self, *args, **kwargs):
        self.create_optimizer()
        batch = {k: torch.stack([row[k] for row in rows(8)]) for k in ("input_ids", "labels")}
        self.model(**batch).loss.backward()
        self.optimizer.step()


def test_a_loop_without_training_step_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"OwnLoop\._inner_training_loop.* self\.training_step for each micro-batch"):
        OwnLoop(tiny_bert(), arguments(tmp_path, **SHORT), train_dataset=rows(32)).train()


class StepsTooSoon(TrainerCallback):
    def on_substep_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.step()


def test_a_callback_that_steps_before_the_step_is_complete_is_an_error_where_a_loss_is_needed(tmp_path):
    for optim in ("lqa_paper", "lqa"):
        args = arguments(tmp_path, optim=optim, gradient_accumulation_steps=2, **SHORT)
        trainer = LQATrainer(tiny_bert(), args, train_dataset=rows(32), callbacks=[StepsTooSoon()])
        if optim == "lqa_paper":
            with pytest.raises(ValueError, match=r"without a closure before any step size was measured"):
                trainer.train()
            continue
        trainer.train()
        # As in a stock Trainer: two steps of its own, and one in the middle of each.
        assert trainer.lqa.counts["steps"] == 4 and trainer.lqa.last_probe is None


def test_another_optim_keeps_a_methods_optimizer_as_it_is(tmp_path):
    for cls in (placed(Literal)["subclass"], placed(Literal)["mixin"]):
        trainer = trained(tmp_path, trainer_class=cls, optim="adamw_torch", lr_scheduler_type="constant", **SHORT)
        assert trainer.lqa is None and [g["lr"] for g in trainer.optimizer.param_groups] == [2e-5, 1.6e-4]
