# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients, values and draws of RVRSGuide against sums on a grid."""

from typing import Any, Dict

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.stats import kstest

from pyro_rb import RVRSGuide
from pyro_rb.diagnostics.run.gradients import sample_gradients
from pyro_rb.infer import rvrs_guide, rvrs_surrogate
from tests.infer.rvrs.models import CASES, GRID, Local, curve
from tests.support.common import assert_unbiased

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def dtype():
    torch.set_default_dtype(torch.float64)


def make(case: str, epsilon: float, **options: Any) -> Any:
    model, guide, bound, T = CASES[case]
    rvrs = RVRSGuide(model, guide, T=T, epsilon=epsilon, adaptation="fixed", **options)
    rvrs()
    return model, rvrs, lambda: bound(T, epsilon)


def exact_gradient(bound: Any) -> Dict[str, torch.Tensor]:
    parameters = dict(pyro.get_param_store().named_parameters())
    grads = torch.autograd.grad(-bound(), list(parameters.values()))
    return dict(zip(parameters, grads))


def check(model: Any, guide: Any, bound: Any, elbo: Any, num: int, detect: Any) -> None:
    """z-tests of all gradients, and of the value."""
    expected = exact_gradient(bound)
    parameters = dict(pyro.get_param_store().named_parameters())
    losses = []

    class Recorded(type(elbo)):
        def loss_and_grads(self, *args, **kwargs):
            losses.append(super().loss_and_grads(*args, **kwargs))
            return losses[-1]

    elbo.__class__ = Recorded
    with pyro.validation_enabled(False):
        samples = sample_gradients(elbo, model, guide, (), None, num, parameters=parameters, seed=0)
    assert_unbiased(samples, expected, detect=detect)
    values = torch.tensor(losses[-num:]).unsqueeze(-1)
    assert_unbiased(values, -bound().detach().reshape(1), detect=detect)


@pytest.mark.parametrize("epsilon", [0.01, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_vectorized_particles(case, epsilon):
    elbo = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    model, guide, bound = make(case, epsilon)
    assert guide.T == CASES[case][3]
    check(model, guide, bound, elbo, 40, 0.3)


@pytest.mark.parametrize("num_samples, case", [(2, "one"), (5, "two")])
def test_plain(num_samples, case):
    model, guide, bound = make(case, 0.1, num_samples=num_samples)
    check(model, guide, bound, Trace_ELBO(), 500, 0.6)


def test_looped_particles():
    model, guide, bound = make("one", 0.1, num_samples=3)
    check(model, guide, bound, Trace_ELBO(num_particles=3), 200, 0.6)


def test_evaluated_twice():
    """As with a large model: of accepted draws only the gradient is taken."""
    model, guide, bound = make("two", 0.1, num_samples=4)
    guide._structure = guide._structure._replace(is_small=False)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    check(model, guide, bound, elbo, 40, 0.4)


def test_once_and_twice_are_the_same():
    model, guide, _ = make("two", 0.1, num_samples=4)
    results = []
    for is_small in (True, False):
        guide._structure = guide._structure._replace(is_small=is_small)
        for elbo in (Trace_ELBO(), Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)):
            for entrance in ("loss_and_grads", "differentiable_loss"):
                pyro.set_rng_seed(3)
                guide.Z.fill_(guide.Z_target)  # for rounds of one size
                loss = getattr(elbo, entrance)(model, guide)
                if isinstance(loss, torch.Tensor):
                    loss.backward()
                    loss = loss.item()
                parameters = [p for _, p in pyro.get_param_store().named_parameters()]
                results.append([loss, *(p.grad.item() for p in parameters)])
                for p in parameters:
                    p.grad = None
    for i in range(2):
        plain, plain_module = results[2 * i], results[2 * i + 1]
        again, again_module = results[2 * i + 4], results[2 * i + 5]
        for other in (plain_module, again, again_module):
            assert plain == pytest.approx(other)


# -- Local latents ------------------------------------------------------------

THRESHOLDS = torch.tensor([1.0, 1.5, 2.0, 0.5])


@pytest.mark.parametrize("subsample_size", [None, 2])
@pytest.mark.parametrize("has_global", [False, True])
def test_local(subsample_size, has_global):
    case, epsilon = Local(subsample_size, has_global), 0.1
    guide = RVRSGuide(
        case.model,
        case.guide,
        T=0.0,
        num_samples=12,
        epsilon=epsilon,
        adaptation="fixed",
        local_plate="items",
        local_size=4,
    )
    guide.T.copy_(THRESHOLDS)
    guide()

    def bound():
        return case.bound(THRESHOLDS, epsilon)

    check(case.model, guide, bound, Trace_ELBO(), 350, 0.45)


def test_local_by_pilot():
    """Thresholds found at each call are near those of the whole distribution."""
    case = Local()
    guide = RVRSGuide(case.model, case.guide, local_plate="items", Z_target=0.4)
    guide()
    values = [guide.elbo(500)[0] for _ in range(50)]
    T = torch.stack([guide._find_threshold(_proposals(guide)) for _ in range(50)]).mean(0)
    exact = case.bound(T, 0.01).item()
    assert sum(values) / 50 == pytest.approx(exact, abs=0.1)


def _proposals(guide):
    proposer = guide._make_proposer((), {})
    proposer.propose(2, False)
    return proposer


# -- Draws ------------------------------------------------------------------


def test_draws():
    _, guide, _ = make("one", 0.01)
    draws = guide.sample_posterior(4000)["z"].cpu()
    assert draws.shape == (4000,)
    z, T = GRID, CASES["one"][3]
    with torch.no_grad():
        param = pyro.param
        q = torch.distributions.Normal(param("loc"), param("scale"))
        lp = torch.distributions.Normal(param("prior"), 1.0).log_prob(z)
        lp = lp + torch.distributions.Normal(curve(z), param("noise")).log_prob(torch.tensor(2.0))
        lq = q.log_prob(z)
        a = 0.01 + 0.99 * (lp - lq + T).sigmoid()
        cdf = (lq.exp() * a).cumsum(0)
        cdf, z = (cdf / cdf[-1]).cpu().numpy(), z.cpu().numpy()
        assert kstest(draws.numpy(), lambda x: np.interp(x, z, cdf)).pvalue > 1e-4
        assert kstest(draws.numpy(), lambda x: q.cdf(torch.as_tensor(x)).cpu().numpy()).pvalue < 1e-6


# -- Values -------------------------------------------------------------------


def check_value() -> None:
    model, guide, bound = make("one", 0.01)
    with pyro.validation_enabled(False):
        losses = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(1200)])
    assert_unbiased(losses.unsqueeze(-1), -bound().detach().reshape(1), detect=0.15)


def test_value():
    check_value()


# -- Defects that the tests must see (those of the weights: see tests/ops) ------


def total_log_q(proposer, accepted, weight):
    log_q = torch.cat([r.log_q for r in accepted.rounds])
    return (weight * log_q.gather(0, accepted.position)).sum(0)


def test_score_left_in_is_seen(monkeypatch):
    model, guide, bound = make("one", 0.1)
    monkeypatch.setattr(rvrs_surrogate, "_through_draws", total_log_q)
    elbo = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(AssertionError, match="biased in"):
        check(model, guide, bound, elbo, 40, None)


def test_log_of_the_mean_is_seen(monkeypatch):
    def jensen(num_samples, num_proposed):
        return (num_samples / num_proposed.double()).log()

    monkeypatch.setattr(rvrs_guide, "log_normalizer", jensen)
    with pytest.raises(AssertionError, match="biased in"):
        check_value()
