"""The rule of `cross_batch`: what moves the level, and what does not."""

import itertools
import math

import pytest
import torch

from hf_lqa import LQA, Fit, Verdict
from hf_lqa.cross_batch import CrossBatchPolicy

#: So large that the least level, 0.25 of one weight, is out of the way.
RADIUS = 1.0
PROBED = Fit(-1.0, math.nan, None, Verdict.NON_CONVEX)


def started(**options):
    policy = CrossBatchPolicy(**options)
    policy.observe_probe(PROBED, RADIUS)
    return policy


def after_first_steps(ratio=0.0, total_steps=100, final_factor=0.0, **options):
    policy = started(**options)
    policy.plan(total_steps, final_factor)
    for step in itertools.takewhile(policy.wants_start_slope, itertools.count()):
        assert policy.wants_end_slope(step)
        policy.observe_end([-1.0], [ratio], [1], 1.0)
    return policy


def grown(ends, verdicts):
    """By what the level grew in the first steps; `ends`: one a step, `verdicts`: of probes, by their steps."""
    policy = started()
    for step, end in enumerate(ends, start=1):
        policy.observe_end([-1.0], [end], [1], 1.0)
        if step in verdicts:
            policy.observe_probe(Fit(-1.0, 1.0, 1.0 if verdicts[step].usable else None, verdicts[step]), RADIUS)
    return policy.step_size / started().step_size


def test_it_probes_in_the_first_steps_and_rarely_then():
    policy = CrossBatchPolicy()
    assert policy.wants_probe(5), "nothing was measured yet"
    policy = started()
    assert [step for step in range(301) if policy.wants_probe(step)] == [0, 4, 7, 10, 100, 200, 300]
    policy.observe_probe(Fit(-1.0, 1.0, 1.0, Verdict.ACCEPTED), RADIUS)
    assert policy.wants_probe(7)
    policy.observe_probe(Fit(-1.0, -1.0, None, Verdict.NON_CONVEX), RADIUS)
    assert [step for step in range(301) if policy.wants_probe(step)] == [0, 100, 200, 300], "nothing is left to say"


def test_the_level_follows_the_slope_as_the_moments_settle():
    policy = started()
    assert policy.step_size == pytest.approx(4 / 3 * RADIUS)
    for step in range(12):
        policy.observe_end([-8.0 if step == 0 else -2.0], [0.0], [1], 1.0)
    settled = 4 / 3 * RADIUS * 8 / 2
    assert policy.step_size == pytest.approx(settled, rel=0.2)


def test_where_the_slope_is_no_noise_the_level_grows_to_where_half_of_it_is_left():
    for ratio, growth in ((-0.9, 5.0), (-0.75, 2.0), (-0.4, 1.0), (0.5, 1.0)):
        policy = after_first_steps(ratio)
        assert policy.growth == pytest.approx(growth ** (11 / 6)), ratio


def test_what_is_no_noise_in_a_noisy_slope_is_believed_while_the_parabolas_open_upwards():
    accepted, non_convex, noise = Verdict.ACCEPTED, Verdict.NON_CONVEX, Verdict.BELOW_NOISE
    convex = {4: accepted, 7: accepted, 10: accepted}
    persistent = 12 * [-0.1]
    assert grown(persistent, {}) == pytest.approx(1)
    assert grown(persistent, convex) == pytest.approx(math.exp(0.5 * 8)), "half a unit of logarithm a step"
    assert grown(persistent, {4: Verdict.CLAMPED}) == grown(persistent, convex), "the first says it for all"
    assert grown(persistent, {4: noise, 7: accepted}) == pytest.approx(math.exp(0.5 * 5)), "noise says nothing"
    assert grown(6 * [-0.1] + 6 * [0.0], convex) < math.exp(0.35 * 4), "little of it is left"
    assert grown(persistent[:7], convex) > 2
    taken_back = {4: accepted, 7: non_convex, 10: accepted}
    assert grown(persistent[:7], taken_back) == grown(persistent, taken_back) == pytest.approx(1), "at once"
    assert grown(persistent, {4: non_convex, 7: accepted}) == pytest.approx(1), "and never believed again"
    assert grown([0.4, *persistent[1:]], convex) > 10, "one slope that turns is noise"
    assert grown([0.4, 0.4, *persistent[2:]], convex) == pytest.approx(1, rel=0.15), "two, and the steps overshoot"


def test_the_level_stops_growing_where_most_of_what_is_no_noise_is_left():
    def level(minimum):
        """At the end of the first steps, if the slope changes along a parabola with this minimum."""
        policy = started()
        for step in range(1, 13):
            policy.observe_end([-1.0], [-0.1 * (1 - policy.step_size / minimum)], [1], 1.0)
            if step in (4, 7, 10):
                policy.observe_probe(Fit(-1.0, 1.0, 1.0, Verdict.ACCEPTED), RADIUS)
        return policy.step_size

    start = started().step_size
    for times in (5, 20, 50):
        # Averages lag behind growth, and the lowest ratio is not quite that of no step.
        assert 0.2 < level(times * start) / (times * start) < 0.6
    assert level(0.5 * start) == pytest.approx(start, rel=0.1), "never below where it began"


def test_slopes_that_come_out_of_their_noise_late_do_not_let_the_level_run_away():
    # Of a language model; the slow average, -0.07 at its lowest, would say that all of it is left to the last step.
    ends = [0.02, 0.01, 0.02, 0.07, 0.09, 0.12, 0.22, 0.1, 0.09, 0.1, 0.04, -0.01]
    assert 2 < grown([-end for end in ends], {4: Verdict.ACCEPTED}) < math.exp(2)


def test_the_first_steps_leave_a_level_that_is_not_too_short_for_so_many_weights():
    def levels(ends, sizes, alike=True):
        policy = CrossBatchPolicy()
        if alike:
            policy.begin([(size,) for size in sizes])
        policy.observe_probe(PROBED, 1e-6)
        for end in ends:
            policy.observe_end([-1.0, -1.0], [end, end], sizes, 1.0)
            yield policy.step_size

    first = 4 / 3 * 1e-6
    for sizes, least in (([3_000_000, 1_000_000], 0.25 / 2000), ([100, 0], 0.025)):
        *before, level = levels(12 * [-0.1], sizes)
        assert before == pytest.approx(11 * [first]) and level == pytest.approx(least)
    assert [*levels(12 * [-0.1], [100, 0], alike=False)] == pytest.approx(12 * [first]), "a gradient has any length"
    assert [*levels(12 * [-0.1], [10**14, 0])] == pytest.approx(12 * [first]), "a bound, and no target"
    assert [*levels([*(11 * [-0.1]), 9.0], [100, 0])][-1] == pytest.approx(first), "a step went too far already"


def test_the_slope_of_a_few_weights_does_not_decide():
    policies = started(), started()
    for _ in range(12):
        policies[0].observe_end([-5.0, -1.0], [-5.0, 0.0], [10, 1000], 1.0)
        policies[1].observe_end([-5.0, -1.0], [0.0, 0.0], [10, 1000], 1.0)
    assert policies[0].step_size == policies[1].step_size and policies[0].growth == 1


def test_a_table_of_word_vectors_does_not_outvote_the_layers():
    policies = started(), started()
    sizes = [30_000 * 400] + 60 * [400 * 400]
    for policy, ends in zip(policies, ([0.0] + 60 * [-0.9], 61 * [-0.9]), strict=True):
        for _ in range(12):
            policy.observe_end(61 * [-1.0], ends, sizes, 1.0)
    assert policies[0].growth == policies[1].growth > 1


def test_afterwards_it_aims_a_little_beyond_the_minimum():
    def moved(ratio):
        policy = after_first_steps(-0.4)
        before = policy.step_size
        policy.observe_end([], [ratio], [1], 1.0)
        return policy.step_size / before

    # A first observation is as large as its own recent size: 1 in the units of the aim, which is 0.5 * 0.4 here.
    gain = 0.3 / 2
    assert moved(-0.1) == pytest.approx(math.exp(gain * (1 + 0.5 * 0.4)))
    assert moved(0.1) == moved(0.7) == pytest.approx(math.exp(-gain * (1 - 0.5 * 0.4)))
    assert moved(0.0) == 1, "no observation"


@pytest.mark.parametrize(
    "total_steps, final_factor, short",
    [(50, 0, 0.0), (100, 0, 0.0), (300, 0, 0.8 / 3), (300, 0.1, 0.4 * 1.1 * 0.7), (100, 1, 0.8), (300, 1, 0.8)],
)
def test_it_aims_the_shorter_the_longer_a_run_and_the_less_its_schedule_decays(total_steps, final_factor, short):
    policy = after_first_steps(-0.2, total_steps, final_factor)
    before = policy.step_size
    policy.observe_end([], [0.1], [1], 1.0)
    aim = 0.5 * 0.2 - short
    assert math.log(policy.step_size / before) == pytest.approx(-0.3 / 2 * (1 - aim))


def test_a_run_whose_end_is_not_known_is_taken_for_one_without_an_end():
    known, unknown = after_first_steps(-0.2, 100, 1.0), started()
    for _ in range(12):
        unknown.observe_end([-1.0], [-0.2], [1], 1.0)
    for policy in (known, unknown):
        policy.observe_end([], [0.1], [1], 1.0)
    assert known.step_size == unknown.step_size


@pytest.mark.parametrize("total_steps, first", [(20, 12), (100, 12), (160, 20), (300, 24), (10_000, 24)])
def test_the_level_is_not_moved_by_single_slopes_in_the_first_eighth_of_a_run(total_steps, first):
    policy = started()
    policy.plan(total_steps)
    assert [step for step in range(100) if policy.wants_start_slope(step)] == list(range(first))


def test_a_long_run_waits_with_its_level_until_the_first_steps_are_over():
    policy = started()
    policy.plan(300)
    for _ in range(12):
        policy.observe_end([-1.0], [-0.1], [1], 1.0)
    policy.convex, level = True, policy.step_size
    for _ in range(12):
        policy.observe_end([-8.0], [-0.1], [1], 1.0)
    assert policy.step_size == level, "neither the slope nor what persists of it moves it"
    policy.observe_end([], [-0.1], [1], 1.0)
    assert policy.step_size > level


@pytest.mark.parametrize(("total_steps", "least"), [(1000, 0.5), (100, 1.0)])
def test_where_end_slopes_say_nothing_a_long_runs_level_falls_to_about_half_and_no_further(total_steps, least):
    policy = after_first_steps(-0.2, total_steps)
    before, levels = policy.step_size, []
    for step in range(3000):
        policy.observe_end([], [0.1 * (-1) ** step], [1], 1.0)
        levels.append(policy.step_size / before)
    assert min(levels) > 0.8 * least
    # It rests where 0.36 log2(2 level / before) is the 0.1 that is aimed beyond zero; short runs have nothing else.
    assert levels[-1] < 0.65 if least < 1 else levels[-1] > 1


def with_rates(left, sizes=None, **options):
    """After first steps at whose ends the shares `left` of the parameters' slopes were left."""
    policy = started(**options)
    policy.plan(100)
    sizes = sizes or [1] * len(left)
    for _ in range(12):
        policy.observe_end([-3.0] * len(left), [-3.0 * x for x in left], sizes, 1.0)
    policy.observe_end([], [0.0] * len(left), sizes, 1.0)
    return policy


def test_a_parameter_whose_slope_lasts_moves_further_and_all_together_as_far():
    assert started().relative_rates(2) == []
    rates = with_rates([0.64, 0.04]).relative_rates(3)
    # Their squares are as 0.64 to 0.04 with a mean of 1, to the nearest half of a doubling; the third was added later.
    assert rates == pytest.approx([2**0.5, 2**-1.5, 1.0])
    assert with_rates([0.25, 0.25]).relative_rates(2) == [1.0, 1.0]
    assert with_rates([0.64, 0.04], [10_000, 1]).relative_rates(2) == pytest.approx([1.0, 0.25])
    assert with_rates([0.9, -0.3, 0.0, 0.9]).relative_rates(4) == pytest.approx([2**0.5, 2**-2.5, 2**-2.5, 2**0.5])


SHAPES = [(2, 16), (), (4096, 16), (1024,), (1024, 16), (4, 4, 4, 4), (8, 16)]


def test_a_small_head_moves_further_from_the_first_step_on():
    policy = CrossBatchPolicy()
    policy.begin(SHAPES)
    sizes = [2 * 16, 4096 * 16, 1024 * 16, 8 * 16]
    weights = [math.sqrt(n) for n in sizes]
    typical = sum(w * math.log(n) for w, n in zip(weights, sizes, strict=True)) / sum(weights)
    exact = [(math.exp(typical) / n) ** (1 / 3) for n in sizes]
    assert exact[1] < 1 < exact[2] < exact[3] < 8
    rates = policy.relative_rates(8)
    # Not what comes before the last large one, as small tables of vectors do; the last was added later.
    assert rates == pytest.approx([1, 1, 1, 1, exact[2], 1, exact[3], 1], rel=2**0.25 - 1 + 1e-9)
    halves = [2 * math.log2(rate) for rate in rates]
    assert halves == pytest.approx([round(x) for x in halves]), "to half a doubling"
    policy = CrossBatchPolicy()
    policy.begin([(10**4, 10**4), (2, 2)])
    assert policy.relative_rates(2) == pytest.approx([1, 8]), "bounded"


@pytest.mark.parametrize(
    "shapes",
    [[], [(5,), (3, 3, 3)], [(64, 32), (32,)], [(64, 32), (32, 64)], [(0, 3), (2, 2)], [(9, 9), (2, 9), (99, 9)]],
)
def test_nothing_moves_further_where_no_small_matrix_comes_last(shapes):
    policy = CrossBatchPolicy()
    policy.begin(shapes)
    assert policy.relative_rates(len(shapes)) == []


def with_first_rates(ends, begin=True):
    policy, sizes = started(), [1024, 16]
    policy.plan(100)
    if begin:
        policy.begin([(32, 32), (4, 4)])
    for end in ends:
        rates = policy.relative_rates(2) or [1.0, 1.0]
        policy.observe_end([-3.0 * x for x in rates], [end * 3.0 * x for x in rates], sizes, 1.0)
    return policy


def test_rates_after_the_first_steps_begin_with_those_of_the_first():
    policy, without = with_first_rates(12 * [-0.2]), with_first_rates(12 * [-0.2], begin=False)
    first = policy.relative_rates(2)
    assert first[0] == 1 < first[1] and without.relative_rates(2) == []
    for scale, end in ((first[1], 0.1), (first[1], -0.1)):
        # What a parameter moves further by shows in its slope, and is not what the level sees.
        policy.observe_end([], [end, end * scale], [1024, 16], 1.0)
        without.observe_end([], [end, end], [1024, 16], 1.0)
        if end > 0:
            after = policy.relative_rates(2)
            assert after[1] / after[0] == pytest.approx(first[1]) and without.relative_rates(2) == [1, 1]
            policy.rates = first
    assert policy.step_size == pytest.approx(without.step_size)


def test_a_step_beyond_the_minimum_among_the_first_ends_first_rates():
    assert with_first_rates([0.3]).relative_rates(2) != [], "of one step, that says little"
    policy = with_first_rates([0.3, 0.3])
    assert policy.overshot and policy.relative_rates(2) == []
    loaded = CrossBatchPolicy()
    loaded.load_state_dict(policy.state_dict())
    assert loaded.relative_rates(2) == []
    kept = with_first_rates([-0.2])
    loaded.load_state_dict(kept.state_dict())
    assert loaded.relative_rates(2) == kept.relative_rates(2) != []


def test_relative_rates_follow_the_slopes_along_all_the_way():
    policy, moving = with_rates([0.2, 0.2, 0.2]), [[], []]
    for step in range(25):
        rates = policy.relative_rates(3)
        # Single moves say the opposite.
        policy.observe_end([], [0.1, -0.1, 0.1], [1, 1, 1], 1.0, [-5.0, 5.0, 5.0 * (-1) ** step])
        for path, rate in zip(moving, rates[:2], strict=True):
            path.append(rate)
    assert moving == [sorted(moving[0]), sorted(moving[1], reverse=True)]
    assert moving[0][-1] == pytest.approx(3**0.5, rel=0.2) and moving[1][-1] == pytest.approx(1 / 8), "bounded"


def test_the_bound_of_relative_rates_narrows():
    policy, reached = with_rates([0.2] * 20), {}
    for _ in range(130):
        bound = min(max(200 / max(policy.observations, 1), 2), 8)
        policy.observe_end([], [0.1] * 20, [1] * 20, 1.0, [-5.0, *(19 * [0.1 * (-1) ** policy.observations])])
        rates = policy.relative_rates(20)
        assert max(*rates, 1 / min(rates)) <= bound * 2**0.25 * (1 + 1e-9), "to half a doubling"
        reached[policy.observations] = max(rates)
    assert [reached[k] for k in (50, 130)] == pytest.approx([4, 2])


@pytest.mark.parametrize("ways", [[], [0.0, 0.0], [math.nan, math.inf]])
def test_relative_rates_stay_where_nothing_is_known_of_the_way(ways):
    policy = with_rates([0.64, 0.04])
    before = policy.relative_rates(2)
    for _ in range(20):
        policy.observe_end([], [0.1, -0.1], [1, 1], 1.0, ways)
    assert policy.relative_rates(2) == before


def test_relative_rates_do_not_change_what_the_level_sees():
    policies = with_rates([0.64, 0.04, 0.3]), with_rates([0.64, 0.04, 0.3])
    policies[1].rates = [1.0, 1.0, 1.0]
    for policy in policies:
        rates = policy.relative_rates(3)
        policy.observe_end([], [0.2 * rates[0], -0.1 * rates[1], 0.1 * rates[2]], [1, 1, 1], 1.0)
    assert policies[0].step_size == policies[1].step_size


def test_what_is_not_observed_moves_as_the_parameter_before_it():
    policy = started()
    policy.plan(100)
    for _ in range(12):
        policy.observe_end([0.0, -1.0, 0.0, 0.0, -1.0], [math.nan, -0.64, math.nan, math.nan, -0.04], [1] * 5, 1.0)
    for _ in range(2):
        policy.observe_end([], [math.nan, 0.1, math.nan, math.nan, 0.1], [1] * 5, 1.0)
    assert policy.relative_rates(5) == pytest.approx([2**0.5, 2**0.5, 2**0.5, 2**0.5, 2**-1.5])


def test_a_plan_out_of_range_is_refused():
    with pytest.raises(ValueError, match="total_steps=0"):
        CrossBatchPolicy().plan(0)
    with pytest.raises(ValueError, match=r"final_factor=1\.5"):
        CrossBatchPolicy().plan(100, 1.5)


def test_moves_fade_with_evidence_and_with_the_schedule():
    policy, half = after_first_steps(), after_first_steps()
    steps = []
    for _ in range(40):
        before = policy.step_size
        policy.observe_end([], [-0.1], [1], 1.0)
        half.observe_end([], [-0.1], [1], 0.5)
        steps.append(math.log(policy.step_size / before))
    assert steps[-1] == pytest.approx(steps[0] * math.sqrt(4 / 43), rel=0.01)
    start = math.log(after_first_steps().step_size)
    assert math.log(half.step_size) - start == pytest.approx((math.log(policy.step_size) - start) / 2)


def test_steps_are_shortened_where_slopes_have_shrunk_below_a_tenth_of_the_first_and_come_back_with_them():
    policy = after_first_steps(-0.8)
    for _ in range(10):
        assert policy.factor(50) == 1, "ten observations say so, not one"
        policy.observe_end([], [0.02], [1], 1.0)
    assert policy.factor(50) == pytest.approx(0.02 / abs(policy.starts[0]) / (0.1 * 0.8))
    assert policy.factor(0) == pytest.approx(policy.factor(50) / 3), "beside the ramp"
    for _ in range(100):
        policy.observe_end([], [1e-6], [1], 1.0)
    assert policy.factor(50) == 0.1
    policy.observe_end([], [0.5], [1], 1.0)
    assert policy.factor(50) == 1


@pytest.mark.parametrize(("total_steps", "length"), [(100, 12), (160, 20), (1000, 24)])
def test_a_step_beyond_the_minimum_among_the_first_lengthens_the_ramp(total_steps, length):
    policy = started()
    policy.plan(total_steps)
    policy.observe_end([-1.0], [0.3], [1], 1 / 3)
    assert policy.factor(2) == 1, "a base optimizer's first direction says little"
    policy.observe_end([-1.0], [0.3], [1], 2 / 3)
    assert [policy.factor(step) for step in (2, 5, 100)] == pytest.approx([3 / length, 6 / length, 1])
    assert policy.step_size == started().step_size, "the level stays"
    loaded = CrossBatchPolicy()
    loaded.plan(total_steps)
    loaded.load_state_dict(policy.state_dict())
    assert loaded.factor(2) == policy.factor(2)


@pytest.mark.parametrize(("end", "factor"), [(0.4, 2 / 3), (0.6, 2 / 12)])
def test_a_first_step_far_beyond_the_minimum_lengthens_the_ramp_alone(end, factor):
    policy = started()
    policy.plan(100)
    policy.observe_end([-1.0], [end], [1], 1 / 3)
    assert policy.factor(1) == pytest.approx(factor)
    assert policy.step_size == started().step_size, "the level stays"
    assert policy.wants_probe(4) is (end < 0.5)


def test_later_steps_beyond_the_minimum_do_not_and_a_longer_warmup_stays():
    policy = started()
    policy.plan(1000)
    for step in range(24):
        policy.observe_end([-1.0], [-0.3 if step < 12 else 1.0], [1], 1.0)
    assert policy.factor(3) == 1
    policy = started(warmup=50)
    for _ in range(2):
        policy.observe_end([-1.0], [0.3], [1], 0.1)
    assert policy.factor(9) == 0.2


def test_steps_are_not_shortened_where_most_of_the_first_slope_was_noise():
    policy = after_first_steps(-0.05)
    for step in range(100):
        policy.observe_end([], [0.02 * (-1) ** step], [1], 1.0)
    assert policy.factor(50) == 1


def voted(votes, ratio):
    """By what `votes` move the logarithm of the level, one observation after the other."""
    policy, without = after_first_steps(ratio), after_first_steps(ratio)
    assert policy.wants_vote is (ratio < -0.4)
    moves = []
    for vote in votes:
        before = policy.step_size / without.step_size
        for each, cast in ((policy, vote), (without, 0.0)):
            each.observe_end([], [0.1], [1], 1.0, vote=cast)
        # What draws the level back knows how far it is, and is small beside.
        moves.append(math.log(policy.step_size / without.step_size / before))
    return moves


def test_where_slopes_are_hardly_noise_a_vote_moves_the_level_and_fades_faster_than_slopes():
    moves = voted([-0.01] * 30, -0.9)
    assert moves[0] == pytest.approx(0.3)
    for k, move in enumerate(moves):
        assert 0 < move <= 0.3 / (1 + k / 12) + 1e-9, "scale-free: a vote of one in a hundred is one of its own rms"
    assert moves[29] == pytest.approx(0.3 / (1 + 29 / 12), abs=0.03)
    down = voted([0.3], -0.9)
    assert down[0] == pytest.approx(-moves[0])
    weaker = voted([-0.01], -0.5)
    assert weaker[0] == pytest.approx(moves[0] / 2, rel=1e-6)


def test_where_more_of_a_slope_is_noise_votes_are_not_asked_for_and_do_not_count():
    assert voted([-0.01] * 5, -0.35) == [0.0] * 5


@pytest.mark.parametrize(("noisy", "wanted"), [(20, True), (30, False)])
def test_a_quarter_of_the_elements_that_is_all_noise_keeps_votes_from_counting(noisy, wanted):
    policy, sizes = started(), [100 - noisy, noisy]
    for _ in range(24):
        policy.observe_end([-1.0, -1.0], [-0.9, -0.01], sizes, 1.0)
    policy.observe_end([], [0.1, 0.1], sizes, 1.0)
    assert policy.wants_vote is wanted
    loaded = CrossBatchPolicy()
    loaded.load_state_dict(policy.state_dict())
    assert loaded.wants_vote is wanted


@pytest.mark.parametrize("vote", [math.nan, math.inf])
def test_a_vote_that_is_no_number_does_not_count(vote):
    assert voted([vote], -0.9) == [0.0]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(scale):
    policies = started(), started()
    torch.manual_seed(0)
    for step in range(60):
        starts, ends = (-torch.rand(3)).tolist(), torch.randn(3).tolist()
        for policy, unit in zip(policies, (1, scale), strict=True):
            policy.observe_end([unit * s for s in starts if step < 12], [unit * e for e in ends], [5, 6, 7], 0.9)
    assert policies[0].step_size == pytest.approx(policies[1].step_size, rel=1e-9)


def test_slopes_are_those_of_the_loss_parameter_by_parameter(monkeypatch):
    """Along the move that was made: at its start on its own batch, at its end on the next; clipping divided out.

    After the first steps not at its start, but along all the way, where elements vote, too.
    """
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, dtype=torch.double)), torch.nn.Parameter(torch.randn(3, 2).double())]
    optimizer, seen = LQA(torch.optim.AdamW(params, lr=1.0), warmup=0), []
    moved, starts, step_size, beginning = None, [], 1.0, [p.detach().clone() for p in params]
    monkeypatch.setattr(optimizer.policy, "wants_start_slope", lambda step: step < 2)
    monkeypatch.setattr(type(optimizer.policy), "wants_vote", True)
    monkeypatch.setattr(optimizer.policy, "observe_end", lambda *slopes: seen.append(slopes))
    for step in range(5):
        scale = 1.0 + step

        def loss(scale=scale):
            return scale * sum((p**4).sum() for p in params)

        gradients = torch.autograd.grad(loss(), params)
        optimizer.zero_grad()
        loss().backward()
        ends = None if moved is None else [float((g * m).sum()) for g, m in zip(gradients, moved, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.observe_clipping(norm, 0.1)
        before = [p.detach().clone() for p in params]
        optimizer.step(loss)
        if ends is not None:
            found_starts, found_ends, sizes, factor, ways, vote = seen[-1]
            assert sizes == [4, 6] and factor == 1
            if step <= 2:
                assert found_starts == pytest.approx(starts) and (ways, vote) == ([], 0)
            else:
                way = [(b - first).flatten() for b, first in zip(before, beginning, strict=True)]
                along = [float(g.flatten() @ w) for g, w in zip(gradients, way, strict=True)]
                assert ways == pytest.approx(along) and found_starts == []
                signs = [torch.sign(g.flatten() * w) for g, w in zip(gradients, way, strict=True)]
                assert vote == pytest.approx(float(torch.cat(signs).mean()))
            assert found_ends == pytest.approx([end / step_size for end in ends])
            assert optimizer.last_end_slope == pytest.approx(sum(ends) / step_size)
        moved = [p.detach() - b for p, b in zip(params, before, strict=True)]
        step_size = optimizer.step_size
        starts = [float((g * m).sum()) / step_size for g, m in zip(gradients, moved, strict=True)]
    assert len(seen) == 4
