import math

import pytest

from hf_lqa import Verdict, fit_losses


def parabola(slope, curvature, center=3.0):
    return lambda a: center + slope * a + curvature / 2 * a * a


@pytest.mark.parametrize("slope, curvature, radius", [(-2.0, 5.0, 0.1), (-1e-3, 7.0, 1e-2), (-1e4, 1e9, 1e-5)])
def test_the_minimiser_of_a_parabola_is_exact(slope, curvature, radius):
    phi = parabola(slope, curvature)
    fit = fit_losses(phi(-radius), phi(0), phi(radius), radius)
    assert fit.verdict is Verdict.ACCEPTED
    assert fit.step_size == pytest.approx(-slope / curvature, rel=1e-9)
    assert (fit.slope, fit.curvature) == pytest.approx((slope, curvature), rel=1e-9)


def test_the_papers_coefficients():
    # arXiv 2004.03260: L(theta - delta g) ~ L0 - a delta + b delta**2 has its minimum at a / 2b.
    a, b = 0.7, 4.0
    loss = lambda delta: 1.0 - a * delta + b * delta**2  # noqa: E731
    fit = fit_losses(loss(-0.1), loss(0), loss(0.1), 0.1)
    assert fit.step_size == pytest.approx(a / (2 * b), rel=1e-12)


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ((1.1, 1.0, 1.3), Verdict.NON_DESCENT),
        ((1.2, 1.0, 0.7), Verdict.NON_CONVEX),
        ((math.nan, 1.0, 0.9), Verdict.NON_FINITE),
        ((1.2, 1.0, math.inf), Verdict.NON_FINITE),
        ((1.0, 1.0, 1.0), Verdict.BELOW_NOISE),
        ((1e308, -1e308, 1e308), Verdict.NON_FINITE),
    ],
)
def test_a_parabola_without_a_minimum_ahead_is_a_verdict(losses, verdict):
    fit = fit_losses(*losses, 0.1)
    assert fit.verdict is verdict
    assert fit.step_size is None
    assert not fit.verdict.usable


def test_differences_within_the_rounding_errors_are_not_trusted():
    losses = (1.002, 1.0, 0.999)
    assert fit_losses(*losses, 0.1, noise=1e-5).verdict is Verdict.ACCEPTED
    assert fit_losses(*losses, 0.1, noise=1e-3).verdict is Verdict.BELOW_NOISE


def test_the_largest_step():
    fit = fit_losses(1.2, 1.0, 0.9, 0.1, max_step=0.05)
    assert (fit.verdict, fit.step_size) == (Verdict.CLAMPED, 0.05)


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": math.nan}, "radius=nan"),
        ({"radius": 0.1, "noise": -1.0}, "noise=-1.0"),
        ({"radius": 0.1, "max_step": 0.0}, "max_step=0.0"),
    ],
)
def test_arguments_out_of_range_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        fit_losses(1.0, 1.0, 1.0, **kwargs)
