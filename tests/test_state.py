"""State that a forward keeps: a replay starts from what the training forward started from, and leaves no trace."""

import collections
import copy
import functools
import itertools
import random
import warnings
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from common import arguments, logged, rows
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

import hf_lqa
from hf_lqa import LQA, ReplayedLoss, Verdict, search
from hf_lqa.groups import rescaled
from hf_lqa.quadratic import rejected
from hf_lqa.values import Values

STEPS = 5
STREAM = np.random.default_rng(0)


# --- kinds of state in a model -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A loss that depends on what earlier forwards left behind; `keep` returns a number in the loss and changes it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.setup()

    def setup(self):
        pass

    def forward(self, x, labels):
        hidden = torch.tanh(self.a(x))
        loss = F.cross_entropy(self.b(hidden), labels)
        return {"loss": loss + self.keep(hidden, x)}


class BufferAssigned(Net):
    def setup(self):
        self.register_buffer("mean", torch.zeros(16))

    def keep(self, hidden, x):
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return (hidden - self.mean).square().mean()


class BufferUnregisteredAndBack(Net):
    """A buffer whose very name comes and goes."""

    def setup(self):
        self.register_buffer("odd", None)

    def keep(self, hidden, x):
        before = self.odd
        self.odd = hidden.detach().mean(0) if before is None else None
        return 0.0 if before is None else (hidden - before).square().mean()


class QueueWrittenAfterItIsRead(Net):
    def setup(self):
        self.register_buffer("queue", torch.randn(16, 32))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def keep(self, hidden, x):
        loss = torch.logsumexp(hidden @ self.queue.clone(), 1).mean()
        at = int(self.at)
        self.queue[:, at : at + 8] = hidden.detach()[:8].T
        self.at[...] = (at + 8) % 32
        return 0.1 * loss


class BufferWrittenBeforeItIsRead(Net):
    def setup(self):
        self.register_buffer("codebook", torch.randn(4, 16))

    def keep(self, hidden, x):
        nearest = torch.cdist(hidden, self.codebook.clone()).argmin(1)
        self.codebook.index_add_(0, nearest, 0.1 * hidden.detach())
        return (hidden - self.codebook[nearest]).square().mean()


class MomentumEncoder(Net):
    frozen = True

    def setup(self):
        self.teacher = copy.deepcopy(self.a)
        nn.init.normal_(self.teacher.weight)
        self.teacher.requires_grad_(not self.frozen)

    def update(self, teacher, student):
        teacher.mul_(0.9).add_(student, alpha=0.1)

    def keep(self, hidden, x):
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.a.parameters(), strict=True):
                self.update(teacher, student)
            target = torch.tanh(self.teacher(x))
        return (hidden - target).square().mean()


class MomentumEncoderThroughData(MomentumEncoder):
    """No version counter tells."""

    def update(self, teacher, student):
        teacher.data.mul_(0.9).add_(student.data, alpha=0.1)


class MomentumEncoderInNewMemory(MomentumEncoder):
    def update(self, teacher, student):
        teacher.data = 0.9 * teacher.data + 0.1 * student.data


class TargetThatFollows(MomentumEncoder):
    """At first equal to its student: only forwards at other weights change it."""

    def setup(self):
        super().setup()
        self.teacher.load_state_dict(self.a.state_dict())


class SpectralNorm(Net):
    def setup(self):
        nn.utils.parametrizations.spectral_norm(self.a)

    def keep(self, hidden, x):
        return 0.0


class OldWeightNorm(Net):
    def setup(self):
        nn.utils.weight_norm(self.a)

    def keep(self, hidden, x):
        return 0.0


class MaxNormEmbedding(Net):
    """The forward writes to weights that are trained."""

    def setup(self):
        self.table = nn.Embedding(10, 4, max_norm=0.5)

    def keep(self, hidden, x):
        return self.table(torch.arange(10)).square().mean()


class Noise(Net):
    """A random number generator of its own."""

    def setup(self):
        self.source = torch.Generator().manual_seed(1)

    def draw(self):
        return float(torch.rand((), generator=self.source))

    def keep(self, hidden, x):
        return self.draw() * hidden.square().mean()


class GeneratorInAList(Noise):
    def setup(self):
        self.sources = [{"mine": torch.Generator().manual_seed(1)}]

    def draw(self):
        return float(torch.rand((), generator=self.sources[0]["mine"]))


class NumpyGenerator(Noise):
    def setup(self):
        self.source = np.random.default_rng(1)

    def draw(self):
        return self.source.random()


class NumpyRandomState(Noise):
    def setup(self):
        self.source = (np.random.RandomState(1),)

    def draw(self):
        return self.source[0].rand()


class PythonRandom(Noise):
    def setup(self):
        self.source = random.Random(1)

    def draw(self):
        return self.source.gauss(1, 0.1)


class GlobalGenerator(Noise):
    def setup(self):
        pass

    def draw(self):
        return STREAM.random()


class ClassCounter(Noise):
    calls = 0

    def setup(self):
        ClassCounter.calls = 0

    def draw(self):
        ClassCounter.calls += 1
        return ClassCounter.calls / 10


class HiddenState(Net):
    def setup(self):
        self.state = (torch.zeros(16), 0)

    def keep(self, hidden, x):
        last, count = self.state
        self.state = (hidden.detach().mean(0), count + 1)
        return (hidden.mean(0) - last).square().sum() / (1 + count)


class HiddenStateInPlace(Net):
    def setup(self):
        self.memory = SimpleNamespace(last=torch.zeros(16), seen=np.zeros(3))

    def keep(self, hidden, x):
        loss = (hidden.mean(0) - self.memory.last).square().sum() + self.memory.seen.sum() / 100
        self.memory.last.lerp_(hidden.detach().mean(0), 0.1)
        self.memory.seen[1] += 1
        return loss


class History(Net):
    def setup(self):
        self.recent = collections.deque(maxlen=2)
        self.counted, self.order = collections.defaultdict(int), collections.OrderedDict(a=1, b=2)
        self.some, self.raw = set(), bytearray(2)

    def keep(self, hidden, x):
        past = sum(self.recent) / 10 + self.counted["x"] / 10 + len(self.some) / 10 + self.raw[0] / 10
        past += list(self.order).index("a") / 10
        self.recent.append(float(hidden.detach().mean()))
        self.counted["x"] += 1
        self.order.move_to_end("a", last=bool(self.counted["x"] % 2))
        self.some.add(self.counted["x"])
        self.raw[0] += 1
        return past * hidden.square().mean()


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class InAnObjectWithSlots(Net):
    def setup(self):
        self.meter = Slotted()

    def keep(self, hidden, x):
        self.meter.scale *= 0.9
        return self.meter.scale * hidden.square().mean()


class InAHook(Net):
    def setup(self):
        features = []
        self.a.register_forward_hook(lambda module, args, output: features.append(output.detach().mean()))
        self.features = lambda: sum(features) / 10

    def keep(self, hidden, x):
        return self.features() * hidden.square().mean()


class InAClosure(Net):
    def setup(self):
        count = 0

        def tick():
            nonlocal count
            count += 1
            return count / 10

        self.tick = functools.partial(tick)

    def keep(self, hidden, x):
        return self.tick() * hidden.square().mean()


class Endless:
    """An iterator that can be put back."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return self.number


class AnIteratorWithAttributes(Noise):
    def setup(self):
        self.source = Endless()

    def draw(self):
        return next(self.source) / 10


class GlobalOfAnotherModule(Noise):
    def setup(self):
        common.drawn = 0

    def draw(self):
        common.drawn += 1
        return common.drawn / 10


class InputEdited(Net):
    def forward(self, x, labels):
        x.data.mul_(1 + x.mean())
        return super().forward(x, labels)

    def keep(self, hidden, x):
        return hidden.square().mean()


KINDS = [c for c in list(vars().values()) if isinstance(c, type) and issubclass(c, Net) and c is not Net]


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        yield x, (x[:, 0] > 0).long()


def trained(make, rates=None, micro_batches=1, rule="displacement"):
    """(model, LQA, pairs of recorded and replayed losses, rates); with `rates`, by a plain optimizer at those.

    Rates are each step's size and its multipliers.
    """
    ClassCounter.calls = 0
    STREAM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    torch.manual_seed(0)
    model, pairs, used = make(), [], []
    base = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "teacher" not in n], lr=1.0)
    lqa = LQA(base, rule, probe_interval=1) if rates is None else None
    for step, (x, y) in enumerate(batches()):
        base.zero_grad()
        closure = ReplayedLoss(model, weight=1 / micro_batches)
        for part, labels in zip(x.clone().chunk(micro_batches), y.chunk(micro_batches), strict=True):
            forward = closure.record if lqa else lambda compute, *args: compute(*args)
            loss = forward(lambda *args: model(*args)["loss"], part.clone(), labels)
            (loss / micro_batches).backward()
        if lqa is None:
            with rescaled(base, *rates[step]):
                base.step()
            continue
        if closure.complete and not closure.obstacle:
            pairs.append((closure.loss, closure()))
        lqa.step(closure)
        used.append((lqa.step_size, lqa.multipliers))
    return model, lqa, pairs, used


def assert_no_trace(make, rates, model, micro_batches=1):
    """A twin trained without probes ends alike: the same weights, buffers, and loss of one more batch."""
    after = {k: v.clone() for k, v in model.state_dict().items()}
    loss = model(*next(batches()))["loss"]
    twin, *_ = trained(make, rates, micro_batches)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert torch.equal(loss, twin(*next(batches()))["loss"])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("make", KINDS, ids=lambda cls: cls.__name__)
def test_kinds_of_state_in_a_model(make, micro_batches):
    """The replay is the training loss bit for bit, and weights and state end as they do without a probe."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, lqa, pairs, rates = trained(make, None, micro_batches)
    assert len(pairs) == STEPS and all(torch.equal(a, b) for a, b in pairs), pairs
    assert lqa.counts["probe_forwards"] == 2 * STEPS and lqa.counts["replays_checked"] == 1
    assert lqa.last_probe.loss_minus != lqa.last_probe.loss_plus
    assert_no_trace(make, rates, model, micro_batches)


# --- what is copied late, or not at all --------------------------------------------------------------------------


class TeacherThatRequiresGrad(MomentumEncoder):
    """Nothing but the forward itself tells it from a weight that is trained."""

    frozen = False


@pytest.mark.parametrize("make", [TeacherThatRequiresGrad, MomentumEncoderThroughData, QueueWrittenAfterItIsRead])
def test_what_is_too_large_to_copy_is_copied_once_it_has_changed(make, monkeypatch):
    if make is not TeacherThatRequiresGrad:
        monkeypatch.setattr(search, "SMALL", 4)
        monkeypatch.setattr(search, "ALLOWANCE", -(10**9))
    model, lqa, pairs, rates = trained(make)
    assert lqa.counts["not_replayable"] == 1 and lqa.counts["probe_forwards"] == 2 * (STEPS - 1)
    assert lqa.counts["replays_given_up"] == 0
    assert len(pairs) == STEPS - 1 and all(torch.equal(a, b) for a, b in pairs)
    assert_no_trace(make, rates, model)


def test_frozen_weights_that_stay_are_not_copied(monkeypatch):
    monkeypatch.setattr(search, "ALLOWANCE", 0)
    adapted = nn.Sequential(nn.Linear(600, 600).requires_grad_(False), nn.Linear(600, 1))
    closure = ReplayedLoss(adapted)
    closure.record(lambda x: adapted(x).square().mean(), torch.ones(2, 600)).backward()
    found = search.reach({"net": adapted}, lambda weight: weight.requires_grad).holders
    copied = {h.path: h.read().copy.numel() for h in found if isinstance(h, Values)}
    assert copied["net.0.weight"] < 200 < 600 == copied["net.0.bias"]
    assert closure.complete and torch.equal(closure(), closure.loss)


# --- losses that differentiate -----------------------------------------------------------------------------------


def penalised(model, x, labels):
    x = x.clone().requires_grad_(True)
    loss = model(x, labels)["loss"]
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def forces(model, x, labels):
    x.requires_grad_(True)
    energy = model.b(torch.tanh(model.a(x))).sum()
    return (-torch.autograd.grad(energy, x, create_graph=True)[0]).square().mean()


def virtual_adversary(model, x, labels):
    """By `backward`, as often published: it adds to the weights' gradients and then clears them."""
    away = (0.1 * torch.ones_like(x)).requires_grad_(True)
    F.mse_loss(model.a(x + away), model.a(x).detach()).backward()
    away = away.grad.sign()
    model.zero_grad()
    return model(x + 0.1 * away, labels)["loss"]


def only_with_autograd(model, x, labels):
    """Says nothing without."""
    return penalised(model, x, labels) if torch.is_grad_enabled() else model(x, labels)["loss"]


def wholly_functional(model, x, labels):
    return torch.func.grad(lambda x: model(x, labels)["loss"])(x).square().sum() + model(x, labels)["loss"]


class Plain(Net):
    def keep(self, hidden, x):
        return 0.0


@pytest.mark.parametrize(
    "compute", [penalised, forces, virtual_adversary, only_with_autograd, wholly_functional], ids=lambda f: f.__name__
)
def test_losses_that_differentiate(compute):
    model = Plain()
    lqa = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), probe_interval=1)
    for x, y in batches(3):
        lqa.zero_grad()
        closure = ReplayedLoss(model)
        closure.record(compute, model, x, y).backward()
        grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        lqa.step(closure)
        assert torch.equal(closure(), closure()) and closure().grad_fn is None
        for name, p in model.named_parameters():
            assert p.grad is grads.get(name, (None,))[0] and (p.grad is None or torch.equal(p.grad, grads[name][1]))
    assert lqa.counts["probe_forwards"] == 6 and lqa.last_probe.loss_minus > lqa.last_probe.loss_plus
    assert lqa.counts["replays_with_grad"] == (compute is not wholly_functional)


# --- what cannot be replayed -------------------------------------------------------------------------------------


class Adversarial(Plain):
    """A discriminator takes a step of its own within the loss."""

    def setup(self):
        self.teacher = nn.Linear(16, 1)
        self.own = torch.optim.SGD(self.teacher.parameters(), lr=0.1)

    def keep(self, hidden, x):
        self.own.zero_grad()
        self.teacher(hidden.detach()).mean().backward()
        self.own.step()
        return self.teacher(hidden).mean()


class BackPropagates(Plain):
    def keep(self, hidden, x):
        F.mse_loss(self.a(x), torch.zeros(len(x), 16)).backward()
        return 0.0


class Draws(Plain):
    """A second stream of data, drawn from within the loss."""

    def setup(self):
        self.more = (i / 10 for i in itertools.count())

    def keep(self, hidden, x):
        return next(self.more) * hidden.square().mean()


class DrawsFromALoader(Draws):
    def setup(self):
        self.more = iter(torch.utils.data.DataLoader(list(range(1000)), batch_size=1))


class Cycles(Draws):
    def setup(self):
        self.more = itertools.cycle([i / 100 for i in range(101)])


class Elsewhere(Plain):
    """On disk, where nobody looks."""

    file = None

    def keep(self, hidden, x):
        number = len(type(self).file.read_text()) if type(self).file.exists() else 0
        type(self).file.write_text("x" * (number + 1))
        return number * hidden.square().mean()


REFUSED = [
    (Adversarial, "SGD.step within the forward"),
    (BackPropagates, "the gradient of BackPropagates.a.weight"),
    (Draws, "Draws.more"),
    (DrawsFromALoader, "DrawsFromALoader.more"),
    (Cycles, "perhaps Cycles.more, or something outside the model and the Trainer"),
    (Elsewhere, "something outside the model and the Trainer"),
]


@pytest.mark.parametrize(("make", "name"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_replayed_is_said_once_by_name_and_training_goes_on(make, name, tmp_path):
    Elsewhere.file = tmp_path / "count"
    with pytest.warns(UserWarning, match="cannot be replayed") as told:
        _, lqa, _, rates = trained(make)
    assert len([w for w in told if name in str(w.message)]) == 1 == len(told)
    assert lqa.counts["not_replayable"] == STEPS and lqa.counts["probe_forwards"] == 0
    probe = lqa.last_probe
    assert probe.fit.verdict is Verdict.NOT_REPLAYABLE and probe.fit.slope < 0 < probe.radius
    assert rejected(lqa.counts) == STEPS and all(rate > 0 for rate, _ in rates)
    with pytest.raises(ValueError, match="lqa_paper") as error:
        trained(make, rule="paper")
    assert name in str(error.value)


def test_what_has_a_trace_though_not_in_the_loss_is_said(monkeypatch):
    class Counts(Plain):
        def setup(self):
            self.more = itertools.count()

        def keep(self, hidden, x):
            if not torch.is_grad_enabled():  # in replays alone, so that nothing shows in training
                next(self.more)
            return 0.0

    with pytest.warns(UserWarning, match=r"does not leave as it was Counts\.more"):
        trained(Counts)


def test_the_decision_survives_a_checkpoint():
    for make, kept in ((Draws, {"replays_given_up": 1}), (Plain, {"replays_checked": 1, "replays_given_up": 0})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, lqa, *_ = trained(make)
        resumed = LQA(torch.optim.SGD([p for n, p in model.named_parameters()], lr=1.0), probe_interval=1)
        resumed.load_state_dict(copy.deepcopy(lqa.state_dict()))
        assert resumed.counts == lqa.counts and kept.items() <= lqa.counts.items()
        closure = ReplayedLoss(model)
        closure.record(lambda *batch, model=model: model(*batch)["loss"], *next(batches())).backward()
        closure.check = lambda: pytest.fail("checked again")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.step(closure)


def test_ranks_decide_together():
    """If one of two ranks cannot replay, the other does not either."""
    model = Plain()
    lqa = LQA(torch.optim.SGD(model.parameters(), lr=1.0), probe_interval=1)
    reductions = []

    def of_two(values):
        reductions.append(values.tolist())
        # What the gradients are; loss and slope; then the check.
        return values if len(reductions) < 3 else values + 0.5

    lqa.measurer.reduce = of_two
    closure = ReplayedLoss(model)
    closure.record(lambda x, y: model(x, y)["loss"], *next(batches())).backward()
    with pytest.warns(UserWarning, match="on another rank"):
        lqa.step(closure)
    assert reductions[2][:2] == [0, 0] and lqa.last_probe.fit.verdict is Verdict.NOT_REPLAYABLE


# --- several models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [lambda a, b: (a, b), lambda a, b: (nn.ModuleList([a, b]),)], ids=["two", "list"])
def test_buffers_of_several_models(together):
    first, second = nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = next(batches())
    closure = ReplayedLoss(*together(first, second))
    loss = closure.record(lambda: F.cross_entropy(second(first(x)), y))
    buffers = copy.deepcopy(dict(second.named_buffers()))
    assert torch.equal(closure(), loss.detach())
    assert all(torch.equal(b, buffers[name]) for name, b in second.named_buffers())


def test_what_is_no_model_is_an_error():
    for given in ((), (0.5,), (nn.Linear(2, 2), 0.5)):
        with pytest.raises(ValueError, match="weight by name"):
            ReplayedLoss(*given)


# --- a Trainer's own state ---------------------------------------------------------------------------------------


class Meter:
    def __init__(self):
        self.total, self.values = 0.0, []

    def update(self, value):
        self.total += value
        self.values.append(value)


class Watcher(TrainerCallback):
    count = 0


class Criterion(nn.Module):
    """Outside of the model; the loss depends on what it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(()))

    def forward(self, loss):
        self.center = 0.9 * self.center + 0.1 * loss.detach()
        return loss - 0.1 * self.center


class Counting(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums, self.array, self.window = {"n": torch.tensor(0)}, np.zeros(2), collections.deque(maxlen=3)
        self.seen, self.meter, self.long = collections.Counter(), Meter(), list(range(5000))
        self.watcher = Watcher()
        self.nested, self.best, self.criterion = {"a": [{"b": torch.zeros(1)}]}, None, Criterion()
        self.stream = np.random.default_rng(3)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss = self.criterion(model(**inputs)["loss"]) * (1 + self.stream.random() / 10)
        value = float(loss.detach())
        self.sums["n"] += len(labels)
        self.array[0] += len(labels)
        self.window.append(len(labels))
        self.watcher.count += 1
        self.seen.update(labels.tolist())
        self.meter.update(len(labels))
        self.long.append(len(labels))
        self.nested["a"][0]["b"].add_(1)
        self.best = value if self.best is None else min(self.best, value)
        self.state.log_history.append({"mine": 1})
        self.log({"ce": value})
        return loss


class CountingLQA(hf_lqa.LQATrainerMixin, Counting):
    pass


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(60, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels):
        return {"loss": F.cross_entropy(self.head(self.norm(self.embed(input_ids).mean(1))), labels)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainers_own_state(accumulation, tmp_path):
    found = []
    for kind, optim in ((CountingLQA, "lqa"), (Counting, "adamw_torch")):
        options = {"optim": optim, "gradient_accumulation_steps": accumulation, "max_steps": 12}
        options |= {"optim_args": "probe_interval=3"} if optim == "lqa" else {}
        trainer = kind(Classifier(), arguments(tmp_path, **options), train_dataset=rows())
        if optim == "lqa":
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                trainer.train()
            assert trainer.lqa.counts["probe_forwards"] >= 8 and trainer.lqa.counts["not_replayable"] == 0
        else:
            trainer.train()
        logs = trainer.state.log_history
        found.append(
            [
                int(trainer.sums["n"]),
                trainer.array.tolist(),
                list(trainer.window),
                trainer.watcher.count,
                dict(trainer.seen),
                trainer.meter.total,
                len(trainer.meter.values),
                len(trainer.long),
                trainer.nested,
                sum("ce" in entry for entry in logs),
                sum("mine" in entry for entry in logs),
                trainer.stream.random(),
                int(trainer.model.norm.num_batches_tracked),
            ]
        )
    assert found[0] == found[1]


PROBED_OFTEN = {"max_steps": 6, "optim_args": "probe_interval=2"}


def test_nothing_is_logged_by_probes_also_where_log_is_overridden(tmp_path):
    calls = []

    class Loud(CountingLQA):
        def log(self, logs, *args, **kwargs):
            calls.append(dict(logs))
            super().log(logs, *args, **kwargs)

    trainer = Loud(Classifier(), arguments(tmp_path, **PROBED_OFTEN), train_dataset=rows())
    trainer.train()
    assert trainer.lqa.counts["probe_forwards"] >= 6 and sum("ce" in logs for logs in calls) == 6


def test_a_criterion_that_compute_loss_func_holds(tmp_path):
    criterion = Criterion()

    def mine(outputs, labels, num_items_in_batch=None):
        return criterion(outputs["loss"])

    class WithLabels(Classifier):
        def forward(self, input_ids, labels=None):
            logits = self.head(self.norm(self.embed(input_ids).mean(1)))
            return {"loss": logits.square().mean(), "logits": logits}

    args = arguments(tmp_path, **PROBED_OFTEN)
    trainer = hf_lqa.LQATrainer(WithLabels(), args, train_dataset=rows(), compute_loss_func=mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.lqa.counts["replays_checked"] == 1 and trainer.lqa.counts["not_replayable"] == 0
    assert 0 < float(criterion.center)


def test_a_trainer_whose_loss_cannot_be_replayed_goes_on_and_says_so_in_its_log(tmp_path):
    class Draws(hf_lqa.LQATrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs, **kwargs) * (1 + next(self.more))

    trainer = Draws(Classifier(), arguments(tmp_path, **{**PROBED_OFTEN, "max_steps": 12}), train_dataset=rows())
    trainer.more = (i / 100 for i in itertools.count())
    with pytest.warns(UserWarning, match=r"Draws\.more"):
        trainer.train()
    assert trainer.lqa.counts["probe_forwards"] == 0 and logged(trainer, "lqa_rejected")[-1] > 0
    assert all(rate > 0 for rate in logged(trainer, "learning_rate")[:-1])
    assert next(trainer.more) == 12 / 100


# --- several processes -------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compute", [penalised, lambda model, x, y: model(x, y)["loss"]], ids=["penalty", "plain"])
def test_replays_under_ddp_leave_its_reducer_alone(compute, one_process):
    """Also those with autograd on; and buffers are broadcast at the next forward as they would be without a probe."""

    class Normed(Plain):
        def setup(self):
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x, labels):
            return super().forward(self.norm(x), labels)

    found = []
    for probed in (True, False):
        model = nn.parallel.DistributedDataParallel(Normed())
        for x, y in batches(3):
            model.zero_grad()
            closure = ReplayedLoss(model)
            closure.record(compute, model, x, y).backward()
            if probed:
                assert torch.equal(closure(), closure.loss) and closure.with_grad == (compute is penalised)
            assert model.require_forward_param_sync
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
