"""The direction is the base optimizer's own update at unit learning rate, however it was found."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hf_lqa import direction, groups, products, slopes
from hf_lqa.direction import Direction
from hf_lqa.groups import rescaled
from hf_lqa.slopes import Snapshot, dot

BASES = {
    **{f"{b.__name__}, decay {wd}": (b, {"weight_decay": wd}) for b in groups.ELEMENTWISE for wd in (0.0, 0.1)},
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "maximize": (torch.optim.SGD, {"maximize": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "unknown, so rehearsed on whole tensors": (type("Custom", (torch.optim.AdamW,), {}), {}),
}


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).double()
    net[0].weight.data = net[0].weight.data.contiguous(memory_format=torch.channels_last)
    net.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.double))
    net.unused = nn.Parameter(torch.zeros(3, dtype=torch.double))
    return net


def started(base, options, steps=3):
    net = network()
    groups = [
        {"params": list(net[0].parameters()), "lr": 0.5},
        {"params": [*net[2].parameters(), net.scale, net.unused]},
    ]
    optimizer = base(groups, lr=1.0, **options)
    for step in range(steps + 1):
        optimizer.zero_grad()
        (net.scale * net(torch.randn(8, 3, 8, 8, dtype=torch.double)).square().mean()).backward()
        for group, rate in zip(optimizer.param_groups, (1e-3, 2e-3), strict=True):
            group["lr"] = rate
        if step < steps:
            optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", BASES)
def test_it_is_the_update_of_the_base_and_leaves_no_trace(name, steps, monkeypatch):
    monkeypatch.setattr(direction, "REHEARSAL_PIECE", 50)  # some tensors are cut, some go together
    base, options = BASES[name]
    net, optimizer = started(base, options, steps)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict(), [p.grad for p in net.parameters()]))
    state, groups = optimizer.state, optimizer.param_groups
    with rescaled(optimizer, 1000, []):
        found = Direction(optimizer)
    assert optimizer.state is state and optimizer.param_groups is groups
    after = (net.state_dict(), optimizer.state_dict(), [p.grad for p in net.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)

    slope = sum((p.grad * d * found.unit).sum() for p, d in zip(found.params, found.tensors, strict=True))
    torch.testing.assert_close(found.slope(), slope)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 1.0, 2.0
    optimizer.step()
    assert len(found.params) == 5
    for p, origin, d in zip(found.params, found.origin, found.tensors, strict=True):
        torch.testing.assert_close(d * found.unit, p.detach() - origin, rtol=1e-9, atol=1e-12)


def as_on_an_accelerator(monkeypatch):
    """Slopes by foreach operations, but for what is larger than a piece; of matrices as large as on a CPU a sample."""
    for module in (products, slopes):
        monkeypatch.setattr(module, "on_accelerator", lambda tensor: True)
    monkeypatch.setattr(slopes, "ACCELERATOR_LARGE", slopes.LARGE)
    monkeypatch.setattr(products, "ACCELERATOR_PIECE", 5000)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("piece", [products.PIECE, 1000])
def test_of_a_large_matrix_every_eighth_row_is_observed(piece, accelerator, monkeypatch):
    monkeypatch.setattr(products, "PIECE", piece)
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    layer, head, bias = (nn.Parameter(torch.zeros(*shape)) for shape in [(64, 512), (6, 4096), (2**15,)])
    words = nn.Embedding(100, 200, sparse=True)
    snapshot = Snapshot([layer, head, bias, words.weight], [0, 1, 2, 3])
    assert [v.shape for v in snapshot.values] == [(8, 512), (6, 4096), (2**15,), (13, 200)]
    rows = torch.tensor([0, 8, 9, 8, 96])
    words(rows).sum().backward()
    with torch.no_grad():
        for p in snapshot.params:
            p.add_(1)
    layer.grad, head.grad = (torch.arange(float(p.shape[0]))[:, None].expand_as(p) for p in (layer, head))
    # Rows 0, 8, ... 56 of the layer; words 0, 8, 8 and 96, once each as they occur.
    expected = [512 * sum(range(0, 64, 8)), 4096 * sum(range(6)), 0, 200 * 4]
    found, agreement = snapshot.compare()
    assert found.tolist() == expected
    # Of 7 of the 8 rows the gradient is not 0, of 5 of 6, and of 3 of 13 words.
    elements = 8 * 512 + 6 * 4096 + 2**15 + 13 * 200
    assert float(agreement) == pytest.approx((7 * 512 + 5 * 4096 + 3 * 200) / elements)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_the_sign_agreement_each_element_counts_alike_however_small(dtype, accelerator, monkeypatch):
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    weights = [nn.Parameter(torch.zeros(4, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))]
    snapshot = Snapshot(weights, [0, 1])
    moves, gradients = [1e-7, -1e-7, 1e3, 0], [1e-7, -1e-7, -1e3, 1]
    weights[0].grad = torch.tensor(gradients, dtype=dtype)
    with torch.no_grad():
        weights[0].add_(torch.tensor(moves, dtype=dtype))
    # Two products above zero, one below, one that did not move, two without a gradient.
    assert float(snapshot.compare()[1]) == pytest.approx((2 - 1) / 6)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("multipliers", [[], [4.0, 0.25, 2.0, 1.0], [4.0, 0.25, 4.0, 0.25]])
def test_a_directions_size_is_of_what_moves_without_multipliers(base, multipliers):
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(3, 2), (2,), (4,), (5,)]]
    optimizer = base([{"params": params[:2]}, {"params": params[2:]}], lr=1.0, weight_decay=0.0)
    for p, gradient in zip(params[:3], (3.0, -2.0, 0.0), strict=True):  # the last has none
        p.grad = torch.full_like(p, gradient)
    params[0].grad[0] = 0.0
    with rescaled(optimizer, 0.5, multipliers):
        squares, sizes = Direction(optimizer).size(dict(zip(params, multipliers, strict=False)))
    moved = [3.0] * 4 + [2.0] * 2 if base is torch.optim.SGD else [1.0] * 6
    assert float(sizes) == pytest.approx(sum(0.5 * x for x in moved), rel=1e-5)
    assert float(squares) == pytest.approx(sum((0.5 * x) ** 2 for x in moved), rel=1e-5)


class Counts(torch.optim.SGD):
    """Counts its steps in each param group, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step(closure)


def test_parameters_are_rescaled_one_by_one_and_groups_keep_what_they_hold():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    optimizer = Counts([{"params": weights[:3], "lr": 1.0}, {"params": weights[3:], "lr": 10.0}])
    groups = optimizer.param_groups
    for p in weights:
        p.grad = -torch.ones(1)
    for rates in ([0.5, 2.0, 0.5, 4.0, 1.0], []):
        with rescaled(optimizer, 0.1, rates):
            assert len(optimizer.param_groups) == (4 if rates else 2)
            optimizer.step()
    assert [p.item() for p in weights] == pytest.approx([0.15, 0.3, 0.15, 5.0, 2.0])
    with pytest.raises(RuntimeError, match="kernel"), rescaled(optimizer, 0.1, [1.0, 2.0, 3.0, 4.0, 5.0]):
        raise RuntimeError("kernel")
    assert optimizer.param_groups is groups and [group["lr"] for group in groups] == [1.0, 10.0]
    assert [group["count"] for group in groups] == [2, 2] and [len(group["params"]) for group in groups] == [3, 2]


def test_gradient_descent_takes_no_second_copy():
    _, optimizer = started(torch.optim.SGD, {})
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0
    found = Direction(optimizer)
    assert all(d.data_ptr() == p.grad.data_ptr() for d, p in zip(found.tensors, found.params, strict=True))


def test_a_base_that_fails_in_a_piece_is_put_back(monkeypatch):
    monkeypatch.setattr(direction, "REHEARSAL_PIECE", 50)
    net, optimizer = started(torch.optim.AdamW, {})
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    calls, own = [], torch.optim.AdamW.step

    def fails(self, closure=None):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("kernel")

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(RuntimeError, match="kernel"):
        Direction(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", own)
    torch.testing.assert_close((net.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    optimizer.step()


def test_a_small_move_between_large_weights_keeps_its_sign_and_size():
    weights = [nn.Parameter(torch.full((200_000,), 3.0))]
    snapshot = Snapshot(weights, list(range(len(weights))))
    with torch.no_grad():
        weights[0].sub_(1e-5)
    move = weights[0].detach()[0].double() - 3
    weights[0].grad = torch.ones_like(weights[0])
    assert float(snapshot.compare()[0]) == pytest.approx(float(move) * 200_000, rel=1e-5)
    weights[0].grad = None
    assert float(snapshot.compare()[0]) == 0


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_summed_in_single(dtype, accelerator, monkeypatch):
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    a, b = torch.full((140_000,), 1.0, dtype=dtype), torch.full((140_000,), 0.5, dtype=dtype)
    total = dot([a, a], [b, b])
    assert total.dtype is torch.float32 and float(total) == 140_000


def test_foreach_operations_find_the_same_slopes(monkeypatch):
    left, right, minus = ([torch.randn(n, 7) for n in (3, 1, 900, 50)] for _ in range(3))
    terms = [a.double() * (b.double() - c.double()) for a, b, c in zip(left, right, minus, strict=True)]
    as_on_an_accelerator(monkeypatch)
    for found, exact in zip(products.along_moves(left, right, minus)[0], terms, strict=True):
        # The 1-norm of a CPU is summed one by one.
        assert float(found) == pytest.approx(float(exact.sum()), abs=3e-6 * float(exact.abs().sum()))
    left[2][5, 5] = float("inf")
    assert not torch.isfinite(products.along_moves(left, right, minus)[0, 2])
    left[2][5, 5] = float("nan")
    assert not torch.isfinite(products.along_moves(left, right, minus)[0, 2])


def test_a_snapshot_that_was_cut_on_another_kind_of_device_stays_cut(monkeypatch):
    params = [nn.Parameter(torch.zeros(64, 512)), nn.Parameter(torch.zeros(5))]
    saved = Snapshot(params, [0, 1]).values
    monkeypatch.setattr(slopes, "LARGE", 2**20)
    assert [v.shape for v in Snapshot(params, [0, 1]).values] == [(64, 512), (5,)]
    snapshot = Snapshot(params, [0, 1], saved)
    for p in params:
        p.grad = torch.ones_like(p)
        p.data += 1
    assert snapshot.compare()[0].tolist() == [8 * 512, 5]


@pytest.mark.parametrize("layers", [1, 8, 50])
def test_on_an_accelerator_matrices_of_all_depths_are_observed(layers):
    shapes = [(100, 8), *[(8, 8), (8,), (8, 8), (8,)] * layers, (3, 8)]
    meta = [torch.empty(shape, device="meta") for shape in shapes]
    places = slopes.observed(meta)
    matrices = [i for i, shape in enumerate(shapes) if len(shape) > 1]
    assert (places[0], places[-1]) == (0, len(shapes) - 1)
    assert places == matrices if len(matrices) <= 32 else len(places) == 32 and set(places) < set(matrices)
    assert max(b - a for a, b in itertools.pairwise(places)) <= 2 * len(shapes) / len(places) + 2
    assert slopes.observed([torch.empty(3, device="meta")]) == [0]
    assert slopes.observed([torch.empty(3), torch.empty(3, 3)]) == [0, 1]
