# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients on structures unlike those of the other tests, against sums on a grid."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import Trace_ELBO, autoguide

from pyro_rb import RVRSGuide
from tests.infer.rvrs.models import GRID, bound, curve
from tests.infer.rvrs.test_exact import check
from tests.support.cases import positive, real

T, EPSILON = 1.0, 0.1
VECTORISED = {"num_particles": 40, "vectorize_particles": True, "max_plate_nesting": 2}


@pytest.fixture(autouse=True)
def dtype():
    torch.set_default_dtype(torch.float64)


def check_guide(model, guide, exact, num=120, detect=0.7, elbo=None, **options):
    rvrs = RVRSGuide(model, guide, T=T, epsilon=EPSILON, adaptation="fixed", **options)
    rvrs()
    check(model, rvrs, exact, elbo or Trace_ELBO(**VECTORISED), num, detect)


def one_bound(log_joint, loc, scale):
    lq = dist.Normal(loc, scale).log_prob(GRID)
    return bound(log_joint(GRID) - lq, lq + (GRID[1] - GRID[0]).log(), T, EPSILON)


def test_parameter_of_both():
    """A parameter that is in the model, and in the guide."""

    def model():
        shared = real("shared", 0.5)
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("x", dist.Normal(curve(z), shared.exp()), obs=torch.tensor(1.0))

    def guide():
        shared = real("shared", 0.5)
        pyro.sample("z", dist.Normal(shared + real("m", 0.2), (0.3 * shared).exp()))

    def exact():
        shared, m = pyro.param("shared"), pyro.param("m")

        def log_joint(z):
            likelihood = dist.Normal(curve(z), shared.exp()).log_prob(torch.tensor(1.0))
            return dist.Normal(shared, 1.0).log_prob(z) + likelihood

        return one_bound(log_joint, shared + m, (0.3 * shared).exp())

    check_guide(model, guide, exact)


def test_constrained_support():
    """A site on the unit interval, by the transform of an automatic guide."""

    def model():
        p = pyro.sample("p", dist.Beta(real("a", 2.5), 1.7))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Bernoulli(p), obs=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))

    guide = autoguide.AutoNormal(model, init_scale=0.8)

    def exact():
        def log_joint(u):
            p = u.sigmoid()
            jacobian = -torch.nn.functional.softplus(-u) - torch.nn.functional.softplus(u)
            likelihood = 4 * p.log() + (1 - p).log()
            return dist.Beta(pyro.param("a"), 1.7).log_prob(p) + jacobian + likelihood

        return one_bound(log_joint, guide.locs.p, guide.scales.p)

    check_guide(model, guide, exact)


def plane(log_joint, log_q):
    x = torch.linspace(-6.0, 6.0, 301)
    z = torch.cartesian_prod(x, x)
    lq = log_q(z)
    return bound(log_joint(z) - lq, lq + 2 * (x[1] - x[0]).log(), T, EPSILON)


def plane_model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("one", 1):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(curve(a) - b, 0.7), obs=torch.tensor([1.0]))


def plane_log_joint(z):
    a, b = z.unbind(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(a, 1.0).log_prob(b)
    return prior + dist.Normal(curve(a) - b, 0.7).log_prob(torch.tensor(1.0))


@pytest.mark.parametrize(
    "make", [autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal]
)
def test_full_covariance(make):
    guide = make(plane_model, init_scale=0.6)
    guide()
    with torch.no_grad():
        for i, p in enumerate(guide.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), device="cpu")
            p.add_(0.2 * noise.to(p))

    def exact():
        return plane(plane_log_joint, guide.get_posterior().log_prob)

    check_guide(plane_model, guide, exact)


def test_flow():
    """A hand-written guide around an autoregressive flow."""
    flow = affine_autoregressive(2, hidden_dims=[4])

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 0.7 * torch.ones(2)).to_event(1)
        z = dist.TransformedDistribution(base, [flow])
        z = pyro.sample("z", z, infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(z[..., 0]))
        with pyro.plate("one", 1):
            pyro.sample("b", dist.Delta(z[..., 1].unsqueeze(-1) if z.dim() == 1 else z[..., 1]))

    def log_q(z):
        base = dist.Normal(torch.zeros(2), 0.7 * torch.ones(2)).to_event(1)
        return dist.TransformedDistribution(base, [flow]).log_prob(z)

    check_guide(plane_model, guide, lambda: plane(plane_log_joint, log_q))


def test_list_of_guides():
    guide = autoguide.AutoGuideList(plane_model)
    for site in "ab":
        part = poutine.block(plane_model, expose=[site])
        guide.append(autoguide.AutoNormal(part, init_scale=0.7))

    def log_q(z):
        a, b = guide[0], guide[1]
        log_a = dist.Normal(a.locs.a, a.scales.a).log_prob(z[:, 0])
        return log_a + dist.Normal(b.locs.b, b.scales.b).log_prob(z[:, 1])

    check_guide(plane_model, guide, lambda: plane(plane_log_joint, log_q))


class Nested:
    """The local plate is not the rightmost; some items and observations are masked."""

    x = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [2.0, 1.1]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])

    def model(self):
        prior = real("prior", 0.4)
        inner = pyro.plate("inner", 2, dim=-1)
        with pyro.plate("items", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(prior, 1.0))
            with inner, poutine.mask(mask=self.mask):
                pyro.sample("x", dist.Normal(curve(z), positive("noise", 0.9)), obs=self.x)

    def guide(self):
        m = pyro.param("m", torch.tensor([[0.5], [-0.3], [0.8]]))
        with pyro.plate("items", 3, dim=-2):
            pyro.sample("z", dist.Normal(m, positive("s", 0.7)))

    def exact(self):
        z = GRID.reshape(-1, 1, 1)
        likelihood = dist.Normal(curve(z), pyro.param("noise")).log_prob(self.x) * self.mask
        lp = dist.Normal(pyro.param("prior"), 1.0).log_prob(z) + likelihood.sum(-1, keepdim=True)
        lq = dist.Normal(pyro.param("m"), pyro.param("s")).log_prob(z)
        return bound(lp - lq, lq + (GRID[1] - GRID[0]).log(), T, EPSILON).sum()


@pytest.mark.parametrize("is_small", [True, False])
def test_nested_local_plate(is_small):
    case = Nested()
    rvrs = RVRSGuide(
        case.model,
        case.guide,
        T=T,
        epsilon=EPSILON,
        adaptation="fixed",
        local_plate="items",
        local_size=3,
        num_samples=12,
    )
    rvrs()
    rvrs._structure = rvrs._structure._replace(is_small=is_small)
    assert rvrs.sample_posterior(4)["z"].shape == (4, 3, 1)
    check(case.model, rvrs, case.exact, Trace_ELBO(), 120, 0.8)


def test_looped_model():
    """One proposal at a time, in a local plate with a global latent."""
    x = torch.tensor([0.5, -1.2])

    def model():
        g = pyro.sample("g", dist.Normal(real("prior", 0.4), 0.8))
        with pyro.plate("items", 2):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            assert z.dim() == 1  # of one draw only
            pyro.sample("x", dist.Normal(curve(z), 0.8), obs=x)

    def guide():
        g = pyro.sample("g", dist.Normal(real("m", 0.3), positive("s", 0.5)))
        with pyro.plate("items", 2):
            pyro.sample("z", dist.Normal(real("loc", 0.1, -0.4) + 0.3 * g, positive("scale", 0.8)))

    def exact():
        param = pyro.param
        g = torch.linspace(-3.0, 4.0, 81).unsqueeze(-1)
        q = dist.Normal(param("m"), param("s"))
        z = GRID[::3].reshape(-1, 1, 1)
        lp = dist.Normal(g, 1.0).log_prob(z) + dist.Normal(curve(z), 0.8).log_prob(x)
        lq = dist.Normal(param("loc") + 0.3 * g, param("scale")).log_prob(z)
        items = bound(lp - lq, lq + (z[1] - z[0]).log(), T, EPSILON).sum(-1)
        ratio = dist.Normal(param("prior"), 0.8).log_prob(g) - q.log_prob(g)
        weight = q.log_prob(g).exp() * (g[1] - g[0])
        return (weight.squeeze(-1) * (ratio.squeeze(-1) + items)).sum()

    with pytest.warns(UserWarning, match="evaluated for one proposal at a time"):
        check_guide(
            model,
            guide,
            exact,
            elbo=Trace_ELBO(),
            num=30,
            detect=None,
            local_plate="items",
            num_samples=8,
        )
