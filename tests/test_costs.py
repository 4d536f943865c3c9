"""What steps launch on an accelerator and what they wait for, counted on tensors that only claim to be on one."""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lqa import LQA, groups, slopes
from hf_lqa.direction import Direction
from hf_lqa.groups import Division, rescaled
from hf_lqa.rule.multipliers import MultiplierConfig, Multipliers, rounded

#: What only looks at a tensor, or finds memory for one.
NO_LAUNCH = {
    *("detach", "view", "as_strided", "slice", "split", "unbind", "select", "alias", "reshape", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "device", "_record_function_enter_new", "_record_function_exit"),
}


class Dispatched(TorchDispatchMode):
    """Counts operations on tensors that are not on the CPU: those that launch, and those that wait for a result."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        on_accelerator = [t.device.type != "cpu" for t in tensors]
        if name == "_local_scalar_dense" or (name in ("_to_copy", "copy_") and len({*on_accelerator}) == 2):
            self.waits += any(on_accelerator)
        elif name not in NO_LAUNCH and any(on_accelerator):
            self.launches[name] += 1
        return found


@dataclasses.dataclass
class Read:
    """What a fake tensor has no numbers for: a mean over ranks that can be read, and counts how often it was."""

    reads: int = 0

    def __call__(self, scalars):
        self.count = scalars.numel()
        return self

    def tolist(self):
        self.reads += 1
        if self.count == 2:  # the losses behind and ahead, on the line through the first two of the others
            return [0.515, 0.485]
        # Of a first probe the last two are the direction's square and its number of elements.
        return [0.5, *(4.0 if i >= self.count - 2 else -2.0 - i % 7 for i in range(1, self.count))]


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(Direction, "_scale", lambda self: 1.0)  # read of the weights, under weight decay
    # A build without CUDA has no brackets for such tensors.
    monkeypatch.setattr(slopes, "sample", lambda t: torch.ops.aten.slice.Tensor(t, 0, 0, t.shape[0], slopes.EVERY))
    with FakeTensorMode(), torch.no_grad():
        yield


def counted(step, read=None):
    before = read.reads if read is not None else 0
    with Dispatched() as dispatched:
        step()
    return dispatched.launches, dispatched.waits + (read.reads - before if read is not None else 0)


def parameters(depth, dtype=torch.float32, size=(16, 8)):
    """A matrix and a vector for each layer."""
    return [torch.empty(shape, device="cuda", dtype=dtype) for shape in [size, size[:1]] * depth]


def matrices(depth, dtype, size):
    return parameters(depth, dtype, size)[::2]


def adamw(params, kind="fused", decay=(0.0,), lr=1.0):
    every = [{"params": params[i :: len(decay)], "weight_decay": d} for i, d in enumerate(decay)]
    base = torch.optim.AdamW(every, lr=lr, **{kind: True})
    for p in params:
        p.grad = torch.empty_like(p)
    return base


class Closure:
    relative_noise = 0.0

    def __init__(self):
        self.loss = torch.empty((), device="cuda")

    def __call__(self):
        return torch.empty((), device="cuda")


def with_lqa(params, kind="fused", decay=(0.0,), **options):
    """LQA, what reads for it, and a step of it as the Trainer makes one."""
    lqa, read = LQA(adamw(params, kind, decay), **options), Read()
    lqa.measurer.reduce = read
    # A probe was compared with training's loss, or the first one takes more.
    lqa.counts["replays_checked"] = 1

    def step():
        lqa.observe_clipping(torch.empty((), device="cuda"), 1.0, whole=True)
        lqa.step(Closure())

    return lqa, read, step


def base_step(params, kind="fused", decay=(0.0,)):
    base = adamw(params, kind, decay)
    base.step()
    return counted(base.step)


#: Base optimizers: implementation, and weight decay of each param group.
BASES = [("fused", (0.0,)), ("foreach", (0.0,)), ("fused", (0.1, 0.0)), ("foreach", (0.1, 0.0))]


@pytest.mark.parametrize("kind, decay", BASES)
def test_an_ordinary_step_dispatches_what_the_base_dispatches_and_waits_for_the_norm_alone(kind, decay, on_cuda):
    _, read, step = with_lqa(parameters(20), kind, decay, rule="paper", probe_interval=100)
    step()
    expected = base_step(parameters(20), kind, decay)
    launches, waits = counted(step, read)
    # The norm, which must be finite, as a number of double precision.
    assert launches - expected[0] == Counter({"_to_copy": 1}), (launches, expected)
    assert (waits, expected[1]) == (1, 0)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("decay", [(0.0,), (0.0, 0.0), (0.1, 0.0)])
def test_different_rates_multiply_launches_by_their_number_at_most(kind, decay, on_cuda):
    lqa, read, step = with_lqa(parameters(12), kind, decay)
    lqa.rule.wants_measurement = lambda step: False
    step()
    lqa.rule.state = Multipliers.started([2.0 ** (i % 5 / 2 - 1) for i in range(24)])
    step()
    assert len({*lqa.multipliers}) == 5 and not lqa.wants_probe
    launches, waits = counted(step, read)
    # Param groups of the same options are divided as one.
    one, _ = base_step(parameters(12), kind, tuple(dict.fromkeys(decay)))
    assert launches - Counter({name: 5 * count for name, count in one.items()}) == Counter({"_to_copy": 1})
    assert waits == 1


def test_multipliers_are_of_five_values_at_most_and_of_ten_with_a_head():
    generator, bound = random.Random(0), math.log(MultiplierConfig.bound)
    drift = tuple(generator.uniform(-bound, bound) for _ in range(500))
    for head, most in ((1.0, 5), (8.0, 10)):
        state = Multipliers((1.0,) * 250 + (head,) * 250, drift, (0.0,) * 500)
        assert len({*rounded(state, 500, MultiplierConfig())}) == most


def launches_of(depth, kind, dtype=torch.float32, size=(16, 8)):
    """Launches beyond the base's, and waits, of a measured or a probe step of a model so deep."""
    options = {"rule": "paper", "probe_interval": 1} if kind == "probe" else {}
    lqa, read, step = with_lqa(matrices(depth, dtype, size), **options)
    # One rate: launches for several are counted elsewhere.
    lqa.rule.multipliers = lambda count: []
    for _ in range(3):
        step()
    assert lqa.wants_probe == (kind == "probe") and lqa.rule.wants_measurement(3) == (kind == "measured")
    launches, waits = counted(step, read)
    return sum((launches - base_step(matrices(depth, dtype, size))[0]).values()), waits


#: In half precision products are taken of copies in float32.
LAUNCHES = [
    *[("measured", torch.float32, 26), ("measured", torch.bfloat16, 29)],
    *[("probe", torch.float32, 28), ("probe", torch.bfloat16, 30)],
]


@pytest.mark.parametrize("kind, dtype, most", LAUNCHES)
def test_launches_of_a_measured_and_a_probe_step_do_not_grow_with_the_model(kind, dtype, most, on_cuda):
    found = {depth: launches_of(depth, kind, dtype) for depth in (33, 40)}
    assert found[33] == found[40] and found[40][0] <= most, found
    assert found[40][1] == (3 if kind == "probe" else 1)


@pytest.mark.parametrize("rule", ["displacement", "paper"])
def test_a_first_probe_waits_as_often_as_any_other(rule, on_cuda):
    lqa, read, step = with_lqa(parameters(20), rule=rule, probe_interval=1)
    found = [counted(step, read)[1] for _ in range(3)]
    assert found == [3, 3, 3] and lqa.counts["probe_forwards"] == 6


def test_a_model_on_several_devices_is_measured_as_one(on_cuda):
    shapes = [(64, 64), (64,), (8, 64), (8,)]
    params = [torch.empty(shape, device=f"cuda:{i // 2}", requires_grad=True) for i, shape in enumerate(shapes)]
    lqa, _, step = with_lqa(params)
    for _ in range(3):
        step()
    assert len({*lqa.multipliers}) > 1 and lqa.last_measurement is not None and lqa.counts["probe_forwards"] == 2


def test_launches_do_not_grow_with_the_matrices_either(on_cuda):
    # All are larger than a piece, and of each a sample is observed.
    found = [launches_of(33, "measured", size=size)[0] for size in ((2048, 4096), (8192, 8192))]
    assert found[0] == found[1] <= 87, found


def test_parameters_are_divided_by_rate_only_where_something_has_changed(monkeypatch):
    calls = []
    divided = groups.divided
    monkeypatch.setattr(groups, "divided", lambda *args: calls.append(1) or divided(*args))
    params = [nn.Parameter(torch.ones(3)) for _ in range(6)]
    base = torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=1.0, weight_decay=0.0)
    division, rates = Division(), [1.0, 2.0] * 3

    def parts(rates=rates):
        calls.clear()
        with rescaled(base, 0.5, list(rates), division):
            found = {(group["lr"], tuple(map(id, group["params"]))) for group in base.param_groups}
        assert [len(group["params"]) for group in base.param_groups[:2]] == [3, 3]
        return found, len(calls)

    one, two = tuple(map(id, params[0::2])), tuple(map(id, params[1::2]))
    assert parts() == ({(0.5, one), (1.0, two)}, 1)
    for group in base.param_groups:  # as a scheduler does
        group["lr"] = 0.1
    assert parts() == ({(0.05, one), (0.1, two)}, 0)
    assert parts([2.0, 1.0] * 3) == ({(0.05, two), (0.1, one)}, 1)
    base.param_groups[1]["lr"] = 0.2  # no longer the same options
    assert parts()[1] == 1 and len(parts()[0]) == 4
    base.param_groups[1]["lr"] = torch.tensor(0.1)  # whose comparison would wait
    assert parts()[1] == 0
    base.param_groups[1]["lr"] = 0.1
    assert len(parts()[0]) == 2
    kept = base.param_groups[0]["params"].pop()  # in place
    base.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    found, count = parts()
    assert count == 1 and all(id(kept) not in ids for _, ids in found)
    base.add_param_group({"params": [kept], "weight_decay": 0.1})
    assert len(parts([*rates, 1.0])[0]) == 3


def test_groups_of_an_optimizer_that_may_know_them_stay_apart():
    class Counting(torch.optim.SGD):
        """Counts its steps in its groups, as schedule-free optimizers do."""

        def step(self):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    base = Counting([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(3))]}], lr=1.0)
    division = Division()
    for _ in range(3):
        with rescaled(base, 0.5, [], division):
            assert len(base.param_groups) == 2
            base.step()
    assert [group["k"] for group in base.param_groups] == [3, 3]
