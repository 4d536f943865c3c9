import copy
import functools
import re

import pytest
import torch
from torch import nn

from hf_lqa import LQA, ReplayedLoss, Verdict, slopes
from hf_lqa.checkpoint import BEGINNING_KEY
from hf_lqa.quadratic import rejected
from hf_lqa.rule.prior import PriorConfig, base_step_size

DOUBLE = torch.float64


class Quadratic:
    """``1/2 (w - target)' H (w - target) + 1`` in float64, its exact line minimiser known."""

    def __init__(self, size=6):
        a = torch.randn(size, size, dtype=DOUBLE)
        self.hessian = a @ a.T + torch.eye(size, dtype=DOUBLE)
        self.target = torch.randn(size, dtype=DOUBLE)
        self.w = nn.Parameter(10 * torch.randn(size, dtype=DOUBLE))

    def __call__(self):
        r = self.w - self.target
        return 0.5 * r @ self.hessian @ r + 1

    def line_minimiser(self, start, direction):
        gradient = self.hessian @ (start - self.target)
        return float(-(gradient @ direction) / (direction @ self.hessian @ direction))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_paper_step_lands_on_the_exact_line_minimiser(base):
    loss = Quadratic()
    optimizer = LQA(base([loss.w], lr=1.0), rule="paper")
    for _ in range(5):
        start = loss.w.detach().clone()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(loss)
        direction = (loss.w.detach() - start) / optimizer.step_size
        assert optimizer.last_probe.fit.verdict is Verdict.ACCEPTED
        assert optimizer.step_size == pytest.approx(loss.line_minimiser(start, direction), rel=1e-9)


def test_with_plain_sgd_it_is_the_paper():
    # A twin written from the paper: delta* = a / 2b along -g, from L(theta), L(theta - h g), L(theta + h g).
    loss, twin = Quadratic(), None
    twin = copy.deepcopy(loss)
    optimizer = LQA(torch.optim.SGD([loss.w], lr=1.0), rule="paper", probe_radius=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(loss)

        (g,) = torch.autograd.grad(twin(), twin.w)
        with torch.no_grad():
            w, h = twin.w.clone(), 1e-3
            values = {}
            for sign in (-1, 0, 1):
                twin.w.copy_(w - sign * h * g)
                values[sign] = float(twin())
            a = (values[-1] - values[1]) / (2 * h)
            b = (values[1] + values[-1] - 2 * values[0]) / (2 * h * h)
            twin.w.copy_(w - a / (2 * b) * g)
        # The rounding errors of second differences at h = 1e-3 are about 1e-8 of the curvature.
        assert torch.allclose(loss.w, twin.w, rtol=1e-6, atol=1e-8)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.1), nn.ReLU(), nn.Linear(12, 2))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        yield x, (x[:, 0] > 0).long()


def train(model, optimizer, data):
    for x, y in data:
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step(closure)


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1.0, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True, amsgrad=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1.0), foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1.0, centered=True),
}


@pytest.mark.parametrize("name", BASES)
def test_a_probe_leaves_no_trace_in_the_base_optimizer(name):
    """Every step is the base's own, at the rates that were measured: a twin given them ends bit for bit the same."""
    model, twin = net(), net()
    optimizer = LQA(BASES[name](model.parameters()), probe_interval=2)
    base = BASES[name]([{"params": [p]} for p in twin.parameters()])
    torch.manual_seed(0)
    for x, y in batches(40):
        state = torch.get_rng_state()
        train(model, optimizer, [(x, y)])
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        base.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        for group, rate in zip(base.param_groups, optimizer.multipliers or [1.0] * 6, strict=True):
            group["lr"] = (group["lr"] * 0 + optimizer.step_size) * rate
        base.step()
        assert torch.equal(torch.get_rng_state(), after)
    assert optimizer.counts["probe_forwards"] >= 20 and len(set(optimizer.multipliers)) > 1
    assert len(optimizer.param_groups) == 1 and float(optimizer.param_groups[0]["lr"]) == 1
    for (key, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        pairs = zip(optimizer.state[p].values(), base.state[q].values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_a_replay_at_the_origin_is_the_training_loss_bit_for_bit():
    model = net()
    for x, y in batches(5):
        closure = ReplayedLoss(model)
        loss = closure.record(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        buffers = copy.deepcopy(dict(model.named_buffers()))
        rng = torch.get_rng_state()
        assert torch.equal(closure(), loss.detach())
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_steps_without_a_probe_are_the_base_optimizers():
    """No copy, no extra pass: with a huge interval only the first step calls the closure; weights are the base's."""
    model, twin = net(), net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), rule="paper", probe_interval=10**9)
    torch.manual_seed(0)
    train(model, optimizer, batches(100))
    assert optimizer.counts["probe_forwards"] == 2
    rate = optimizer.step_size
    torch.manual_seed(0)
    base = torch.optim.AdamW(twin.parameters(), lr=rate)
    for x, y in batches(100):
        base.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        base.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_groups_keep_their_ratios_and_schedulers_compose():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].parameters(), "lr": 0.25}]
    optimizer = LQA(torch.optim.SGD(groups, lr=1.0), rule="paper", probe_interval=1000)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    x, level = torch.randn(8, 4), None
    for step in range(10):
        before = [p.detach().clone() for p in model.parameters()]
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda: (model(x) ** 2).mean()).backward()
        optimizer.step(closure)
        level = level or optimizer.step_size
        assert optimizer.step_size == pytest.approx(level * (1 - step / 10))
        for p, old, multiplier in zip(model.parameters(), before, [1, 1, 0.25, 0.25], strict=True):
            assert torch.allclose(p, old - multiplier * optimizer.step_size * p.grad, rtol=1e-4, atol=1e-7)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1 - step / 10, 0.25 * (1 - step / 10)])
        scheduler.step()


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_a_head_moves_further_from_the_first_step_on(base):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    model[0].bias.requires_grad_(False)
    optimizer = LQA(base(model.parameters(), lr=1.0), probe_interval=10**9)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, [(torch.randn(8, 64), torch.tensor([0, 1] * 4))])
    assert optimizer.multipliers == [1, 1, 8, 8]
    assert torch.equal(model[0].bias, before[1])
    for p, old, multiplier in zip(model.parameters(), before, optimizer.multipliers, strict=True):
        if p.grad is not None:
            unit = p.grad.abs().max() if base is torch.optim.SGD else 1.0
            moved = float((p.detach() - old).abs().max() / unit)
            assert moved == pytest.approx(multiplier * optimizer.step_size, rel=0.01), "but for weight decay"


class Adapted(nn.Module):
    """Three frozen layers with adapters, and a fresh head; on features as large as a decoder's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(64, 4, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(4, 64, bias=False) for _ in range(3))
        self.head = nn.Linear(64, 2)
        nn.init.normal_(self.head.weight, std=1e-3)

    def forward(self, x):
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            x = x + layer(x) + up(down(x))
        return self.head(2 * x)


@pytest.mark.parametrize("added", [0.0, 1e3])
@pytest.mark.parametrize("base", [torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_a_head_beside_adapters_begins_no_faster_than_the_loss_can_fall(base, added):
    model = Adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = LQA(base(trained, lr=1.0), total_steps=100)
    x, labels = torch.randn(8, 64), torch.tensor([0, 1] * 4)

    def closure():
        return nn.functional.cross_entropy(model(x), labels) + added

    loss = closure()
    loss.backward()
    optimizer.step(closure)
    head = optimizer.multipliers[-1]
    assert optimizer.multipliers == [*6 * [1], head, head]
    if added:
        assert head == 8, "what was added says how far the loss may fall"
        return
    sgd = base is not torch.optim.AdamW
    # By the gradients, at the multipliers that the probe was taken with.
    promised = sum(
        first * float((p.grad * (p.grad if sgd else p.grad.sign())).sum())
        for first, p in zip([*6 * [1], 8, 8], trained, strict=True)
    )
    begun = optimizer.base_step_size * (10 if sgd else 1)
    assert 1 < head < 8
    assert head == pytest.approx(8 * 2 * loss.item() / (begun * promised), rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_without_a_closure_shapes_say_how_far_a_step_moves_an_element(base, scale):
    """Whatever the gradients' scale; of the elements that move at all."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    optimizer = LQA(base(model.parameters(), lr=1.0, weight_decay=0.0), total_steps=200)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(8, 64)
    x[:, ::2] = 0
    (scale * (model(x) ** 2).mean()).backward()
    assert optimizer.step() is None
    prior = base_step_size([p.shape for p in model.parameters()], 200, PriorConfig())
    ramp = optimizer.step_size / optimizer.base_step_size
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert float(moved.square().sum() / moved.abs().sum()) == pytest.approx(ramp * prior, rel=0.01)
    assert ramp == pytest.approx(1 / 6), "3 % of the run"
    assert optimizer.last_probe is None and optimizer.counts["probe_forwards"] == 0


def test_elements_that_hardly_move_do_not_lengthen_the_start():
    """Weight decay alone, and gradients as small as AdamW's epsilon."""
    found = []
    for decay, small in ((0.0, 0.0), (0.01, 0.0), (0.0, 1e-12)):
        w = nn.Parameter(torch.full((1000,), 0.05))
        optimizer = LQA(torch.optim.AdamW([w], lr=1.0, weight_decay=decay))
        w.grad = torch.full((1000,), small)
        w.grad[:10] = 1.0
        optimizer.step()
        found.append(optimizer.base_step_size)
    assert found == pytest.approx([found[0]] * 3, rel=0.06), "root mean squares would give 10 times the first"


MOMENTUM = [
    (torch.optim.SGD, {"momentum": 0.9}, 10),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, 5),
    (torch.optim.SGD, {"momentum": 0.5, "nesterov": True}, 4 / 3),
    (torch.optim.RMSprop, {"momentum": 0.8}, 5),
]


@pytest.mark.parametrize(("base", "options", "times"), MOMENTUM)
def test_a_start_is_as_much_shorter_as_momentum_lengthens_later_steps(base, options, times):
    def begun(**options):
        w = nn.Parameter(torch.ones(3, 4))
        optimizer = LQA(base([w], lr=1.0, **options))
        w.grad = torch.full((3, 4), 2.0)
        optimizer.step()
        return optimizer.base_step_size

    w = nn.Parameter(torch.zeros(1))
    optimizer = base([w], lr=1.0, **{**options, **({"alpha": 0.0} if base is torch.optim.RMSprop else {})})
    moves = []
    for _ in range(200):
        w.grad = torch.ones(1)
        before = float(w.detach())
        optimizer.step()
        moves.append(before - float(w.detach()))
    assert moves[-1] / moves[0] == pytest.approx(times, rel=1e-3), "the premise"
    first = (1 + options["momentum"]) if options.get("nesterov") else 1.0
    assert begun() / begun(**options) == pytest.approx(times * first, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_without_a_closure_the_first_gradient_that_says_something_is_waited_for(base, decay):
    w = nn.Parameter(torch.ones(3))
    optimizer = LQA(base([w], lr=1.0, weight_decay=decay))
    w.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(w, torch.ones(3)) and optimizer.base_step_size is None and optimizer.step_size == 0
    w.grad = 1e6 * torch.ones(3)
    optimizer.step()
    prior = base_step_size([w.shape], None, PriorConfig())
    assert optimizer.step_size * (1e6 if base is torch.optim.SGD else 1) < prior
    assert (w < 1).all()


def test_warmup_from_zero_moves_nothing_and_measures_nothing():
    model = net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1))
    before = copy.deepcopy(list(model.parameters()))
    train(model, optimizer, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert optimizer.counts["probe_forwards"] == 0
    scheduler.step()
    train(model, optimizer, batches(1))
    assert optimizer.counts["probe_forwards"] == 2
    assert optimizer.step_size > 0


@pytest.mark.parametrize("rule", ["displacement", "displacement, sampled", "paper"])
@pytest.mark.parametrize("stop", [0, 1, 3, 16, 17, 30])
def test_resuming_from_the_state_dict_changes_nothing(rule, stop, tmp_path, monkeypatch):
    """Between probes and at one, and on both sides of where the rule begins to measure every second step only."""
    rule, _, cut = rule.partition(",")
    if cut:
        monkeypatch.setattr(slopes, "MANY_ROWS", 8)
        monkeypatch.setattr(slopes, "LARGE", 1)
    data = list(batches(40))
    model = net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), rule, probe_interval=3)
    train(model, optimizer, data[:stop])
    state = optimizer.state_dict()
    if rule == "displacement" and stop:
        kept = state["state"][0][BEGINNING_KEY]
        assert (kept.shape == next(model.parameters()).shape) == (not cut)
    torch.save((model.state_dict(), state, torch.get_rng_state()), tmp_path / "checkpoint.pt")
    train(model, optimizer, data[stop:])

    resumed = net()
    again = LQA(torch.optim.AdamW(resumed.parameters(), lr=1.0), rule, probe_interval=3)
    # weights_only: nothing but plain values may be in a state_dict.
    model_state, optimizer_state, rng = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    torch.set_rng_state(rng)
    train(resumed, again, data[stop:])
    for name in ("step_size", "base_step_size", "multipliers", "counts", "last_probe", "last_measurement"):
        assert getattr(again, name) == getattr(optimizer, name), name
    assert (again.last_measurement is None) == (rule == "paper")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_it_is_an_optimizer_that_can_be_copied():
    model = net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0))
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, batches(3))
    copied = copy.deepcopy(optimizer)
    assert copied.step_size == optimizer.step_size
    assert copied.param_groups[0] is copied.base.param_groups[0]
    assert "AdamW" in repr(optimizer)


def test_a_gradient_that_is_not_finite_is_not_applied():
    model = net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), probe_interval=1)
    train(model, optimizer, batches(3))
    before, state = copy.deepcopy(list(model.parameters())), copy.deepcopy(optimizer.base.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(lambda: torch.tensor(torch.nan))
    assert optimizer.counts["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for index, values in optimizer.base.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][index][k]) for k, v in values.items())
    train(model, optimizer, batches(3))
    assert all(p.isfinite().all() for p in model.parameters())


def test_zero_gradients_are_a_verdict():
    w = nn.Parameter(torch.ones(3))
    optimizer = LQA(torch.optim.SGD([w], lr=1.0))
    w.grad = torch.zeros(3)
    optimizer.step(lambda: torch.tensor(1.0))
    assert optimizer.last_probe.fit.verdict is Verdict.NON_DESCENT
    assert torch.equal(w, torch.ones(3))
    # The first gradient that says something is used.
    w.grad = torch.ones(3)
    optimizer.step(lambda: (w.detach() ** 2).sum())
    assert optimizer.step_size > 0
    assert (w < 1).all()


def test_an_infinite_probe_loss_keeps_the_last_step_size():
    model = net()
    optimizer = LQA(torch.optim.AdamW(model.parameters(), lr=1.0), rule="paper")
    train(model, optimizer, batches(2))
    level = optimizer.step_size
    closure = ReplayedLoss(model)
    x, y = next(batches(1))
    optimizer.zero_grad()
    loss = closure.record(lambda: nn.functional.cross_entropy(model(x), y))
    loss.backward()
    infinite = lambda: torch.tensor(torch.inf)  # noqa: E731
    infinite.loss = loss.detach()
    optimizer.step(infinite)
    assert optimizer.last_probe.fit.verdict is Verdict.NON_FINITE
    assert (optimizer.step_size, rejected(optimizer.counts)) == (level, 1)


def test_errors_name_what_is_wrong():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="rule='exact'"):
        LQA(torch.optim.SGD([w], lr=1.0), rule="exact")
    with pytest.raises(ValueError, match=r"warmup=3: the rule 'displacement' has no such option; tau, probe_interval"):
        LQA(torch.optim.SGD([w], lr=1.0), warmup=3)
    with pytest.raises(ValueError, match="tau=2"):
        LQA(torch.optim.SGD([w], lr=1.0), tau=2)
    with pytest.raises(ValueError, match="probe_interval=0"):
        LQA(torch.optim.SGD([w], lr=1.0), rule="paper", probe_interval=0)
    with pytest.raises(ValueError, match="LBFGS"):
        LQA(torch.optim.LBFGS([w]))
    with pytest.raises(ValueError, match="frozen"):
        LQA(torch.optim.SGD([{"params": []}], lr=1.0))
    with pytest.warns(UserWarning, match=r"lr=1\.0"):
        LQA(torch.optim.AdamW([w]))
    optimizer = LQA(torch.optim.SGD([w], lr=1.0), "paper")
    w.grad = torch.ones(3)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD([w], lr=1.0).state_dict())
    with pytest.raises(ValueError, match="shape"):
        ReplayedLoss(net()).record(lambda: torch.ones(2))
    with pytest.raises(ValueError, match="before anything was recorded"):
        ReplayedLoss(net())()


def trained(plan=None, **planned):
    torch.manual_seed(0)
    loss = Quadratic()
    optimizer = LQA(torch.optim.AdamW([loss.w], lr=1.0), **planned)
    if plan is not None:
        optimizer.plan(plan)
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(loss)
    return loss.w.detach()


def test_the_steps_of_training_can_be_given_when_it_is_built_or_afterwards():
    given = trained(total_steps=40)
    assert torch.equal(given, trained(plan=40))
    assert not torch.equal(given, trained(total_steps=1000))
    assert torch.equal(trained(), trained(total_steps=1000)), "what a run is taken for whose end nobody says"


@pytest.mark.parametrize("rule", ["displacement", "paper"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "100", True, float("nan")])
def test_steps_out_of_range_are_named(rule, value):
    base = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    for give in (lambda: LQA(base, rule, total_steps=value), lambda: LQA(base, rule).plan(value)):
        with pytest.raises(ValueError, match=rf"^total_steps={re.escape(repr(value))}: must be"):
            give()
