# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_rb import STLTrace_ELBO, StopRule
from pyro_rb.diagnostics.stats.stopping import _standard_error
from tests.conftest import SEED
from tests.support.models import conj, poisson


def normal(rng, count):
    return rng.normal(size=count)


def heavy(rng, count):
    """Student's t with 2 degrees of freedom: infinite variance."""
    return rng.standard_t(2, size=count)


def spikes(rng, count):
    """Normal, but one in a hundred has a Pareto spike, of infinite variance and one-sided."""
    return rng.normal(size=count) + (rng.random(count) < 0.01) * rng.pareto(1.2, size=count) * 20


def wandering(rng, count):
    """Correlated over some ten steps."""
    noise, state = np.empty(count), 0.0
    for i, e in enumerate(rng.normal(size=count) * math.sqrt(1 - 0.9**2)):
        noise[i] = state = 0.9 * state + e
    return noise


def stop_time(curve, noise, seed, count=12000, **options):
    """The step at which the rule stops, or None; and the rule."""
    rng = np.random.default_rng([SEED, seed])
    rule = StopRule(**options)
    for i, loss in enumerate((curve(np.arange(count)) + noise(rng, count)).tolist(), start=1):
        if rule.update(loss):
            return i, rule
    return None, rule


def improvement(curve, step):
    """What the rule would see without noise."""
    quarter = step // 4
    values = curve(np.arange(step - 2 * quarter, step))
    return values[:quarter].mean() - values[quarter:].mean()


@pytest.mark.parametrize("noise", [normal, heavy, spikes], ids=lambda f: f.__name__)
def test_stops_once_the_loss_is_flat(noise):
    def curve(t):
        return 100 * np.exp(-t / 200)

    times = [stop_time(curve, noise, seed, tolerance=0.2)[0] for seed in range(20)]
    stopped = [t for t in times if t is not None]
    assert len(stopped) >= 18
    # Never while there was more to gain than the tolerance, and within reason afterwards.
    assert all(improvement(curve, t) < 0.2 and curve(t) < 0.2 for t in stopped)
    assert np.median(stopped) < 6000


@pytest.mark.parametrize("noise", [normal, heavy, spikes, wandering], ids=lambda f: f.__name__)
def test_slow_progress_is_not_stopped(noise):
    # The logarithm gains the same in each third: here twice the tolerance, for ever.
    def curve(t):
        return -0.4 / 0.3365 * np.log(t + 1)

    assert improvement(curve, 5000) == pytest.approx(0.4, rel=0.01)
    times = [stop_time(curve, noise, seed, tolerance=0.2)[0] for seed in range(20)]
    assert times.count(None) >= 19


def test_false_stops_are_as_rare_as_promised():
    # Progress that exceeds the tolerance by nothing: the hardest case.
    def curve(t):
        return -0.2 / 0.3365 * np.log(t + 1)

    times = [stop_time(curve, normal, seed, tolerance=0.2, failure_rate=0.2)[0] for seed in range(60)]
    assert 60 - times.count(None) <= 20  # 12 expected at most; 20 with probability 0.01


def test_correlated_losses_take_longer():
    def curve(t):
        return 0.0 * t

    quick, _ = stop_time(curve, normal, 0, tolerance=0.3)
    slow, rule = stop_time(curve, wandering, 0, tolerance=0.3, count=40000)
    assert quick < 2000
    assert slow is None or slow > 2 * quick


def test_standard_error_of_blocks():
    rng = np.random.default_rng(SEED)
    independent = [_standard_error(rng.normal(size=(2, 10))) for _ in range(300)]
    known = [e for e in independent if math.isfinite(e)]
    assert len(known) > 280
    # The true one is sqrt(2 / 10); chance correlation makes the estimate larger.
    assert 0.44 < np.median(known) < 0.52
    # Neighbours that share a part of their noise, and blocks that are the same five times.
    noise = rng.normal(size=(300, 21))
    alike = [_standard_error((x[1:] + 0.3 * x[:-1]).reshape(2, 10)) for x in noise]
    same = [_standard_error(np.repeat(x[:4], 5).reshape(2, 10)) for x in noise]
    differences = [np.diff((x[1:] + 0.3 * x[:-1]).reshape(2, 10).mean(1)) for x in noise]
    assert np.median(alike) > 0.9 * np.std(differences)
    assert np.isinf(same).mean() > 0.95
    assert math.isinf(_standard_error(np.arange(20.0).reshape(2, 10)))


@pytest.mark.parametrize("length, is_seen", [(800, True), (20000, False)])
def test_plateaus(length, is_seen):
    # Flat, then a further fall. It is seen if the plateau is short beside what came before.
    def curve(t):
        return np.where(t < 4000, 40 - t / 100, np.where(t < 4000 + length, 0.0, -(t - 4000 - length) / 100.0))

    step, rule = stop_time(curve, normal, 0, tolerance=0.5, count=25000)
    assert (step is None or step > 4000 + length) == is_seen


def test_without_noise():
    step, rule = stop_time(lambda t: 10 + np.exp(-t / 100.0), lambda rng, n: np.zeros(n), 0, tolerance=1e-3)
    assert 600 < step < 4000
    for level in (10, 0):  # zero where the guide is the posterior
        step, rule = stop_time(lambda t: level + 0.0 * t, lambda rng, n: np.zeros(n), 0)
        assert step == 400 and rule.stopped
    step, rule = stop_time(lambda t: -0.1 * t, lambda rng, n: np.zeros(n), 0)
    assert step is None


def test_tolerance_follows_the_noise():
    for scale in (1.0, 100.0):
        rule = stop_time(lambda t: 0.0 * t, lambda rng, n: scale * normal(rng, n), 1, noise_share=0.3)[1]
        assert rule.last_check.tolerance == pytest.approx(0.3 * scale, rel=0.15)
        assert rule.last_check.bound < rule.last_check.tolerance


def test_steps_that_were_skipped_do_not_count():
    rule = StopRule(tolerance=1.0, min_steps=80)
    for i in range(79):
        assert not rule.update(torch.tensor(1.0, requires_grad=True))
        assert not rule.update(math.nan)
    assert rule.update(1.0) and rule.stopped
    assert rule.num_steps == 159 and rule.num_ignored == 79
    assert rule.last_check.step == 80
    assert rule.update(math.inf) and rule.update(-100.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": 0.0}, "tolerance: expected a number > 0 or None, got 0.0"),
        ({"min_steps": 79}, "min_steps: expected at least 80, got 79"),
        ({"failure_rate": 1.0}, "failure_rate must lie between 0 and 1, got 1.0"),
        ({"noise_share": -1}, "noise_share: expected a number > 0, got -1"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        StopRule(**options)


@pytest.mark.parametrize("make, loss", [(conj, STLTrace_ELBO), (poisson, Trace_ELBO)])
def test_svi_stops_at_the_optimum(make, loss):
    case = make(2.0, 2.0) if make is conj else make()
    elbo = loss(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    start = case.exact_loss().item()
    rule = StopRule(tolerance=0.1)
    while not rule.update(svi.step(*case.args)) and rule.num_steps < 3000:
        pass
    assert rule.stopped
    at_stop = case.exact_loss().item()
    optimum = {conj: 6.434, poisson: 6.031}[make]
    assert start - optimum > 0.7
    assert optimum - 1e-3 < at_stop < optimum + 0.1
