"""Loops in plain PyTorch: what they may do between backward and step, and how they may call it."""

import copy
import gc
import json
import math
import warnings

import pytest
import torch
from common import assert_same_weights, rows, tiny_bert, trained, weights
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import hf_lqa.optimizer
from hf_lqa import LQA, ReplayedLoss
from hf_lqa.checkpoint import GROUP_KEY
from hf_lqa.rule.radius import RadiusConfig

BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1.0),
}


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Dropout(dropout)] if dropout else [nn.Linear(12, 32)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(32, 3))


def batches(count, seed=1, classes=3):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(12, classes, generator=generator)
    for _ in range(count):
        x = torch.randn(32, 12, generator=generator)
        yield x, (x @ w).argmax(1)


def looped(
    clip=lambda params, optimizer: None,
    steps=12,
    scale=1.0,
    base="adamw",
    rule="displacement",
    model=None,
    optimizer=None,
    data=None,
    scaler=None,
    schedule=None,
    **options,
):
    """README's loop with `clip` between backward and step: (model, optimizer, the step sizes, the last loss)."""
    model = network() if model is None else model
    optimizer = LQA(BASES[base](model.parameters()), rule, **options) if optimizer is None else optimizer
    schedule = schedule(optimizer) if schedule else None
    sizes, loss = [], None
    for x, y in data or batches(steps):
        closure = ReplayedLoss(model)
        loss = closure.record(lambda x=x, y=y: scale * functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        clip(list(model.parameters()), optimizer)
        optimizer.arm(closure)
        scaler.step(optimizer) if scaler else optimizer.step()
        scaler and scaler.update()
        schedule and schedule.step()
        sizes.append(optimizer.step_size)
    return model, optimizer, sizes, float(loss)


def to_norm(limit):
    return lambda params, optimizer: clip_grad_norm_(params, limit)


def told(limit):
    return lambda params, optimizer: optimizer.observe_clipping(clip_grad_norm_(params, limit), limit)


def by_new_tensors(params, optimizer):
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    for p in params:
        p.grad = p.grad * min(1.0, 0.3 / float(norm))


def by_data(params, optimizer):
    for p in params:
        p.grad.data.clamp_(-1e-3, 1e-3)


def each_to_norm(params, optimizer):
    for p in params:
        clip_grad_norm_([p], 0.05)


def adaptively(params, optimizer):
    for p in params:
        limit = 1e-3 * p.norm()
        if p.grad.norm() > limit:
            p.grad.mul_(limit / p.grad.norm())


def to_unit_length(params, optimizer):
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    torch._foreach_div_([p.grad for p in params], norm)


CLIPS = {
    "norm": to_norm(1.0),
    "small norm": to_norm(0.01),
    "values": lambda params, optimizer: clip_grad_value_(params, 1e-3),
    "new tensors": by_new_tensors,
    "data": by_data,
    "each": each_to_norm,
    "adaptively": adaptively,
    "unit length": to_unit_length,
}


def saw_a_change(optimizer):
    """Whether gradients were ever seen to change between backward and step."""
    return json.loads(optimizer.state_dict()["param_groups"][0][GROUP_KEY])["measurer"]["gradients"]["changed"]


def relative_change(probe):
    """Half of what the probe changed the loss by to first order, as a share of it; tau is what it should be."""
    return abs(probe.loss_minus - probe.loss_plus) / 2 / probe.loss_center


@pytest.mark.parametrize("base", ["adamw", "momentum", "sgd"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_loop_that_clips_probes_where_the_loss_changes_by_tau_and_learns_without_telling(name, base):
    _, optimizer, _, _ = looped(CLIPS[name], steps=1, scale=40.0, base=base)
    assert relative_change(optimizer.last_probe) == pytest.approx(RadiusConfig.tau, rel=0.25)
    whole = {"steps": 80, "total_steps": 80, "schedule": lambda o: LambdaLR(o, lambda step: 1 - step / 80)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, loss = looped(CLIPS[name], scale=40.0, base=base, **whole)
    assert loss < 40 * 0.5, "chance is 40 * 1.1"


def test_without_telling_the_slopes_are_those_of_the_told_loop():
    found = []
    for clip in (to_norm(0.7), told(0.7)):
        model = network()
        optimizer = LQA(BASES["adamw"](model.parameters()), probe_interval=4, total_steps=20)
        radii, sizes = [], []
        for batch in batches(20):
            looped(clip, data=[batch], scale=40.0, model=model, optimizer=optimizer)
            radii.append(optimizer.last_probe.radius)
            sizes.append(optimizer.step_size)
        assert len({*radii}) == 5
        found.append((radii, sizes, optimizer.multipliers, optimizer.counts))
    quiet, loud = found
    for a, b in zip(quiet[:3], loud[:3], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert quiet[3] == loud[3]


def test_a_loop_that_clips_some_steps_only():
    def clip(params, optimizer):
        if len(seen) % 3:  # by hand, and only what is too long
            clip_grad_norm_(params, 0.1)
        seen.append(1)

    seen = []
    *_, loss = looped(clip, steps=80, scale=40.0)
    assert loss < 40 * 0.5


@pytest.mark.parametrize("rule", ["displacement", "paper"])
def test_a_loop_that_does_not_clip_is_what_it_was(rule):
    """Looking changes nothing, nor does clipping that is never reached."""
    watched = looped(rule=rule, steps=50, probe_interval=1)
    blind = looped(told(1e6), rule=rule, steps=50, probe_interval=1)
    assert_same_weights(weights(watched[0]), weights(blind[0]))
    assert watched[1].counts == blind[1].counts and not saw_a_change(watched[1])
    unreached = looped(to_norm(1e6), rule=rule, steps=50, probe_interval=1)
    assert unreached[2] == pytest.approx(watched[2], rel=1e-3)


def scaler(start=2.0**14):
    return torch.amp.GradScaler("cpu", init_scale=start, growth_interval=10)


def test_a_loss_scale_is_no_clipping_and_together_with_it_both_are_found():
    plain, scaled = looped(steps=25, probe_interval=4), looped(steps=25, probe_interval=4, scaler=scaler())
    assert_same_weights(weights(plain[0]), weights(scaled[0]))
    assert plain[1].counts == scaled[1].counts
    _, optimizer, *_ = looped(to_norm(1.0), steps=1, scale=40.0, scaler=scaler())
    assert relative_change(optimizer.last_probe) == pytest.approx(0.03, rel=0.5)
    *_, loss = looped(to_norm(1.0), steps=60, scale=40.0, scaler=scaler())
    assert loss < 40 * 0.5


@pytest.mark.parametrize("clip", ["", "norm"])
def test_gradients_that_are_averaged_by_hand(clip):
    """Three micro-batches, `backward` of each, and only then a division by three: the closure is of their mean."""
    model = network()
    optimizer = LQA(BASES["adamw"](model.parameters()))
    for _ in range(2):
        closure = ReplayedLoss(model, weight=1 / 3)
        optimizer.zero_grad()
        for x, y in batches(3):
            closure.record(lambda x=x, y=y: 40 * functional.cross_entropy(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= 3
        if clip:
            clip_grad_norm_(model.parameters(), 0.1)
        first = optimizer.last_probe
        optimizer.step(closure)
    assert relative_change(first) == pytest.approx(0.03, rel=0.4)


@pytest.mark.parametrize("hook", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: g / 100], ids=["clamp", "scale"])
def test_clipping_within_backward_is_told_once_by_name_and_its_first_radius_is_the_losss(hook):
    model = network()
    for p in model.parameters():
        p.register_hook(hook)
    optimizer = LQA(BASES["adamw"](model.parameters()))
    with pytest.warns(UserWarning, match="observe_clipping") as caught:
        *_, loss = looped(model=model, optimizer=optimizer, steps=60)
    assert len(caught) == 1 and loss < 0.7
    model = network()
    for p in model.parameters():
        p.register_hook(hook)
    with pytest.warns(UserWarning, match="observe_clipping"):
        _, optimizer, *_ = looped(model=model, optimizer=LQA(BASES["adamw"](model.parameters())), steps=1)
    assert relative_change(optimizer.last_probe) == pytest.approx(0.03, rel=0.5)


@pytest.mark.parametrize("stop", [1, 6, 8, 30])
def test_a_loop_that_clips_resumes_bit_for_bit(stop, tmp_path):
    data = list(batches(40))
    model, optimizer, *_ = looped(to_norm(0.2), data=data[:stop], scale=40.0, probe_interval=4)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    copied_model, copied = copy.deepcopy((model, optimizer))
    looped(to_norm(0.2), data=data[stop:], scale=40.0, model=model, optimizer=optimizer)
    resumed = network()
    again = LQA(BASES["adamw"](resumed.parameters()), probe_interval=4)
    model_state, optimizer_state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    looped(to_norm(0.2), data=data[stop:], scale=40.0, model=resumed, optimizer=again)
    looped(to_norm(0.2), data=data[stop:], scale=40.0, model=copied_model, optimizer=copied)
    assert_same_weights(weights(model), weights(resumed))
    assert_same_weights(weights(model), weights(copied_model))
    assert optimizer.last_probe == again.last_probe == copied.last_probe
    assert optimizer.last_measurement == again.last_measurement == copied.last_measurement


def test_an_optimizer_that_is_gone_or_told_leaves_no_hooks():
    model, optimizer, *_ = looped(steps=2)
    hooked = lambda: [p for p in model.parameters() if p._post_accumulate_grad_hooks]  # noqa: E731
    assert hooked()
    looped(told(1.0), steps=1, model=model, optimizer=optimizer)
    assert not hooked()
    optimizer = LQA(BASES["adamw"](model.parameters()))
    assert hooked()
    del optimizer
    gc.collect()
    assert not hooked()


def test_clipping_is_found_where_gradients_are_averaged_after_the_backward_pass(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        optimizer = LQA(BASES["adamw"](model.parameters()), probe_interval=3)
        found = looped(to_norm(0.2), model=DistributedDataParallel(model), optimizer=optimizer, scale=40.0)
    finally:
        torch.distributed.destroy_process_group()
    alone = looped(to_norm(0.2), scale=40.0, probe_interval=3)
    assert saw_a_change(found[1]) and found[2] == pytest.approx(alone[2], rel=1e-4)
    assert found[1].last_probe.radius == pytest.approx(alone[1].last_probe.radius, rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_clipping_is_found_under_gradient_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            x = self.layers[0](x)
            return torch.utils.checkpoint.checkpoint(self.layers[1:], x, use_reentrant=reentrant)

    model = Checkpointed()
    optimizer = LQA(BASES["adamw"](model.parameters()), probe_interval=3)
    found = looped(to_norm(0.2), model=model, optimizer=optimizer, scale=40.0)
    alone = looped(to_norm(0.2), scale=40.0, probe_interval=3)
    assert found[2] == pytest.approx(alone[2], rel=1e-4)
    assert found[1].last_probe.radius == pytest.approx(alone[1].last_probe.radius, rel=1e-3)


# --- step(closure) as torch.optim has it -----------------------------------------------------------------------------


def torch_loop(optimizer, model, data, set_to_none=True, returns=lambda loss: loss, clip=None, schedule=None):
    """As https://docs.pytorch.org/docs/stable/optim.html#optimizer-step-closure: what each step returned."""
    found = []
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            if clip is not None:
                clip(list(model.parameters()), optimizer)
            return returns(loss)

        found.append(optimizer.step(closure))
        if schedule is not None:
            schedule.step()
    return found


@pytest.mark.parametrize("rule", ["displacement", "paper"])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_calls_backward_trains_as_the_recorded_loss_does_bit_for_bit(set_to_none, base, rule):
    """Dropout and BatchNorm: the same masks in probes, and statistics of each batch once."""
    data = list(batches(30))
    torch.manual_seed(5)
    torch.rand(1)
    state = torch.get_rng_state()
    model = network(0.3)
    torch.set_rng_state(state)
    recorded, reference, *_ = looped(model=model, base=base, rule=rule, data=data, probe_interval=1)
    after = torch.get_rng_state()
    model = network(0.3)
    optimizer = LQA(BASES[base](model.parameters()), rule, probe_interval=1)
    torch.set_rng_state(state)
    returned = torch_loop(optimizer, model, data, set_to_none)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(weights(recorded), weights(model))
    assert optimizer.counts == reference.counts and optimizer.last_probe == reference.last_probe
    assert all(loss.requires_grad for loss in returned)
    assert rule == "paper" or float(returned[0]) > float(returned[-1])


def test_a_closure_that_calls_backward_leaves_gradients_of_others_alone_in_probes():
    body, head = nn.Linear(12, 8), nn.Linear(8, 3)
    model = nn.Sequential(body, head)
    optimizer = LQA(BASES["adamw"](body.parameters()), "paper")
    others = torch.optim.SGD(head.parameters(), lr=0.1)
    for x, y in batches(4):
        others.zero_grad()
        torch_loop(optimizer, model, [(x, y)])
        before = [p.grad.clone() for p in head.parameters()]
        moved = [p.detach().clone() for p in body.parameters()]
        others.step()
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(moved, body.parameters(), strict=True))
        others.zero_grad()
        assert all(g.abs().sum() > 0 for g in before)
    # Of the last batch once, not once for each evaluation.
    x, y = next(batches(1))
    model.zero_grad()
    gradients = torch.autograd.grad(functional.cross_entropy(model(x), y), list(head.parameters()))
    torch_loop(optimizer, model, [(x, y)])
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, head.parameters(), strict=True))


def test_closures_that_clip_return_numbers_or_meet_schedules():
    model = network()
    optimizer = LQA(BASES["adamw"](model.parameters()))
    schedule = LambdaLR(optimizer, lambda step: min(step / 3, 1))
    returned = torch_loop(
        optimizer, model, batches(80), returns=lambda loss: 1 * loss.item(), clip=to_norm(0.01), schedule=schedule
    )
    assert all(isinstance(loss, float) for loss in returned) and returned[-1] < 0.7 < returned[0]


def test_a_loop_that_clears_gradients_itself_and_leaves_the_rest_to_the_closure():
    model = network()
    optimizer = LQA(BASES["sgd"](model.parameters()))
    losses = []
    for x, y in batches(60):
        optimizer.zero_grad(set_to_none=False)

        def closure(x=x, y=y):
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_closure_that_calls_backward_and_raises_has_changed_nothing(at):
    model = network(0.3)
    optimizer = LQA(BASES["adamw"](model.parameters()), "paper")
    torch_loop(optimizer, model, batches(3))
    before, counts = weights(model), dict(optimizer.counts)
    gradients = [p.grad.clone() for p in model.parameters()]

    def returns(loss):
        # Which call it is the weights say; a counter of the closure's own is put back by each replay.
        moved = sum(float(((p - before[name]) * p.grad).sum()) for name, p in model.named_parameters())
        if at == (1 if moved == 0 else 2 if moved > 0 else 3):
            raise RuntimeError("out of memory")
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        torch_loop(optimizer, model, batches(1), returns=returns)
    assert optimizer.counts == counts
    parameters = {name for name, _ in model.named_parameters()}
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in parameters)
    if at == 1:
        assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    torch_loop(optimizer, model, batches(1))
    assert optimizer.counts["steps"] == 4


def test_what_step_returns_and_says():
    model = network()
    x, y = next(batches(1))
    optimizer = LQA(BASES["adamw"](model.parameters()))
    closure = ReplayedLoss(model)
    loss = closure.record(lambda: functional.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient"):
        assert optimizer.step(closure) is closure.loss
    loss.backward()
    for value in (loss, 3, "loss"):
        with pytest.raises(ValueError, match=r"step\(closure=.*must be callable"):
            optimizer.step(value)
    assert float(optimizer.step(closure)) == float(loss)
    assert optimizer.step() is None
    with pytest.raises(ValueError, match="returned None"):
        LQA(BASES["adamw"](model.parameters())).step(lambda: None)


def test_a_closure_without_backward_is_called_on_probe_steps_alone():
    model = network()
    optimizer = LQA(BASES["adamw"](model.parameters()), probe_interval=10)
    calls, returned = [], []
    for x, y in batches(30):

        def closure(x=x, y=y):
            calls.append(optimizer.counts["steps"])
            return functional.cross_entropy(model(x), y)

        optimizer.zero_grad()
        closure().backward()
        calls.pop()
        returned.append(optimizer.step(closure))
    assert len(calls) == optimizer.counts["probe_forwards"] + optimizer.counts["replays_checked"]
    assert optimizer.counts["probe_forwards"] == 3 * len(set(calls)) and optimizer.counts["replays_checked"] == 1
    assert [loss is not None for loss in returned] == [step in calls for step in range(30)]
    assert {*calls} == {0, 10, 20}


# --- gradients that are not finite -----------------------------------------------------------------------------------


def spoiled(value, at, place):
    def clip(params, optimizer):
        if optimizer.counts["steps"] == at:
            params[place].grad.view(-1)[-1] = value

    return clip


@pytest.mark.parametrize("at", [0, 1, 5, 30, 41, 45])
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_that_is_not_finite_never_reaches_weights_or_state(base, at):
    for place, value in ((0, math.nan), (3, math.inf), (-1, -math.inf)):
        model, optimizer, *_ = looped(spoiled(value, at, place), base=base, steps=at + 4)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        assert optimizer.counts["skipped"] == 1 and optimizer.counts["steps"] == at + 4


@pytest.mark.parametrize("rule", ["displacement", "paper"])
def test_nor_where_clipping_is_told_of_a_part_of_the_parameters(rule):
    def clip(params, optimizer):
        spoiled(math.nan, 7, 2)(params, optimizer)
        optimizer.observe_clipping(clip_grad_norm_(params[:2], 0.1), 0.1)

    model, optimizer, *_ = looped(clip, rule=rule)
    assert all(p.isfinite().all() for p in model.parameters()) and optimizer.counts["skipped"] == 1


def test_nor_without_a_closure_with_groups_and_while_a_schedule_is_at_zero():
    model = network()
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (1.0, 0.5, 16.0, 0.0), strict=True)]
    optimizer = LQA(torch.optim.AdamW(groups), "paper", probe_interval=100)
    factors = iter([0.0, 0.0, 1.0, 1.0, 0.5, 0.5])
    schedule = LambdaLR(optimizer, lambda step: next(factors, 0.5))
    for step, (x, y) in enumerate(batches(5)):
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y: functional.cross_entropy(model(x), y)).backward()
        if step in (1, 3):
            model[2].bias.grad[0] = math.nan
        optimizer.step(*[closure] if step < 3 else [])
        schedule.step()
        values = [v for s in optimizer.state.values() for v in s.values()]
        assert all(v.isfinite().all() for v in [*model.parameters(), *values])
    assert optimizer.counts["skipped"] == 2


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 1e15), (torch.float32, 1e15), (torch.float64, 1e100)]
)
def test_overflow_is_told_from_gradients_that_are_merely_large(dtype, large):
    p = nn.Parameter(torch.ones(100_000, dtype=dtype))
    optimizer = LQA(torch.optim.SGD([p], lr=1.0), "paper", probe_radius=1e-6)
    p.grad = torch.full_like(p, large)  # in half precision their sum would not fit
    optimizer.step(lambda: torch.tensor(1.0))
    assert optimizer.counts["skipped"] == 0
    p.grad = p.grad * math.inf
    before = p.detach().clone()
    optimizer.step(lambda: torch.tensor(1.0))
    assert optimizer.counts["skipped"] == 1 and torch.equal(p, before)


def test_sparse_and_missing_gradients():
    table, unused = nn.Embedding(50, 4, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = LQA(torch.optim.SGD([*table.parameters(), unused], lr=1.0))
    for step in range(4):
        closure = ReplayedLoss(table)
        optimizer.zero_grad()
        closure.record(lambda step=step: table(torch.tensor([1, 2, step])).square().mean()).backward()
        if step == 2:
            table.weight.grad._values()[0, 0] = math.nan
        optimizer.step(closure)
    assert optimizer.counts["skipped"] == 1 and table.weight.isfinite().all()


def test_one_rank_skips_what_the_others_do():
    model = network()
    optimizer = LQA(BASES["adamw"](model.parameters()))
    alone = optimizer.measurer.reduce
    for step, (x, y) in enumerate(batches(3)):
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y: functional.cross_entropy(model(x), y)).backward()
        # The other rank's gradient is infinite.
        optimizer.measurer.reduce = (lambda found: alone(found) + math.inf) if step == 1 else alone
        before = weights(model)
        optimizer.step(closure)
        assert all(torch.equal(before[k], v) for k, v in weights(model).items()) == (step == 1)
    assert optimizer.counts["skipped"] == 1


def test_a_closure_whose_loss_is_not_finite_is_skipped_and_returned():
    model = network()
    optimizer = LQA(BASES["adamw"](model.parameters()))
    returned = torch_loop(
        optimizer, model, [(x * (math.nan if i == 20 else 1), y) for i, (x, y) in enumerate(batches(25))]
    )
    assert math.isnan(returned[20]) and optimizer.counts["skipped"] == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_trainer_knows_the_norm_and_does_not_look_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_lqa.checks, "total", None)
    assert trained(tmp_path, tiny_bert(), train_dataset=rows(), max_steps=4).lqa.counts["steps"] == 4


# --- batches without a gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"probe_radius": 0.01}], ids=["rule", "fixed"])
@pytest.mark.parametrize("rule", ["displacement", "paper"])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", ["", "norm"])
def test_batches_without_a_gradient_move_nothing_and_training_goes_on(clip, base, rule, options):
    model = nn.Linear(12, 3)
    optimizer = LQA(BASES[base](model.parameters()), rule, **options)
    for step, (x, y) in enumerate(batches(12)):
        # A margin that no example violates: loss and gradient are 0.
        margin = -99.0 if step in (0, 1, 6) else 1.0
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y, m=margin: functional.multi_margin_loss(model(x), y, margin=m)).backward()
        if clip:
            clip_grad_norm_(model.parameters(), 1e-3)
        before = model.weight.clone()
        optimizer.step(closure)
        assert model.weight.isfinite().all() and math.isfinite(optimizer.step_size)
        if step < 2 and not (options and rule == "paper"):  # which takes its radius for a step size
            assert torch.equal(model.weight, before) and optimizer.step_size == 0
            assert optimizer.base_step_size is None
            assert options or optimizer.counts["non_descent"] == step + 1
        assert step in (0, 1, 6) or not torch.equal(model.weight, before)
    assert optimizer.counts["skipped"] == 0


# --- multipliers above 1 ---------------------------------------------------------------------------------------------


def grouped(multipliers, rule="displacement", base="adamw", schedule=None, steps=30, by_hand=None):
    torch.manual_seed(0)
    model = network()
    groups = [
        {"params": layer.parameters(), "lr": float(lr)}
        for layer, lr in zip((model[0], model[2]), multipliers, strict=True)
    ]
    optimizer = LQA(BASES[base](groups), rule)
    scheduler = schedule(optimizer, multipliers) if schedule else None
    sizes = []
    for step, (x, y) in enumerate(batches(steps)):
        if by_hand is not None:
            for group, lr in zip(optimizer.param_groups, multipliers, strict=True):
                group["lr"] = lr * by_hand(step)
        closure = ReplayedLoss(model)
        optimizer.zero_grad()
        closure.record(lambda x=x, y=y: functional.cross_entropy(model(x), y)).backward()
        optimizer.step(closure)
        scheduler and scheduler.step()
        sizes.append(optimizer.step_size)
    return model, optimizer, sizes


SCHEDULES = {
    "none": {},
    "warm-up": {"schedule": lambda o, _: LambdaLR(o, lambda step: min((step + 1) / 8, 1.0))},
    "from zero": {"schedule": lambda o, _: LambdaLR(o, lambda step: min(step / 8, 1.0))},
    "decay": {"schedule": lambda o, _: LambdaLR(o, lambda step: 1 - step / 32)},
    "one cycle": {"schedule": lambda o, lrs: OneCycleLR(o, max_lr=list(lrs), total_steps=40)},
    "by hand": {"by_hand": lambda step: min((step + 1) / 8, 1.0) if step < 16 else 0.25},
}


@pytest.mark.parametrize("rule", ["displacement", "paper"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_multipliers_above_one_are_their_ratios(name, rule):
    lower, upper = (grouped(lrs, rule, **SCHEDULES[name]) for lrs in ((1 / 16, 1), (1, 16)))
    assert_same_weights(weights(lower[0]), weights(upper[0]))
    assert lower[2] == upper[2]


@pytest.mark.parametrize(("multipliers", "unit"), [((0.5, 4.0), 4.0), ((3.0, 3.0), 3.0), ((0.25, 0.5), 1.0)])
def test_a_step_moves_each_group_as_is_documented(multipliers, unit):
    model = network()
    layers = zip((model[0], model[2]), multipliers, strict=True)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in layers]
    optimizer = LQA(torch.optim.SGD(groups), "paper", probe_interval=100)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 10)
    for x, y in batches(6):
        before = weights(model)
        looped(data=[(x, y)], model=model, optimizer=optimizer)
        largest = max(group["lr"] for group in optimizer.param_groups)
        assert optimizer.step_size == pytest.approx(optimizer.base_step_size * largest / unit)
        for layer, group in zip((0, 2), optimizer.param_groups, strict=True):
            moved = optimizer.step_size * group["lr"] / largest * model[layer].weight.grad
            assert torch.allclose(model[layer].weight, before[f"{layer}.weight"] - moved, atol=1e-6)
        schedule.step()


def test_multipliers_survive_a_checkpoint_and_groups_that_come_later():
    model = network()
    optimizer = LQA(torch.optim.AdamW(model[2].parameters(), lr=4.0))
    for p in model[0].parameters():
        p.requires_grad_(False)
    looped(model=model, optimizer=optimizer, steps=4)
    again = LQA(torch.optim.AdamW(model[2].parameters(), lr=4.0))
    for group in optimizer.param_groups:
        group["lr"] = 2.0  # a schedule's, when the checkpoint is saved
    again.load_state_dict(optimizer.state_dict())
    looped(model=model, optimizer=again, data=list(batches(1, seed=3)))
    assert again.step_size == pytest.approx(again.base_step_size * again.rule.factor(4) / 2)
    for group in optimizer.param_groups:
        group["lr"] = 4.0
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 16.0})
    before = model[2].weight.detach().clone()
    looped(model=model, optimizer=optimizer, data=list(batches(1, seed=3)))
    own = optimizer.base_step_size * optimizer.rule.factor(4)
    assert optimizer.step_size == pytest.approx(4 * own), "the new group's own"
    assert own / 2 < float((model[2].weight - before).abs().max()) < 2 * own, "the others are not slowed down"
