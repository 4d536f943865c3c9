"""The rule's parts, functions of numbers, and the two rules that are made of them."""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from hf_lqa import LQA, Fit, Verdict
from hf_lqa.rule import Displacement, DisplacementConfig, Measurement, Paper, PaperConfig, build
from hf_lqa.rule.agreement import Agreement, averaged, moved
from hf_lqa.rule.head import adapters, head_multipliers
from hf_lqa.rule.multipliers import MultiplierConfig, Multipliers, rounded, updated
from hf_lqa.rule.prior import PriorConfig, base_step_size, typical_size
from hf_lqa.rule.radius import Radius, RadiusConfig, adapted, first_radius, max_step, radius
from hf_lqa.rule.records import Probe

PRIOR, TURN, REACH = PriorConfig(), MultiplierConfig(), RadiusConfig()
MEMORY, GAIN = DisplacementConfig().memory, DisplacementConfig.gain
ACCEPTED = Fit(-1.0, 2.0, 0.5, Verdict.ACCEPTED)


def failed(verdict):
    return Fit(-1.0, math.nan, None, verdict)


def test_a_typical_matrix_is_the_geometric_mean_weighted_by_roots():
    assert typical_size([(16, 4)]) == pytest.approx(64)
    assert typical_size([(2, 2), (16, 16)]) == pytest.approx(math.exp((2 * math.log(4) + 16 * math.log(256)) / 18))
    # A deeper model is no wider, and what is no matrix or is frozen does not count.
    assert typical_size(5 * [(2, 2), (16, 16)]) == pytest.approx(typical_size([(2, 2), (16, 16)]))
    assert typical_size([(16, 4), (1000,), (), (9, 9, 9), (0, 7)]) == pytest.approx(64)


@pytest.mark.parametrize(
    "shapes, elements", [([(5,), (), (3, 3, 3)], 32), ([(9,)], 9), ([()], 0), ([], 0), ([(0, 3), (0,)], 0)]
)
def test_without_a_matrix_all_elements_are_one(shapes, elements):
    assert typical_size(shapes) == pytest.approx(elements)
    assert base_step_size(shapes, 1, PRIOR) == pytest.approx(PRIOR.length / math.sqrt(elements or 1))


def test_a_run_ten_times_as_long_begins_half_as_far():
    at_100, at_1000, unknown = (base_step_size([(100, 100)], steps, PRIOR) for steps in (100, 1000, None))
    assert at_100 == pytest.approx(0.14 / 100, rel=0.01), "0.14 over the root of a matrix's elements"
    assert at_1000 == pytest.approx(at_100 / 2, rel=0.01)
    assert unknown == at_1000


#: An adapter of a matrix.
LORA = [(2, 12), (12, 2)]


@pytest.mark.parametrize(
    "shapes, found",
    [
        ([(9, 9), (9,), (2, 9), (2,)], [1, 8, 8, 8]),
        # Vectors count wherever they stand: a Trainer has them last. Small tables before the body's end do not.
        ([(2, 9), (9, 9), (5, 9), (2, 9), (9,)], [1, 1, 1, 8, 8]),
        # Three alike are layers, as LoRA has them where keys and values are shared.
        ([(9, 9), (2, 9), (9, 9), (2, 9), (9, 9), (2, 9), (9,)], [1, 1, 1, 1, 1, 1, 1]),
        ([(9, 9), (2, 9), (9, 9), (2, 9), (9, 9), (2, 9), (4, 9), (9,)], [1, 1, 1, 1, 1, 1, 8, 8]),
        # A layer ends with what is small, or where a head goes on as another one would.
        ([(50, 9), *3 * [(9, 9), (99, 9), (9, 9)], (2, 9)], [*10 * [1], 8]),
        ([(50, 9), *3 * [(9, 9), (9, 9), (36, 9), (9, 36)], (9, 9), (2, 9)], [*13 * [1], 8, 8]),
        # It may come first, before the words, and then has biases; tables have none, and a picture's layers are tall.
        ([(9, 9), (9,), (2, 9), (2,), (50, 9), (7, 9), *3 * [(9, 9), (18, 9)]], [8, 8, 8, 8, *8 * [1]]),
        ([(9, 9), (2, 9), (50, 9), (7, 9), *3 * [(9, 9), (18, 9)], (2,), (9,)], [8, 8, *8 * [1], 8, 8]),
        ([(7, 9), (50, 9), *3 * [(9, 9), (18, 9)], (9,)], 9 * [1]),
        ([(9, 9), (9,), (36, 9), (36,), (50, 9), *3 * [(9, 9), (36, 9)]], 11 * [1]),
        ([(2, 9), (2,), (9, 9), (50, 9)], 4 * [1]),
        ([(4, 12), (4,), *3 * LORA], [8, 8, *6 * [1]]),
        ([(2, 12), (2,), *3 * LORA], [8, 8, *6 * [1]]),
        ([(9, 9), (), (4, 4, 4, 4), (2, 9)], [1, 1, 1, 8]),
        # Half of the roots' sum is in the first one, and then not quite.
        ([(9, 9), (5, 5), (4, 4)], [1, 8, 8]),
        ([(9, 9), (5, 5), (5, 5)], [1, 1, 1]),
        # A classifier's head may be larger than adapters, and may have a square matrix; a table of words is none.
        ([*3 * LORA, (4, 12), (4,)], [*6 * [1], 8, 8]),
        ([*3 * LORA, (12, 12), (4, 12)], [*6 * [1], 8, 8]),
        ([*3 * LORA, (99, 12), (12,)], [*7 * [1], 1]),
        ([(4, 12), *3 * LORA], 7 * [1]),
        # It may have as many classes as adapters have ranks, and stand before their second half.
        ([*3 * LORA, (2, 12), (2,)], [*6 * [1], 8, 8]),
        ([*3 * [(2, 12)], (2, 12), *3 * [(12, 2)], (2,)], [1, 1, 1, 8, 1, 1, 1, 8]),
        # Other layers are trained beside them.
        ([*3 * [*LORA, *LORA, (12, 12)], (2, 12), (2,)], [*15 * [1], 8, 8]),
        ([(50, 9), *3 * [(9, 9)], (50, 9), (9,)], [*5 * [1], 1]),
        ([(3, 9), (3, 3), (2, 9), (7, 9)], [1, 1, 1, 1]),
        # There is no head where the last large matrix is the last, or nothing trained comes before it.
        ([(9, 9), (9,), (2, 9), (99, 9)], [1, 1, 1, 1]),
        ([(), (2, 9), (9,)], [1, 1, 1]),
        ([(9, 9), (9,), (3, 3, 3), (0, 9)], [1, 1, 1, 1]),
        ([(5,), (3, 3, 3)], [1, 1]),
        (9 * [(3, 4)], 9 * [1]),
        ([], []),
    ],
)
def test_the_head_is_what_comes_after_the_last_large_matrix(shapes, found):
    assert head_multipliers(shapes, adapters(shapes), PRIOR.head) == found


@pytest.mark.parametrize(
    "shapes, found",
    [
        ([*3 * LORA, (4, 12), (4,)], [*range(6)]),
        ([*3 * LORA, (2, 12), (2,)], [*range(6)]),
        # Of all first halves before all second ones; of layers of several sizes; of values that heads share.
        ([*4 * [(2, 12)], *3 * [(12, 2)]], [0, 1, 2, 4, 5, 6]),
        ([(2, 12), (12, 2), (2, 48), (12, 2), (2, 12), (48, 2)], [*range(6)]),
        (3 * [(4, 24), (8, 4)], [*range(6)]),
        # Of a rank that is nearly the width; beside layers that are fewer.
        (3 * [(8, 9), (9, 8)], [*range(6)]),
        ([(99, 9), *3 * [(2, 9), (9, 2)], (9, 9)], [*range(1, 7)]),
        # Two are not enough, nor less than three quarters of all, a layer's own, tables, vectors, or what is frozen.
        (2 * LORA, []),
        ([(99, 9), *3 * [(2, 9), (9, 2)], (9, 9), (9, 9)], []),
        (3 * [(9, 9), (9, 9)], []),
        # A layer's last matrix and the next one's first; a layer's matrices transposed, as GPT-2 has them.
        (4 * [(16, 8), (8, 16), (32, 8), (8, 32)], []),
        (4 * [(8, 24), (8, 8), (8, 32), (32, 8)], []),
        (3 * [(48, 8), (8, 48)], []),
        (4 * [(8, 8), (1, 8), (1, 8), (8, 8), (64, 8), (8, 64)], []),
        ([(640, 9), (640, 9), *3 * [(9, 9), (9,)]], []),
        ([*3 * [(99,)], *3 * [()], *3 * [(0, 9)], *3 * [(2, 4, 99)]], []),
    ],
)
def test_adapters_are_pairs_of_a_wide_matrix_and_one_that_takes_its_result(shapes, found):
    assert adapters(shapes) == found


def after(slopes, sizes, weight=0.5, state=None, times=1):
    state = Multipliers.started([1.0] * len(sizes)) if state is None else state
    for _ in range(times):
        state = updated(state, slopes, sizes, weight, MEMORY, TURN)
    return state


def test_a_tensor_that_would_go_on_moves_further_and_one_that_has_gone_too_far_less():
    # A first slope is as large as its root mean square, whatever it is.
    state = after([-3.0, 1e-6], [5, 5])
    turned = TURN.eta * 0.5
    assert [state.drift[0], -state.drift[1]] == pytest.approx(
        [turned - math.log(math.cosh(2 * turned)) / 2, turned + math.log(math.cosh(2 * turned)) / 2]
    )
    fainter = after([-3.0, 1e-6], [5, 5], weight=0.05)
    assert fainter.drift[0] - fainter.drift[1] == pytest.approx((state.drift[0] - state.drift[1]) / 10)
    assert state.count == 1 and state.first == (1.0, 1.0)


def test_adapters_go_together_whatever_their_own_slopes_say():
    """Here they are the first two; what comes after them turns, and all go as far as before."""
    sizes, still = [9, 9, 9, 9], Multipliers.started([1.0] * 4, [0, 1])
    state = after([-1.0, 1.0, 1.0, -1.0], sizes, state=still, times=3)
    assert state.drift[0] == state.drift[1] and state.drift[2] < state.drift[0] < state.drift[3]
    assert sum(math.exp(2 * drift) for drift in state.drift) == pytest.approx(4)
    assert after([-1.0, 1.0, None, None], sizes, state=still, times=5).drift == (0.0,) * 4


def test_multipliers_turn_a_step_and_leave_its_length():
    sizes, state = [10_000, 100, 4], None
    for slopes in ([-1.0, 2.0, 3.0], [2.0, -1.0, 1.0], [-1.0, 0.5, -4.0]):
        state = after(slopes, sizes, state=state)
        squares = [math.sqrt(n) * math.exp(2 * drift) for n, drift in zip(sizes, state.drift, strict=True)]
        assert sum(squares) / (100 + 10 + 2) == pytest.approx(1), "a table does not outvote by all its elements"
    assert len({*state.drift}) == 3


def test_the_unit_of_the_loss_does_not_matter():
    state, scaled = after([-1.0, 2.0], [5, 7]), after([-1e6, 2e6], [5, 7])
    assert after([3e6, 1e6], [5, 7], state=scaled).drift == pytest.approx(after([3.0, 1.0], [5, 7], state=state).drift)


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_large_slope_turns_little_further_than_two_of_its_usual_size(sign):
    """It is a part of what it is compared with."""
    usual = after([-1.0, -1.0], [5, 5], times=100)
    state = after([1e9 * sign, -1.0], [5, 5], state=usual)
    assert state.drift[0] - state.drift[1] == pytest.approx(TURN.eta * 0.5 * (-math.sqrt(5) * sign - 1))
    # It is remembered for some time, in which usual slopes are small.
    later = after([-1.0, -1.0], [5, 5], state=state, times=3)
    assert later.drift[0] - later.drift[1] < state.drift[0] - state.drift[1]


def test_multipliers_are_bounded_on_both_sides():
    head = Multipliers.started([1.0, 8.0])
    for slope, most in ((-1.0, TURN.bound), (1.0, 1 / TURN.bound)):
        state = after([-slope, slope], [10**6, 1], state=head, times=200)
        assert rounded(state, 2, TURN) == pytest.approx([1, 8 * most]), "away from where they began"


def test_what_is_not_known_moves_as_what_comes_before_it():
    state = after([None, 0.0, -1.0, None, math.nan, 1.0, math.inf, -math.inf], [4] * 9)
    further, less = state.drift[2], state.drift[5]
    assert further > 0 > less
    assert state.drift == (*5 * [further], *4 * [less]), "and before the first that is known, as that"
    state = after([-1.0, 1.0, 1.0, -1.0], [4, 4])
    assert state == after([-1.0, 1.0], [4, 4]), "that of a tensor added later"
    for nothing in ([], [None, None], [0.0, 0.0], [math.nan, math.inf]):
        assert after(nothing, [4, 4], state=state) == replace(state, count=state.count + 1)


def test_a_gradient_that_is_missing_once_leaves_what_was_learned():
    state = after([-1.0, 1.0, -1.0, 1.0], [4] * 4)
    for slopes in ([-1.0, 1.0, -1.0, None], [0.0, None, None, 1.0]):
        again = after(slopes, [4] * 4, state=state)
        assert (again.drift[0] > 0) and (again.drift[2] > 0) and again.drift[1] < 0 and again.drift[3] < 0


def test_multipliers_are_applied_to_the_root_of_the_bound():
    half = math.log(2) / 2
    state = Multipliers((1.0, 1.0, 1.0, 8.0), (0.49 * half, 0.51 * half, -1.6 * half, 1.2 * half), 4 * (1.0,))
    assert rounded(state, 6, TURN) == pytest.approx([1, 2**0.5, 0.5, 8 * 2**0.5, 1, 1]), "1 for those added later"
    assert len(rounded(state, 2, TURN)) == 2
    wider, none = replace(TURN, bound=9.0), replace(TURN, bound=1.0)
    assert rounded(state, 4, wider) == pytest.approx([1, 1, 1 / 3, 8]), "to the bound, its root, or 1"
    drift = (0.51 * math.log(3), 1.51 * math.log(3), -math.log(9))
    assert rounded(Multipliers((1.0,) * 3, drift), 3, wider) == pytest.approx([3, 9, 1 / 9])
    assert rounded(state, 4, none) == [1, 1, 1, 8]


def test_the_base_step_size_follows_the_sign_agreement_of_late():
    assert moved(3.0, -0.2, 0.5, 4.0) == pytest.approx(3 * math.exp(4 * 0.5 * 0.2))
    assert moved(3.0, 0.2, 0.5, 4.0) == pytest.approx(3 * math.exp(-4 * 0.5 * 0.2))
    assert moved(3.0, 0.0, 0.5, 4.0) == moved(3.0, -0.2, 0.0, 4.0) == 3
    for end, agreement in ((sys.float_info.max, -1.0), (math.ulp(0.0), 1.0)):
        assert moved(end, agreement, 0.5, 4.0) == end


def test_one_batchs_agreement_is_a_part_of_that_of_late():
    assert averaged(Agreement(0.5, 3), -0.5, 0.75) == Agreement(0.25, 4)
    late = Agreement()
    for _ in range(100):
        late = averaged(late, -0.3, MEMORY)
        assert -0.3 <= late.mean < 0
    assert late == Agreement(pytest.approx(-0.3), 100)


def test_a_radius_is_where_the_loss_changes_by_a_share():
    assert radius(RadiusConfig(tau=0.1), Radius(), -2.0, -4.0, None) == pytest.approx(0.1 * 2 / 4)
    assert radius(REACH, Radius(scale=4.0), 2.0, 4.0, 7.0) == pytest.approx(4 * 0.03 * 2 / 4)
    assert radius(RadiusConfig(fixed=0.3), Radius(scale=4.0), 2.0, 0.0, None) == 0.3
    # No finite distance, or none at all.
    for loss, slope in ((1, 0), (0, 1), (math.nan, 1), (math.inf, 1), (1, math.nan), (1, math.inf), (1e300, 1e-300)):
        assert radius(REACH, Radius(), loss, slope, 1.0) is None
    assert radius(REACH, Radius(follows_step=True), math.nan, 1.0, 1.0) is None


def test_where_the_loss_is_no_scale_radii_and_bounds_follow_the_step_size():
    state = Radius(scale=2.0, follows_step=True)
    assert radius(REACH, state, 1e9, -1.0, 0.5) == 2 * 0.5 and max_step(state, 1e9, -1.0, 0.5) == 2 * 0.5
    # Before there is one, the loss is all there is.
    assert radius(REACH, state, 1.0, -1.0, None) == 2 * 0.03 and max_step(state, 1.0, -1.0, None) == 2
    # Where it is one, no fit is followed beyond where a parabola that stays positive has turned.
    assert max_step(Radius(scale=8.0), -3.0, -2.0, 1e-9) == 2 * 3 / 2
    assert max_step(Radius(), 1.0, 0.0, None) == max_step(Radius(), 0.0, 1.0, None) == math.inf
    assert max_step(Radius(), math.nan, 1.0, None) == math.inf


def test_a_first_probe_moves_the_weights_by_something():
    assert first_radius(REACH, 1.0, -1.0, 33.3) == 0.03
    # Less than tau² of what shapes say is nothing; so is a loss of 0.
    for loss in (1.0, 1e-9, 0.0):
        assert first_radius(REACH, loss, -1.0, 33.4) == 33.4
    assert first_radius(RadiusConfig(fixed=1e-9), 1.0, -1.0, 1.0) == 1e-9
    for loss, slope in ((0.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        assert first_radius(REACH, loss, slope, 1.0) is None
    assert first_radius(REACH, 0.0, 1.0, math.inf) is first_radius(REACH, 0.0, 1.0, math.nan) is None


def test_a_radius_doubles_while_differences_drown_and_comes_back_with_good_fits():
    state, scales = Radius(), []
    for fit in 5 * [failed(Verdict.BELOW_NOISE)] + [failed(Verdict.NON_CONVEX)] + 6 * [ACCEPTED]:
        state = adapted(REACH, state, fit, True)
        scales.append(state.scale)
    assert scales == [2, 4, 8, 16, 16, 16, 8, 4, 2, 1, 1, 1], "to first order it changes the loss by half at most"
    assert adapted(RadiusConfig(tau=0.3), Radius(), failed(Verdict.BELOW_NOISE), True).scale == 1
    assert adapted(REACH, Radius(scale=8.0), failed(Verdict.NON_FINITE), True).scale == 1
    assert adapted(REACH, Radius(), ACCEPTED, False).follows_step, "it had to look for another"
    assert adapted(REACH, Radius(follows_step=True), ACCEPTED, True).follows_step, "once is enough"
    assert not state.follows_step


SHAPES = [(32, 32), (32,), (2, 32)]


def started(begun=1.0, steps=100, shapes=SHAPES, minimiser=1e9):
    rule = Displacement()
    rule.total_steps = steps
    rule.begin(shapes, list(map(math.prod, shapes)), 1.0)
    rule.observe_probe(Probe(replace(ACCEPTED, step_size=minimiser), 1e-9, begun))
    return rule


@pytest.mark.parametrize(
    "begun, reach, by_loss, verdict, begins",
    [
        (2.0, 0.5, True, Verdict.ACCEPTED, 2.0),
        (2.0, 3.0, True, Verdict.NON_CONVEX, 3.0),
        # What was found by looking is as short as need be to see anything, and no measure of a step.
        (2.0, 3.0, False, Verdict.NON_CONVEX, 2.0),
        (2.0, 3.0, True, Verdict.NON_FINITE, None),
        (2.0, math.nan, True, Verdict.NON_DESCENT, None),
        # As where nothing says how long the direction is.
        (math.nan, 3.0, True, Verdict.NON_CONVEX, None),
    ],
)
def test_it_begins_where_shapes_say_but_no_nearer_than_the_first_radius(begun, reach, by_loss, verdict, begins):
    rule = Displacement()
    rule.observe_probe(Probe(failed(verdict), reach, begun, by_loss, not by_loss))
    assert rule.step_size == begins
    assert rule.wants_probe(7) is (begins is None), "until there is a step size, every step is probed"
    rule.observe_probe(Probe(ACCEPTED, 4.0, 4.0))
    assert rule.step_size == (begins or 4.0), "no later probe moves it"


@pytest.mark.parametrize(
    "bound, growth, head", [(math.inf, 1, 8), (math.nan, 1, 8), (2.0, 1, 8), (0.5, 1, 2), (0.1, 1, 1), (10.0, 10, 4)]
)
def test_a_head_beside_adapters_begins_no_faster_than_a_loss_above_0_can_fall(bound, growth, head):
    rule, whole = Displacement(), Displacement()
    shapes = [*3 * LORA, (4, 12), (4,)]
    for each, of in ((rule, shapes), (whole, SHAPES)):
        each.begin(of, list(map(math.prod, of)), growth)
        each.observe_probe(Probe(ACCEPTED, 1e-9, 2.0, bound=bound))
        assert each.step_size == 2.0
    assert (rule.multipliers(8) or 8 * [1]) == [*6 * [1], head, head]
    assert whole.multipliers(3) == [1, 8, 8]
    rule.observe_probe(Probe(ACCEPTED, 1e-9, 2.0, bound=1e-3))
    assert (rule.multipliers(8) or 8 * [1]) == [*6 * [1], head, head], "a later probe is a measurement"


@pytest.mark.parametrize("minimiser, most", [(1.05, 1.05), (0.1, 1.0), (None, 1.0)])
def test_it_grows_as_far_as_the_first_minimiser_and_comes_back_from_there(minimiser, most):
    rule = started(minimiser=minimiser)
    rule.observe_probe(Probe(replace(ACCEPTED, step_size=9.0), 1.0, 1.0))
    for _ in range(3):
        rule.observe(Measurement([-1.0, 1.0, 1.0], -0.9, 1.0, 99))
        assert rule.step_size == pytest.approx(most)
    late = rule.agreement
    rule.observe(Measurement([-1.0, 1.0, 1.0], math.nan, 1.0, 99))
    assert (rule.agreement, rule.step_size) == (late, most)
    for _ in range(9):
        rule.observe(Measurement([-1.0, 1.0, 1.0], 0.9, 1.0, 99))
    assert rule.step_size < most and rule.agreement.mean > 0.5
    unprobed = Displacement()
    unprobed.start(3.0)
    unprobed.observe(Measurement([], -0.9, 1.0, 99))
    assert unprobed.step_size == 3, "without a probe, it does not grow"


def test_probes_are_rare_and_measurements_fade():
    rule = started()
    assert [step for step in range(301) if rule.wants_probe(step)] == [0, 100, 200, 300]
    expected = [*range(1, 12), *range(12, 52, 2), *range(54, 136, 3), *range(136, 280, 4), 280]
    found = [step for step in range(281) if rule.wants_measurement(step)]
    assert found == expected
    for n, first in enumerate((12, 54, 136, 280), start=2):
        assert math.sqrt((found.index(first) + 1 + 4) / 4) == n, "where one counts half, every second, and so on"


@pytest.mark.parametrize("steps, length", [(100, 3), (1000, 30), (None, 30), (40, 1), (1, 1)])
def test_a_ramp_leads_to_the_base_step_size(steps, length):
    rule = started(steps=steps)
    found = [rule.factor(step) for step in range(length + 2)]
    assert found == pytest.approx([(step + 1) / length for step in range(length)] + [1, 1])


def test_the_base_step_size_follows_agreement_from_the_first_whole_step_on():
    rule = started(minimiser=9.0, steps=200)
    for step in range(1, 6):
        rule.observe(Measurement([-1.0, 1.0, 1.0], -0.9, 1.0, step))
    assert (rule.step_size, rule.agreement, rule.state.count) == (1.0, Agreement(), 5), "step 5 is the first"
    rule.observe(Measurement([-1.0, 1.0, 1.0], -0.9, 0.5, 6))
    first = math.exp(4 * 0.2 * 0.9 * 0.5 / math.sqrt(4))
    assert (rule.step_size, rule.agreement.count) == (pytest.approx(first), 1), "it counts as the first"


def test_it_begins_with_the_priors_and_has_no_multipliers_where_all_are_1():
    rule = Displacement()
    rule.total_steps = 50
    rule.begin(SHAPES, list(map(math.prod, SHAPES)), 1.0)
    rule.observe(Measurement([-1.0, 1.0, 1.0], -1.0, 1.0, 99))
    assert rule.prior == base_step_size(SHAPES, 50, PRIOR)
    assert rule.step_size is None and rule.multipliers(4) == [1, 8, 8, 1], "nothing is learned before the first step"
    assert started(shapes=SHAPES[:2]).multipliers(2) == []


def test_what_is_frozen_has_no_part_in_the_start_and_counts_by_its_size_once_it_is_trained():
    rule, without = Displacement(), Displacement()
    rule.begin([(9, 9), (), (2, 9)], [81, 8100, 18], 1.0)
    without.begin([(9, 9), (2, 9)], [81, 18], 1.0)
    assert rule.prior == without.prior and rule.multipliers(3) == [1, 1, 8]
    rule.start(1.0)
    rule.observe(Measurement([1.0, -1.0, None], 0.0, 1.0, 99))
    squares = [math.exp(2 * drift) for drift in rule.state.drift[:2]]
    assert (9 * squares[0] + 90 * squares[1]) / 99 == pytest.approx(1)


def test_measurements_count_less_and_less_and_as_much_as_the_step_is_long():
    rule, half, more = started(), started(), started()
    moves = []
    for _ in range(13):
        before = math.log(rule.step_size)
        for each, factor in ((rule, 1.0), (half, 0.5), (more, 3.0)):
            each.observe(Measurement([-1.0, 1.0, 1.0], -0.1, factor, 99))
        if not moves:
            assert rule.state.drift[1] < half.state.drift[1] < 0
        moves.append(math.log(rule.step_size) - before)
    means = [0.1 * (1 - MEMORY ** (k + 1)) for k in range(13)]
    assert moves == pytest.approx([GAIN * mean / math.sqrt(k + 4) for k, mean in enumerate(means)])
    assert math.log(half.step_size) == pytest.approx(math.log(rule.step_size) / 2)
    assert more.step_size == rule.step_size and more.multipliers(3) == rule.multipliers(3), "a schedule's peak is 1"


def test_measurements_are_of_the_way_that_training_has_come():
    """Slopes along it of each parameter, and signs over all elements, of the gradients as the loop clipped them."""
    params = [torch.nn.Parameter(torch.randn(4).double()), torch.nn.Parameter(torch.randn(3, 2).double())]
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = LQA(torch.optim.AdamW([*params[:1], unused, *params[1:]], lr=1.0), total_steps=200)
    beginning = [p.detach().clone() for p in params]
    for step in range(5):
        optimizer.zero_grad()
        ((1.0 + step) * sum((p**4).sum() for p in params)).backward()
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        way = [p.detach() - first for p, first in zip(params, beginning, strict=True)]
        slopes = [float((p.grad * w).sum()) for p, w in zip(params, way, strict=True)]
        signs = torch.cat([torch.sign(p.grad * w).flatten() for p, w in zip(params, way, strict=True)])
        optimizer.param_groups[0]["lr"] = 1 - step / 10
        optimizer.step()
        found = optimizer.last_measurement
        if step == 0:
            assert found is None
            continue
        assert found.slopes == pytest.approx([slopes[0], None, slopes[1]])
        assert found.agreement == pytest.approx(float(signs.mean()))
        assert found.factor == pytest.approx((step + 1) / 6 * (1 - step / 10)), "ramp and schedule"
        assert found.step == step


def test_the_papers_step_is_each_batchs_minimiser_or_the_last():
    rule, found = Paper(), []
    for fit, reach in (
        (failed(Verdict.NON_FINITE), 3.0),
        (failed(Verdict.NON_DESCENT), math.nan),
        (failed(Verdict.NON_CONVEX), 0.25),  # the radius, before any fit was usable
        (failed(Verdict.NON_CONVEX), 0.2),
        (ACCEPTED, 0.1),
        *((failed(verdict), 0.1) for verdict in Verdict if not verdict.usable),
    ):
        rule.observe_probe(Probe(fit, reach, 1.0))
        found.append(rule.step_size)
    assert found == [None, None, 0.25, 0.25, *6 * [0.5]]


def test_where_the_loss_is_no_scale_the_papers_step_follows_what_a_probe_can_see():
    for verdict, step_size in ((Verdict.NON_CONVEX, 0.1), (Verdict.BELOW_NOISE, 0.5), (Verdict.NON_FINITE, 0.5)):
        rule = Paper()
        rule.observe_probe(Probe(ACCEPTED, 0.25, 1.0, False, True))
        rule.observe_probe(Probe(failed(verdict), 0.1, 1.0, True, True))
        assert rule.step_size == step_size, verdict


def test_the_paper_probes_every_step_or_as_often_as_it_is_told_and_measures_nothing_else():
    rule, rare = Paper(), Paper(PaperConfig(probe_interval=3))
    assert rare.wants_probe(1), "nothing was measured yet"
    for each in (rule, rare):
        each.begin(SHAPES, list(map(math.prod, SHAPES)), 1.0)
        each.observe_probe(Probe(ACCEPTED, 0.25, 1.0))
        each.observe(Measurement([-1.0, 1.0, 1.0], -1.0, 1.0, 99))
        assert each.step_size == ACCEPTED.step_size and each.multipliers(3) == [] and each.factor(0) == 1
        assert not any(map(each.wants_measurement, range(100)))
    assert all(map(rule.wants_probe, range(9)))
    assert [step for step in range(9) if rare.wants_probe(step)] == [0, 3, 6]
    assert rule.prior == base_step_size(SHAPES, None, PRIOR), "beside which a first radius may be nothing"


def test_options_reach_what_they_are_of():
    rule, reach = build("displacement", {"eta": 0.1, "tau": 0.2, "probe_interval": 7, "probe_radius": 0.5})
    assert (rule.config.multipliers.eta, rule.config.probe_interval) == (0.1, 7)
    assert (reach.tau, reach.fixed) == (0.2, 0.5)
    rule, reach = build("paper", {"probe_interval": 7, "probe_radius": None})
    assert rule.config.probe_interval == 7 and reach == RadiusConfig()


NAMES = ["displacement", "paper"]
OUT_OF_RANGE = {
    "must be in (0, 1]": [("displacement", "eta", v) for v in (0, 1.5, "1", math.nan)],
    "must be in (0, 1)": [(name, "tau", v) for name in NAMES for v in (0.0, 1, "1", math.nan)],
    "must be an integer >= 1": [(name, "probe_interval", v) for name in NAMES for v in (0, 2.0, True, "2")],
    "must be a finite number > 0, or None for the rule": [
        (name, "probe_radius", v) for name in NAMES for v in (0.0, -1.0, math.nan, math.inf)
    ],
    "the rule 'paper' has no such option; tau, probe_interval, probe_radius": [("paper", "eta", 0.1)],
}


@pytest.mark.parametrize(
    "name, key, value, allowed", [(*case, allowed) for allowed, cases in OUT_OF_RANGE.items() for case in cases]
)
def test_an_option_that_is_unknown_or_out_of_range_is_named(name, key, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}: {allowed}")):
        build(name, {key: value})
