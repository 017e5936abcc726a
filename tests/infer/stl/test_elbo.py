# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The contract, identities that hold draw by draw, the report and the errors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.optim import Adam

from pyro_rb import STLTrace_ELBO
from tests.support.cases import Case, positive, real
from tests.support.elbo_contract import ELBOContract, assert_same, case_args, evaluate
from tests.support.guides import GUIDES
from tests.support.models import (
    CONJ_X,
    conj,
    conj_model,
    lognormal_model,
    multivariate,
    poisson,
    two,
    two_posterior,
)

pytestmark = pytest.mark.slow

# AutoGaussian's sparse backend is an extra of Pyro's.
CASES = [name for name in GUIDES if name != "AutoGaussian_funsor"]


class TestSTLContract(ELBOContract):
    def make_elbo(self, **kwargs):
        return STLTrace_ELBO(control_variate_scale=1.0, **kwargs)


class TestAdaptiveContract(ELBOContract):
    def make_elbo(self, **kwargs):
        return STLTrace_ELBO(**kwargs)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def gradient(elbo, case, seed=0):
    """One draw of the gradient, as one vector."""
    pyro.set_rng_seed(seed)
    parameters = list(case.parameters().values())
    loss = elbo.differentiable_loss(*case_args(case))
    if not (parameters and torch.is_tensor(loss) and loss.requires_grad):
        return torch.zeros(1)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(grads, parameters)
    return torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs]).detach()


@pytest.mark.parametrize("name", CASES)
def test_which_sites_have_a_path_gradient(name):
    case = GUIDES[name]()
    elbo = STLTrace_ELBO(control_variate_scale=1.0)
    elbo.loss_and_grads(*case_args(case))
    report = elbo.report()
    assert {row.site for row in report if "path" in row.treatment} == case.tapped
    guide_trace = poutine.trace(case.guide).get_trace(*case.args)
    latent = [n for n in guide_trace.stochastic_nodes if n != "data"]
    assert {row.site for row in report} >= set(latent) - {"_mu_latent"} or not latent


@pytest.mark.parametrize("entrance", ["loss_and_grads", "differentiable_loss"])
@pytest.mark.parametrize("name", CASES)
def test_scale_zero_is_trace_elbo_bit_for_bit(name, entrance):
    """But for the cost of auxiliary sites, which Trace_ELBO leaves out of scores, see test_left_out.py."""
    if name == "AutoGuideList_discrete":
        return
    case = GUIDES[name]()
    expected_loss, expected = evaluate(Trace_ELBO(), case, entrance, seed=1)
    loss, actual = evaluate(STLTrace_ELBO(control_variate_scale=0), case, entrance, seed=1)
    assert loss == expected_loss
    for key, grad in expected.items():
        assert (grad is None and actual[key] is None) or torch.equal(actual[key], grad)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_linear_in_the_scale(name):
    case = GUIDES[name]()
    at = {c: gradient(STLTrace_ELBO(control_variate_scale=c), case) for c in (0.0, 1.0, 0.3, -2.0)}
    # A tapped value misses the caches of Pyro's transforms: inverses round.
    for c in (0.3, -2.0):
        assert_same(at[c], (1 - c) * at[0.0] + c * at[1.0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", ["hierarchical", "discrete_first", "AutoNormal", "dropout"])
def test_adaptive_begins_with_three_steps_of_trace_elbo(name, particles):
    case = GUIDES[name]()
    adaptive = STLTrace_ELBO(num_particles=particles)
    plain = Trace_ELBO(num_particles=particles)
    for seed in range(3):
        assert_same(gradient(adaptive, case, seed), gradient(plain, case, seed), atol=1e-8)
    assert not torch.allclose(gradient(adaptive, case, 3), gradient(plain, case, 3))


@pytest.mark.parametrize("name", ["AutoDelta", "AutoStructured", "no_latents"])
def test_nothing_to_gain_is_trace_elbo(name):
    case = GUIDES[name]()
    assert_same(gradient(STLTrace_ELBO(control_variate_scale=1.0), case), gradient(Trace_ELBO(), case))


def fitted(guide_type, model=lognormal_model):
    """An automatic guide at the exact posterior: loc .8 x and scale sqrt(.2)."""
    x = torch.tensor(CONJ_X)
    if guide_type is AutoHierarchicalNormalMessenger:
        guide = guide_type(model, init_weight=0.0)
    else:
        guide = guide_type(model)
    case = Case(model, guide, (x,))
    scale = 0.2**0.5
    # Messengers have scales in exp coordinates, other guides in softplus coordinates.
    is_messenger = "Messenger" in guide_type.__name__
    raw_scale = math.log(scale) if is_messenger else scale + math.log(-math.expm1(-scale))
    with torch.no_grad():
        for name, p in case.parameters().items():
            if "scale_tril" in name or "weight" in name:
                continue
            p.copy_(0.8 * x if "loc" in name else torch.full_like(p, raw_scale))
        if guide_type is AutoMultivariateNormal:
            guide.scale_tril = torch.eye(4)
    return case


OPTIMA = {
    "mean field": lambda: conj(shift=0.0, width=1.0),
    "hierarchical": lambda: two(exact=True),
    "multivariate": lambda: multivariate(exact=True),
    "gamma": lambda: poisson(exact=True),
    "AutoNormal": lambda: fitted(AutoNormal),
    "AutoDiagonalNormal": lambda: fitted(AutoDiagonalNormal),
    "AutoMultivariateNormal": lambda: fitted(AutoMultivariateNormal),
    "AutoNormalMessenger": lambda: fitted(AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": lambda: fitted(AutoHierarchicalNormalMessenger, conj_model),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_gradient_is_zero_at_the_posterior(name):
    case = OPTIMA[name]()
    # Rounding only; the implicit gradient of a gamma draw has fewer digits.
    bound = 1e-6 if name == "gamma" else 1e-13
    grads = [gradient(STLTrace_ELBO(control_variate_scale=1.0), case, seed) for seed in range(20)]
    assert max(g.abs().max() for g in grads) < bound
    assert gradient(Trace_ELBO(), case).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in OPTIMA if name != "gamma"])
def test_adaptive_gradient_is_zero_at_the_posterior_after_start_up(name):
    case = OPTIMA[name]()
    elbo = STLTrace_ELBO()
    grads = [gradient(elbo, case, seed).abs().max() for seed in range(40)]
    assert min(grads[:3]) > 1e-3
    assert max(grads[3:]) < 1e-13


def test_svi_reaches_the_posterior():
    case = two()
    svi = SVI(case.model, case.guide, Adam({"lr": 0.05}), STLTrace_ELBO())
    for _ in range(250):
        svi.step()
    svi = SVI(case.model, case.guide, Adam({"lr": 0.005}), STLTrace_ELBO())
    for _ in range(250):
        svi.step()
    exact = two_posterior()
    assert pyro.param("m1").item() == pytest.approx(exact["mean"][0].item(), abs=0.02)
    assert pyro.param("s1").item() == pytest.approx(exact["cov"][0, 0].sqrt().item(), rel=0.02)
    assert pyro.param("a").item() == pytest.approx(exact["intercept"], abs=0.02)
    assert pyro.param("b").item() == pytest.approx(exact["slope"], abs=0.02)
    assert pyro.param("s2").item() == pytest.approx(exact["scale"], rel=0.02)


def test_report():
    case = GUIDES["discrete_first"]()
    elbo = STLTrace_ELBO(control_variate_scale=0.5)
    elbo.loss_and_grads(*case_args(case))
    assert elbo.report() == [
        ("k", "as Trace_ELBO", "not reparameterized, keeps its score function"),
        ("z", "path gradient, c = 0.5", "reparameterized draw"),
    ]
    assert str(elbo.report()).splitlines()[0].split() == ["site", "treatment", "reason"]


def test_report_of_scale_zero():
    case = two()
    elbo = STLTrace_ELBO(control_variate_scale=0.0)
    elbo.loss_and_grads(*case_args(case))
    assert {row.treatment for row in elbo.report()} == {"as Trace_ELBO"}
    assert {row.reason for row in elbo.report()} == {"control_variate_scale is 0"}


def test_report_before_any_step():
    with pytest.raises(RuntimeError, match=r"there was none.*SVI.step\(\) first"):
        STLTrace_ELBO(control_variate_scale=1.0).report()


@pytest.mark.parametrize(
    "scale",
    ["Adaptive", "1.0", None, True, math.nan, math.inf, -math.inf, torch.tensor(1.0), 1j, []],
)
def test_bad_scales(scale):
    message = r"Invalid control_variate_scale: .*Expected a finite float.*'adaptive'"
    with pytest.raises(ValueError, match=message):
        STLTrace_ELBO(control_variate_scale=scale)


@pytest.mark.parametrize("scale", [1, 0, 0.25, -3, np.float32(0.5)])
def test_good_scales(scale):
    value = STLTrace_ELBO(control_variate_scale=scale).control_variate_scale
    assert type(value) is float and value == scale


def test_unknown_argument():
    with pytest.raises(TypeError, match="num_partcles"):
        STLTrace_ELBO(num_partcles=2)


def test_in_place_change_of_a_draw():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.5), positive("scale", 1.0)))
        z.add_(1.0)

    before = None
    elbo = STLTrace_ELBO(control_variate_scale=1.0)
    with pytest.raises(RuntimeError, match=r"guide site 'z' was changed in place.*`z = z \+ 1`"):
        elbo.loss_and_grads(model, guide)
    assert pyro.param("loc").item() == 0.5
    assert pyro.param("loc").unconstrained().grad is before


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_inside_of_jit_trace():
    case = conj()
    elbo = STLTrace_ELBO(control_variate_scale=1.0)

    def loss(x):
        return elbo.differentiable_loss(case.model, case.guide, x)

    with pytest.raises(NotImplementedError, match=r"inside of torch.jit.trace.*JitTrace_ELBO"):
        torch.jit.trace(loss, case.args)
