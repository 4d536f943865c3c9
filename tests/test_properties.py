"""Properties of the fit and of every policy, for whatever floats come."""

import json
import math
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_lqa import Fit, Verdict, fit_losses, fit_slopes
from hf_lqa.cross_batch import POLICIES

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


@given(anything, anything, positive)
def test_a_fit_of_any_slopes_is_a_verdict(start, end, step_size):
    check(fit_slopes(start, end, step_size))


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


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(deadline=None)
@given(st.lists(st.tuples(*[anything] * 6), max_size=60))
def test_a_policys_step_size_is_never_negative_or_infinite(name, observations):
    policy = POLICIES[name]()
    for step, (loss, slope, minus, plus, start, end) in enumerate(observations):
        before = policy.step_size
        assert math.isfinite(policy.factor(step)) and 0 < policy.factor(step) <= 1
        if policy.wants_probe(step):
            radius = policy.radius(loss, slope)
            if radius is not None:
                assert math.isfinite(radius) and radius > 0
                fit = fit_losses(minus, loss, plus, radius, max_step=policy.max_step(loss, slope))
                policy.observe_probe(fit, radius)
        if before is not None:
            starts = [start, slope] if policy.wants_start_slope(step) else []
            policy.observe_end(starts, [end, minus], [3, 4], 1.0)
        assert policy.step_size is None or (math.isfinite(policy.step_size) and policy.step_size > 0), observations
        if not (math.isfinite(end) or math.isfinite(minus)) and before is not None and not policy.wants_probe(step):
            assert policy.step_size == before


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("radius", [sys.float_info.max, math.ulp(0.0)])
@pytest.mark.parametrize("end", [-1.0, 1.0, -1e154])
def test_the_ends_of_the_floats_range(name, radius, end):
    policy = POLICIES[name]()
    policy.observe_probe(Fit(-1.0, math.nan, None, Verdict.NON_CONVEX), radius)
    for step in range(1000):
        policy.observe_end([-1.0] if policy.wants_start_slope(step) else [], [end], [1], 1.0)
        assert 0 < policy.step_size < math.inf


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(deadline=None)
@given(st.lists(st.tuples(moderate, moderate, moderate), min_size=1, max_size=30), st.integers(0, 29))
def test_a_policy_survives_its_state_dict(name, observations, stop):
    straight, resumed = POLICIES[name](), POLICIES[name]()
    for step, (loss, slope, end) in enumerate(observations):
        if step == stop:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = POLICIES[name]()
            resumed.load_state_dict(state)
        for policy in (straight, resumed):
            radius = policy.radius(loss, -slope)
            fit = fit_losses(loss + slope * radius, loss, loss - 0.9 * slope * radius, radius)
            policy.observe_probe(fit, radius)
            policy.observe_end([-slope] if policy.wants_start_slope(step) else [], [end - slope], [1], 1.0)
    assert straight == resumed
