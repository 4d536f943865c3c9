"""Properties of the fit and of every rule, for whatever floats come."""

import json
import math
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Reference

from hf_lqa import Fit, Verdict, fit_losses
from hf_lqa.rule import OPTIONS, Displacement, Measurement, build
from hf_lqa.rule.radius import Radius, adapted, first_radius, max_step, radius
from hf_lqa.rule.records import Probe

anything = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_subnormal=True)
# Where products and quotients neither overflow nor underflow, so that equalities can be asked for.
moderate = st.floats(min_value=1e-3, max_value=1e3)
powers = st.integers(-20, 20).map(lambda n: 2.0**n)


def check(fit):
    assert (fit.step_size is None) == (not fit.verdict.usable)
    if fit.step_size is not None:
        assert math.isfinite(fit.step_size) and fit.step_size >= 0
        assert fit.slope < 0 < fit.curvature


@given(anything, anything, anything, positive, st.one_of(st.just(0.0), positive), positive)
def test_a_fit_of_any_losses_is_a_verdict(minus, center, plus, radius, noise, max_step):
    fit = fit_losses(minus, center, plus, radius, noise=noise, max_step=max_step)
    check(fit)
    assert fit.step_size is None or fit.step_size <= max_step


@given(moderate, moderate, moderate, powers, powers)
def test_units(slope, curvature, center, radius, unit):
    """Scaling the loss changes no step size, scaling the direction by r scales it by 1 / r; exact for powers of 2."""
    losses = [center + a * slope + a * a * curvature / 2 for a in (-radius, 0.0, radius)]
    fit = fit_losses(*losses, radius)
    scaled = fit_losses(*(unit * x for x in losses), radius)
    assert (scaled.step_size, scaled.verdict) == (fit.step_size, fit.verdict)
    longer = fit_losses(*losses, radius / unit)
    assert longer.verdict == fit.verdict
    assert longer.step_size == (None if fit.step_size is None else fit.step_size / unit)


@given(moderate, moderate, moderate, st.floats(-1e3, 1e3))
def test_a_shift_of_the_loss_changes_only_rounding(slope, curvature, radius, shift):
    losses = [-a * slope + a * a * curvature / 2 for a in (-radius, 0.0, radius)]
    assume(min(slope * radius, curvature * radius * radius) > 1e-2)
    fit, shifted = fit_losses(*losses, radius), fit_losses(*(x + shift for x in losses), radius)
    assert shifted.verdict == fit.verdict == Verdict.ACCEPTED
    assert shifted.step_size == pytest.approx(fit.step_size, rel=1e-7)
    assert fit.step_size == pytest.approx(slope / curvature, rel=1e-7)


@given(anything, anything, anything, positive)
def test_turning_the_direction_turns_the_slope(minus, center, plus, radius):
    fit, turned = fit_losses(minus, center, plus, radius), fit_losses(plus, center, minus, radius)
    assert turned.slope == -fit.slope or math.isnan(fit.slope)
    assert turned.curvature == fit.curvature or math.isnan(fit.curvature)
    assert not (fit.verdict.usable and turned.verdict.usable)


SHAPES = [(4, 6), (6,), (), (2, 4)]


def probed(rule, config, state, measured, by_loss=True):
    """The state of the radius after a probe of `rule` that finds these losses."""
    loss, slope, minus, plus = measured
    if rule.step_size is None:
        rule.begin(SHAPES, list(map(math.prod, SHAPES)), 1.0)
        reach = first_radius(config, loss, slope, rule.prior)
    else:
        reach = radius(config, state, loss, slope, rule.step_size)
    assert reach is None or (math.isfinite(reach) and reach > 0)
    fit, bound = Fit(slope, math.nan, None, Verdict.NON_DESCENT), max_step(state, loss, slope, rule.step_size)
    fit = fit if reach is None else fit_losses(minus, loss, plus, reach, max_step=bound)
    state = adapted(config, state, fit, by_loss)
    reach = math.nan if reach is None else reach
    bound = bound if by_loss else math.inf
    rule.observe_probe(Probe(fit, reach, rule.prior, by_loss, state.follows_step, bound))
    return state


agreements = st.one_of(st.floats(-1, 1), st.sampled_from([math.nan, math.inf]))


@pytest.mark.parametrize("name", sorted(OPTIONS))
@settings(deadline=None)
@given(st.lists(st.tuples(*[anything] * 5, agreements, st.booleans()), max_size=60))
def test_a_step_size_is_never_negative_or_infinite(name, observations):
    (rule, config), state = build(name, {}), Radius()
    for step, (*measured, along, agreement, by_loss) in enumerate(observations):
        assert 0 < rule.factor(step) <= 1
        if rule.wants_probe(step):
            state = probed(rule, config, state, measured, by_loss)
        before = rule.step_size
        if rule.wants_measurement(step):
            rule.observe(Measurement([along, *measured], agreement, 1.0, 99))
        assert rule.step_size is None or (math.isfinite(rule.step_size) and rule.step_size > 0), observations
        assert math.isfinite(agreement) or rule.step_size == before
        assert all(1 / 4 - 1e-9 < multiplier < 8 * 4 + 1e-9 for multiplier in rule.multipliers(5))


@pytest.mark.parametrize("begun", [sys.float_info.max, math.ulp(0.0)])
@pytest.mark.parametrize("agreement", [-1.0, 1.0])
# Squares overflow, are all but 0, or are 0.
@pytest.mark.parametrize("slope", [-1e154, 1e300, 2.5e-162, 1e-300])
def test_the_ends_of_the_floats_range(begun, agreement, slope):
    rule = Displacement()
    rule.begin(SHAPES, list(map(math.prod, SHAPES)), 1.0)
    rule.start(begun)
    for _ in range(1000):
        rule.observe(Measurement([slope, -slope, None, slope], agreement, 1.0, 99))
        assert 0 < rule.step_size < math.inf
    assert all(0 < multiplier < 33 for multiplier in rule.multipliers(4))


@pytest.mark.parametrize("name", sorted(OPTIONS))
@settings(deadline=None)
@given(st.lists(st.tuples(moderate, moderate, st.floats(-1, 1)), min_size=1, max_size=30), st.integers(0, 29))
def test_a_rule_survives_its_state_dict(name, observations, stop):
    (straight, config), state = build(name, {"probe_interval": 3}), Radius()
    resumed = build(name, {"probe_interval": 3})[0]
    for step, (loss, slope, agreement) in enumerate(observations):
        if step == stop % len(observations):
            kept = json.loads(json.dumps(resumed.state_dict()))
            resumed = build(name, {"probe_interval": 3})[0]
            resumed.load_state_dict(kept)
        assert straight.wants_probe(step) is resumed.wants_probe(step)
        if straight.wants_probe(step):
            measured = loss, -slope, loss + slope, loss - 0.9 * slope
            after = [probed(rule, config, state, measured) for rule in (straight, resumed)]
            state = after[0]
        for rule in (straight, resumed):
            rule.observe(Measurement([slope, -slope, None, slope * agreement], agreement, 0.5, 99))
        assert straight.step_size == resumed.step_size
        assert straight.multipliers(5) == resumed.multipliers(5)
    assert straight.state_dict() == resumed.state_dict()


sides = st.integers(1, 40)
shapes = st.one_of(
    st.just(()),
    st.tuples(sides),
    st.tuples(st.integers(0, 40), sides),
    st.tuples(sides, sides, sides),
    st.sampled_from([(1, 6), (6, 1), (2, 12), (12, 2)]),  # of adapters
)
models = st.one_of(
    st.lists(shapes, max_size=9),
    st.builds(
        lambda before, layer, after: [*before, *3 * layer, *after],
        st.lists(shapes, max_size=3),
        st.lists(shapes, min_size=1, max_size=3),
        st.lists(shapes, max_size=3),
    ),
)
slopes = st.one_of(
    st.sampled_from([None, 0.0, math.inf, math.nan]), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6), st.floats(-2, -1)
)
measurements = st.tuples(st.lists(slopes, max_size=8), agreements, st.floats(0, 2))


@settings(deadline=None)
@given(
    models,
    st.one_of(st.none(), st.integers(1, 10**5)),
    st.floats(0.01, 1),
    st.tuples(moderate, *[st.one_of(st.none(), moderate)] * 3),
    st.lists(measurements, max_size=40),
)
def test_the_rule_is_its_reference(shapes, total_steps, eta, beginning, measurements):
    rule, reference = build("displacement", {"eta": eta})[0], Reference(shapes, total_steps, eta)
    rule.total_steps = total_steps
    rule.begin(shapes, list(map(math.prod, shapes)), 1.0)
    assert rule.prior == pytest.approx(reference.prior, rel=1e-12)
    scale, reach, minimiser, bound = beginning
    if reach is None:
        rule.start(rule.prior * scale)
        reference.start(reference.prior * scale)
    else:
        verdict = Verdict.NON_CONVEX if minimiser is None else Verdict.ACCEPTED
        bound = math.inf if bound is None else rule.prior * bound
        fit = Fit(-1.0, math.nan, minimiser, verdict)
        rule.observe_probe(Probe(fit, reach, rule.prior * scale, bound=bound))
        reference.start(rule.prior * scale, reach, minimiser, bound)
    assert (rule.multipliers(len(shapes)) or [1.0] * len(shapes)) == reference.first
    step = 0
    for measured, agreement, factor in measurements:
        assert rule.factor(step) == reference.ramp(step)
        while not reference.measures(step):
            assert not rule.wants_measurement(step)
            step += 1
        assert rule.wants_measurement(step)
        # An empty tensor has no slope.
        measured = [None if 0 in shape else slope for slope, shape in zip(measured, shapes + 8 * [()], strict=False)]
        rule.observe(Measurement(measured, agreement, factor, step))
        reference.observe(measured, agreement, factor, step)
        step += 1
        assert rule.step_size == pytest.approx(reference.base, rel=1e-12)
        found = rule.multipliers(len(shapes)) or [1.0] * len(shapes)
        assert found == pytest.approx(reference.multipliers(), rel=1e-12)
