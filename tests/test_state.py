"""State that a forward keeps: a replay starts from what the training forward started from, and leaves no trace."""

import collections
import copy
import functools
import itertools
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import arguments, logged, rows
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

import hf_lqa
from hf_lqa import LQA, ReplayedLoss, Verdict, state

STEPS = 5
DRAWN = collections.Counter()
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


class InputEdited(Net):
    def forward(self, x, labels):
        x.data.mul_(1 + x.mean())
        return super().forward(x, labels)

    def keep(self, hidden, x):
        return hidden.square().mean()


KINDS = [cls for cls in list(vars().values()) if isinstance(cls, type) and issubclass(cls, Net) and cls not in (Net, Noise)]


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        yield x, (x[:, 0] > 0).long()


def trained(make, rates=None, micro_batches=1, policy="cross_batch"):
    """(model, LQA, pairs of recorded and replayed losses, step sizes); with `rates`, by a plain optimizer at those."""
    ClassCounter.calls = 0
    STREAM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    torch.manual_seed(0)
    model, pairs, used = make(), [], []
    base = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "teacher" not in n], lr=1.0)
    lqa = LQA(base, policy, probe_interval=1) if rates is None else None
    for step, (x, y) in enumerate(batches()):
        base.zero_grad()
        closure = ReplayedLoss(model, weight=1 / micro_batches)
        for part, labels in zip(x.clone().chunk(micro_batches), y.chunk(micro_batches), strict=True):
            forward = closure.record if lqa else lambda compute, *args: compute(*args)
            loss = forward(lambda *args: model(*args)["loss"], part.clone(), labels)
            (loss / micro_batches).backward()
        if lqa is None:
            base.param_groups[0]["lr"] = rates[step]
            base.step()
            continue
        if closure.complete and not closure.obstacle:
            pairs.append((closure.loss, closure()))
        lqa.step(closure)
        used.append(lqa.step_size)
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
