# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the adaptive scale does to the variance, and to what it is tied."""

import gc
import weakref

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyro_rb import STLTrace_ELBO
from pyro_rb.diagnostics.stats import summary as stats
from tests.support.cases import Case
from tests.support.common import assert_variance_ratio
from tests.support.elbo_contract import case_args, draw_gradients
from tests.support.models import CONJ_X, conj, mix_model, multivariate, two

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def auto_normal(init_scale, train_steps=0):
    case = Case(mix_model, AutoNormal(mix_model, init_scale=init_scale), (torch.tensor(CONJ_X),))
    svi = SVI(case.model, case.guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(train_steps):
        svi.step(*case.args)
    return case


# What is measured on each, and how much of Trace_ELBO's variance there may be. Each bound is
# the ratio of stl.rst within its error, with room for the seed.
STATES = {
    "conj, well fitted": (lambda: conj(shift=0.1, width=1.0), None),
    "conj, too narrow": (lambda: conj(shift=0.3, width=0.2), 0.15),
    "conj, too wide": (lambda: conj(shift=0.3, width=4.0), 0.25),
    "two, wide": (two, None),
    "multivariate": (multivariate, None),
    "mix, Pyro's default scale": (lambda: auto_normal(0.1), 0.65),
    "mix, trained": (lambda: auto_normal(0.1, 400), None),
}


def total_variance(samples):
    return sum(s.var(0).sum().item() for s in samples.values())


def flat(samples):
    return torch.cat([s.reshape(len(s), -1) for s in samples.values()], -1)


@pytest.mark.parametrize("name", STATES)
def test_variance_is_near_the_better_of_both(name):
    make, below = STATES[name]
    case, num_samples = make(), 500
    plain = draw_gradients(Trace_ELBO(), case, num_samples, seed=0)
    path = draw_gradients(STLTrace_ELBO(control_variate_scale=1.0), case, num_samples, seed=0)
    adaptive = draw_gradients(STLTrace_ELBO(), case, num_samples, seed=0, num_burn_in=100)
    best = min(plain, path, key=total_variance)
    # The same random numbers on both sides, so that heavy tails cancel.
    squares = [(flat(g) - flat(g).mean(0)).square().sum(-1) for g in (adaptive, best)]
    ratio, error = stats.ratio_of_means(*squares)
    assert ratio + 4 * error < 1.1
    if below is not None:
        assert_variance_ratio(adaptive, plain, below=below)


@pytest.mark.parametrize("init_scale", [0.1, 1.0])
def test_cold_start(init_scale):
    # Over many cold starts: the mean square of each of the first 30 gradients, about
    # the true mean, with parameters held fixed.
    case = auto_normal(init_scale)
    plain = flat(draw_gradients(Trace_ELBO(), case, 300, seed=100))  # the same at each step
    mean = plain.mean(0)
    adaptive = [flat(draw_gradients(STLTrace_ELBO(), case, 30, seed=start)) for start in range(30)]
    square = (torch.stack(adaptive) - mean).square().sum(-1).mean(0)  # [step]
    square = square / (plain - mean).square().sum(-1).mean()
    assert square.max() < 2.0
    assert square[10:].mean() < 1.0


def test_two_models_keep_their_own_scales():
    narrow, wide = conj(shift=0.3, width=0.2), two()
    elbo = STLTrace_ELBO()
    for seed in range(60):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(*case_args(narrow))
        narrow_scale = elbo._scales["z"]
        elbo.loss_and_grads(*case_args(wide))
        wide_scale = elbo._scales["z1"]
    assert narrow_scale < 0.2 < 0.8 < wide_scale


def test_state_goes_with_the_parameters():
    elbo = STLTrace_ELBO()
    case = conj()
    elbo.loss_and_grads(*case_args(case))
    assert len(elbo._adaptive._variates) == 2
    del case
    pyro.clear_param_store()
    gc.collect()
    assert len(elbo._adaptive._variates) == 0


def test_nothing_is_learned_without_gradients():
    case = conj()
    elbo = STLTrace_ELBO()
    with torch.no_grad():
        elbo.differentiable_loss(*case_args(case))
    elbo.loss(*case_args(case))
    assert len(elbo._adaptive._variates) == 0


def test_a_step_that_is_not_finite_is_forgotten():
    case = conj(shift=0.3, width=0.2)
    elbo = STLTrace_ELBO()
    for seed in range(30):
        pyro.set_rng_seed(seed)
        if seed == 20:
            bad = (torch.full((4,), float("nan")),)
            with pytest.warns(UserWarning, match="NaN"), pyro.validation_enabled(False):
                elbo.loss_and_grads(case.model, case.guide, *bad)
        elbo.loss_and_grads(*case_args(case))
    assert 0.0 < elbo._scales["z"] < 0.2


def test_particles_of_a_step_share_the_scale():
    case = conj(shift=0.3, width=0.2)
    elbo = STLTrace_ELBO(num_particles=4)
    for _ in range(10):
        scales = []
        for model_trace, guide_trace in elbo._get_traces(case.model, case.guide, case.args, {}):
            elbo._differentiable_loss_particle(model_trace, guide_trace)
            scales.append(elbo._scales["z"])
        assert len(set(scales)) == 1
    assert scales[0] > 0.0


def test_graph_is_not_kept():
    case = conj()
    elbo = STLTrace_ELBO()
    draws = []
    get_terms = elbo._get_terms

    def watch(*args):
        for particle, terms in get_terms(*args):
            draws.append(weakref.ref(terms.guide_trace.nodes["z"]["value"]))
            yield particle, terms
            del terms

    elbo._get_terms = watch
    gc.disable()
    try:
        for _ in range(3):
            elbo.loss_and_grads(*case_args(case))
        assert [draw() for draw in draws] == [None] * 3
    finally:
        gc.enable()
