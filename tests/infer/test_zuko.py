# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_rb import DReG_ELBO, RaoBlackwell_ELBO, RVRSGuide, STLTrace_ELBO
from pyro_rb.ops.zuko import as_transformed
from pyro_rb.poutine.densities import find_density_scale
from tests.support.common import assert_unbiased
from tests.support.flows import exact_log_prob, stir

# zuko turns the validation of all distributions off.
validate_args = torch.distributions.Distribution._validate_args
zuko = pytest.importorskip("zuko")
torch.distributions.Distribution.set_default_validate_args(validate_args)

from pyro.contrib.zuko import ZukoToPyro  # noqa: E402

pytestmark = pytest.mark.slow

DIM = 4
FIXED = partial(STLTrace_ELBO, control_variate_scale=1.0)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def make(name, is_turned=False, dim=DIM, scale=0.2, **kwargs):
    """A flow as zuko makes it, or with all its layers turned round, so that they draw in one pass."""
    kwargs.setdefault("hidden_features", [8])
    flow = stir([getattr(zuko.flows, name)(dim, **kwargs)], scale)[0]
    if not is_turned:
        return flow
    return zuko.lazy.Flow([t.inv for t in reversed(flow.transform.transforms)], flow.base)


FLOWS = {
    "MAF": partial(make, "MAF"),
    "MAF, in any order": partial(make, "MAF", randperm=True, residual=True, activation=torch.nn.ELU),
    "NICE": partial(make, "NICE"),
    "NSF": partial(make, "NSF"),
    "NSF, coupling": partial(make, "NSF", passes=2),
    "one feature": partial(make, "NSF", dim=1),
}
NEURAL = {
    "NAF": partial(make, "NAF", transforms=2, network={"hidden_features": [4]}, signal=4, is_turned=True),
    "UNAF": partial(make, "UNAF", transforms=1, network={"hidden_features": [4]}, signal=4, is_turned=True),
}


def log_joint(z):
    return -(z.square().sum(-1) + (z.prod(-1) - 1.0).square() + (z[..., 0] * z.sum(-1)).sin())


def around(flow, dim=DIM):
    """A model and a guide of one flow."""

    def model():
        prior = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
        pyro.factor("x", log_joint(pyro.sample("z", prior.mask(False))))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", ZukoToPyro(flow()))

    return model, guide


def gradient(loss, model, guide, module, seed=1):
    pyro.set_rng_seed(seed)
    parameters = list(module.parameters())
    for p in parameters:
        p.grad = None
    value = loss.loss_and_grads(model, guide)
    return value, torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def score_of(fn, module, value, start=None):
    """
    The derivative of a log density at a fixed value.

    :param start: what the flow made it of; None for the density that zuko gives.
    """
    fn = fn if start is None else as_transformed(fn)
    log_prob = fn.log_prob(value) if start is None else exact_log_prob(fn, start, value)
    parameters = list(module.parameters())
    found = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def assert_close(actual, expected, tolerance=1e-10):
    assert (actual - expected).abs().max() < tolerance * (expected.abs().max() + 1.0)


@pytest.mark.parametrize("c", [1.0, 0.4])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_exact(name, is_turned, c):
    flow = FLOWS[name](is_turned=is_turned)
    fn = flow()
    model, guide = around(flow, fn.event_shape[0])
    value, plain = gradient(Trace_ELBO(), model, guide, flow)
    pyro.set_rng_seed(1)
    score = score_of(fn, flow, fn.rsample().detach())
    loss = STLTrace_ELBO(control_variate_scale=c)
    found, actual = gradient(loss, model, guide, flow)
    (row,) = loss.report()
    assert row.treatment == f"path gradient, c = {c:g}"
    assert ("solved by" in row.reason) == (is_turned and name != "one feature")
    assert found == pytest.approx(value, rel=1e-12)
    assert score.abs().max() > 0.1
    assert_close(actual, plain - c * score)


@pytest.mark.parametrize("name", NEURAL)
def test_neural_flows_that_draw_in_one_pass(name):
    """zuko inverts these by bisection only; so they are compared with the score by a step of Newton's method."""
    flow = NEURAL[name]()
    fn = flow()
    model, guide = around(flow)
    _, plain = gradient(Trace_ELBO(), model, guide, flow)
    pyro.set_rng_seed(1)
    start = fn.base.rsample()
    score = score_of(fn, flow, fn.transform.inv(start).detach(), start)
    loss = FIXED()
    _, actual = gradient(loss, model, guide, flow)
    assert "solved by: substitution" in loss.report()[0].reason
    assert score.abs().max() > 0.1
    assert_close(actual, plain - score)


@pytest.mark.parametrize("name, c", [("NAF", 1.0), ("NAF", "adaptive"), ("UNAF", 1.0)])
def test_unbiased(name, c):
    flow = NEURAL[name](scale=0.05)
    model, guide = around(flow)
    options = {"num_particles": 10, "vectorize_particles": True, "max_plate_nesting": 0}

    def draw(elbo):
        return torch.stack([gradient(elbo, model, guide, flow, seed)[1] for seed in range(100)])

    loss = STLTrace_ELBO(control_variate_scale=c, **options)
    assert_unbiased(draw(loss), paired=draw(Trace_ELBO(**options)), detect=0.6, projections=10)
    assert loss.report()[0].treatment.startswith("path gradient")


@pytest.mark.parametrize("name", ["NAF", "UNAF", "SOSPF", "BPF", "NCSF"])
def test_draws_between_bounds(name):
    """Of these, a part of the draws may end at a bound, where their score has no mean of zero."""
    small = {"network": {"hidden_features": [4]}} if name.endswith("NAF") else {}
    flow = make(name, transforms=2, **small)
    model, guide = around(flow)
    loss = FIXED()
    _, actual = gradient(loss, model, guide, flow)
    assert_close(actual, gradient(Trace_ELBO(), model, guide, flow)[1], 1e-12)
    (row,) = loss.report()
    assert row.treatment == "as Trace_ELBO"
    reason = "inverted by bisection" if name.endswith("NAF") else "is not known"
    assert "the mean of its score may not be zero" in row.reason and reason in row.reason


def test_other_layers():
    """Rotations, triangular matrices, permutations, and layers of PyTorch."""
    make_transform = zuko.lazy.UnconditionalTransform
    flow = zuko.lazy.Flow(
        [
            make_transform(torch.distributions.ExpTransform).inv,
            zuko.flows.MaskedAutoregressiveTransform(DIM, hidden_features=[8]).inv,
            make_transform(zuko.transforms.RotationTransform, torch.randn(DIM, DIM)),
            make_transform(zuko.transforms.LULinearTransform, torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM)),
            make_transform(zuko.transforms.PermutationTransform, torch.randperm(DIM), buffer=True),
            zuko.flows.GeneralCouplingTransform(DIM, hidden_features=[8]),
        ],
        zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.randn(DIM), torch.ones(DIM)),
    )
    model, guide = around(flow)
    _, plain = gradient(Trace_ELBO(), model, guide, flow)
    fn = flow()
    pyro.set_rng_seed(1)
    score = score_of(fn, flow, fn.rsample().detach())
    loss = FIXED()
    _, actual = gradient(loss, model, guide, flow)
    assert "solved by: substitution" in loss.report()[0].reason
    assert_close(actual, plain - score)


class Between(torch.nn.Module):
    """A conditional flow after another site, in a plate, scaled and masked; and a second one after it."""

    def __init__(self, name, is_turned):
        super().__init__()
        self.first = make(name, is_turned, dim=3, context=2)
        self.second = make("MAF", is_turned, dim=2, context=1)
        self.loc = torch.nn.Parameter(torch.tensor([0.3, -0.2]))

    def guide(self):
        pyro.module("flows", self)
        context = pyro.sample("context", dist.Normal(self.loc, 0.7).to_event(1))
        with pyro.plate("data", 5, dim=-1), poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(5) < 4):
            z = pyro.sample("z", ZukoToPyro(self.first(context)))
        pyro.sample("y", ZukoToPyro(self.second(z.sum((-1, -2), keepdim=True).squeeze(-1))).to_event(0))

    def model(self):
        context = pyro.sample("context", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 5, dim=-1), poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(5) < 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.factor("f", (z[..., 0] * z[..., 1]).sin() + z[..., 2] * context.sum(-1, keepdim=True))
        y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("x", y.prod(-1).cos())


@pytest.mark.parametrize("name", ["MAF", "NSF", "NICE"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_contexts(name, is_turned):
    case = Between(name, is_turned)
    _, plain = gradient(Trace_ELBO(), case.model, case.guide, case)
    pyro.set_rng_seed(1)
    values = poutine.trace(case.guide).get_trace()
    values.detach_()
    trace = poutine.trace(poutine.replay(case.guide, trace=values)).get_trace()
    total = sum(site["log_prob_sum"] for site in with_log_probs(trace))
    score = torch.autograd.grad(total, list(case.parameters()), allow_unused=True, materialize_grads=True)
    score = torch.cat([g.flatten() for g in score])
    for c in (1.0, 0.4):
        for loss in (STLTrace_ELBO, RaoBlackwell_ELBO):
            elbo = loss(control_variate_scale=c, max_plate_nesting=1)
            _, actual = gradient(elbo, case.model, case.guide, case)
            assert sum("solved by" in row.reason for row in elbo.report()) == 2 * is_turned
            assert all("path gradient" in row.treatment for row in elbo.report())
            assert_close(actual, plain - c * score)


def with_log_probs(trace):
    trace.compute_log_prob()
    return [site for _, site in trace.iter_stochastic_nodes()]


@pytest.mark.parametrize("loss", [FIXED, DReG_ELBO, partial(RaoBlackwell_ELBO, control_variate_scale=1.0)])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", ["MAF", "NSF", "NICE"])
def test_zero_at_the_optimum(name, is_turned, loss):
    flow = make(name, is_turned)
    _, guide = around(flow)
    target = copy.deepcopy(flow).requires_grad_(False)

    def model():
        pyro.sample("z", ZukoToPyro(target()))

    assert gradient(Trace_ELBO(), model, guide, flow)[1].abs().max() > 0.1
    _, actual = gradient(loss(), model, guide, flow)
    assert_close(actual, torch.zeros_like(actual), 1e-11)


@pytest.mark.parametrize("elbo", [STLTrace_ELBO, RaoBlackwell_ELBO, DReG_ELBO])
@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "vectorize_particles": True}])
def test_both_ways_agree(monkeypatch, elbo, options):
    """Adaptive, and the density by the inverse instead of by the draw."""
    flow = make("MAF", is_turned=True)
    model, guide = around(flow)
    options = {"num_particles": 2, "max_plate_nesting": 0, **options} if elbo is DReG_ELBO else options
    options = {"max_plate_nesting": 0, **options}
    losses = [elbo(control_variate_scale="adaptive", **options) for _ in range(2)]
    for seed in range(8):
        _, actual = gradient(losses[0], model, guide, flow, seed)
        with monkeypatch.context() as patch:
            patch.setattr("pyro_rb.poutine.path_gradient.PathFlow.find", staticmethod(lambda fn: None))
            _, expected = gradient(losses[1], model, guide, flow, seed)
        assert_close(actual, expected)
    assert "solved by" in losses[0].report()[0].reason


def test_rejection_around_a_flow():
    flow = make("MAF", is_turned=True)
    model, guide = around(flow)
    rejection = RVRSGuide(model, guide, Z_target=0.3, num_samples=4)
    rejection()
    assert gradient(Trace_ELBO(), model, rejection, flow)[1].abs().max() > 0.1


def test_wrapped_distributions_of_pytorch():
    loc = torch.nn.Parameter(torch.tensor(0.3))

    def guide():
        pyro.sample("z", ZukoToPyro(torch.distributions.Normal(pyro.param("loc", loc), 1.0)))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    loss = FIXED()
    loss.loss_and_grads(model, guide)
    assert loss.report()[0] == ("z", "path gradient, c = 1", "reparameterized draw")


@pytest.mark.parametrize("is_masked", [False, True])
def test_mask_inside_of_a_flow(is_masked):
    """Then no factor multiplies the whole density."""
    flow, base = make("MAF")(), dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
    fn = zuko.distributions.NormalizingFlow(flow.transform, base.mask(False) if is_masked else base)
    with poutine.trace() as tp, poutine.scale(scale=0.5):
        pyro.sample("z", ZukoToPyro(fn))
    assert find_density_scale(tp.trace.nodes["z"]) == (None if is_masked else 0.5)
