# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_rb import STLTrace_ELBO, measure_noise
from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.noise.noise import _squared_mean
from tests.support.models import conj


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.double)


def model():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def guide(loc=2.0):
    # The loss is -loc . noise - |loc|^2 / 2 up to its sign, the gradient loc + noise.
    loc = pyro.param("loc", torch.full((3,), loc))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def test_known_signal_and_noise():
    noise = measure_noise(Trace_ELBO(), model, guide, num_samples=300)
    assert noise.signal == pytest.approx(12.0, abs=4 * noise.signal_error)
    assert noise.signal_error == pytest.approx(2 * math.sqrt(12.0 / 300), rel=0.6)
    assert noise.variance == pytest.approx(3.0, rel=0.25)
    assert noise.noise_scale == noise.variance / noise.signal
    assert noise.required_draws(0.1) == math.ceil(100 * noise.noise_scale)
    low, high = noise.bounds(0.1)
    assert low <= 25 <= high and low <= noise.required_draws(0.1) <= high
    assert noise.loss == pytest.approx(6.0, abs=0.8)
    assert noise.loss_sd == pytest.approx(math.sqrt(12.0), rel=0.2)
    assert noise.required_loss_draws(0.5) == math.ceil(4 * noise.loss_sd**2)
    assert "draws for a relative error of 10% of the gradient: " in str(noise)
    assert "no gradient can be told from zero" not in str(noise)


def test_that_many_draws_give_that_error():
    case = conj()
    loss = "Trace_ELBO:num_particles=2"
    noise = measure_noise(loss, case.model, case.guide, case.args, num_samples=200)
    particles = noise.required_particles(0.3)
    assert particles == 2 * noise.required_draws(0.3)
    elbo = Trace_ELBO(num_particles=int(particles), vectorize_particles=True, max_plate_nesting=1)
    draws = sample_gradients(elbo, case.model, case.guide, case.args, num_samples=60, seed=5)
    exact = case.exact_gradient()
    error = sum((draws[n] - exact[n]).square().sum(-1).mean() for n in exact)
    size = sum(g.square().sum() for g in exact.values())
    assert (error / size).sqrt().item() == pytest.approx(0.3, rel=0.3)


def test_no_signal_at_the_optimum():
    noise = measure_noise(Trace_ELBO(), model, lambda: guide(0.0), num_samples=200)
    assert noise.signal < 3 * noise.signal_error
    assert noise.bounds(0.1)[1] == math.inf
    assert "infinitely many" in str(noise)
    assert noise.required_loss_draws(1.0) == 1  # the loss itself is exact there


def test_no_noise_takes_one_draw():
    case = conj(0.0, 1.0)
    path = STLTrace_ELBO(control_variate_scale=1.0)
    noise = measure_noise(path, case.model, case.guide, case.args, num_samples=40)
    assert noise.variance == pytest.approx(0.0, abs=1e-20)


def test_signal_is_unbiased_and_its_error_right():
    estimates = [_squared_mean(list(0.3 + torch.randn(20, 5))) for _ in range(400)]
    signals, errors = torch.tensor(estimates).T
    assert signals.mean().item() == pytest.approx(0.45, abs=4 * signals.std().item() / 20)
    assert errors.square().mean().sqrt().item() == pytest.approx(signals.std().item(), rel=0.2)


def test_world_and_loss_are_left_alone():
    loss, state = STLTrace_ELBO(), torch.get_rng_state()
    measure_noise(loss, model, guide, num_samples=40, num_burn_in=2)
    assert not pyro.get_param_store() and torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="there was none"):
        loss.report()


def test_misuse():
    with pytest.raises(ValueError, match="expected num_samples >= 40 and num_burn_in >= 0, got num_samples=39"):
        measure_noise("Trace_ELBO", model, guide, num_samples=39)
    noise = measure_noise("Trace_ELBO", model, guide, num_samples=40)
    with pytest.raises(ValueError, match="rel_error: expected a number > 0, got 0"):
        noise.required_draws(0)
    with pytest.raises(ValueError, match="error: expected a number > 0, got -1"):
        noise.required_loss_draws(-1)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_gradients_that_are_not_finite():
    def bad():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", (z - 1.0).log())

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="not finite. GradientGuard says where"):
        measure_noise("Trace_ELBO", bad, guide, num_samples=40)
