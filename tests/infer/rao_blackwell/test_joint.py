# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Projection and path gradient at the same site: what is added has mean zero, whatever its scale."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.nn import functional as F

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO
from pyro_rb.ops import gaussian
from tests.infer.rao_blackwell.models import (
    Problem,
    case,
    fixed,
    parameter,
    positive,
    replicates,
)
from tests.support.common import assert_unbiased

pytestmark = pytest.mark.slow

OPTIONS = {"max_plate_nesting": 2, "pre_activations": "shared"}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def weights(num, name, *shape, loc=0.3, scale=0.6):
    """Draws a diagonal Gaussian vector or matrix for each replicate, in the guide."""
    seed = len(shape) + 7 * len(name)
    loc = parameter(num, f"{name}_loc", loc * fixed(*shape, seed=seed))
    scale = positive(num, f"{name}_scale", scale * (0.4 * fixed(*shape, seed=seed + 1)).exp())
    with pyro.plate(f"replicates of {name}", num, dim=-1):
        return pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))


def prior(num, name, *shape, loc=0.0, scale=1.0):
    with pyro.plate(f"replicates of {name}", num, dim=-1):
        return pyro.sample(name, dist.Normal(loc, scale).expand(shape).to_event(len(shape)))


def observe(f, seed=2):
    """Rows of each replicate, ``[num, rows]``."""
    num, rows = f.shape
    with pyro.plate("observations", num, dim=-2), pyro.plate("rows", rows, dim=-1):
        pyro.sample("y", dist.Normal(f, 0.5), obs=fixed(rows, seed=seed))


def layer_and_bias(num):
    """Each replicate is a unit of one layer."""

    def model(num):
        w, b = prior(num, "w", 8), prior(num, "b", scale=2.0)
        observe(F.linear(fixed(3, 8), w, b).mT)

    def guide(num):
        weights(num, "w", 8), weights(num, "b")

    return case(model, guide, num)


def network(num):
    def model(num):
        h = (fixed(3, 6) @ prior(num, "w", 6, 5)).tanh()
        observe((h @ prior(num, "v", 5, 1, scale=0.7)).squeeze(-1))

    def guide(num):
        weights(num, "w", 6, 5), weights(num, "v", 5, 1)

    return case(model, guide, num)


def parts(num):
    """Parts of one site are used linearly, by another function, and not at all."""

    def model(num):
        w = prior(num, "w", 10, loc=0.2)
        f = w[..., :6] @ fixed(2, 6).mT + w[..., 6:8].square().sum(-1, keepdim=True)
        observe(f)

    def guide(num):
        weights(num, "w", 10)

    return case(model, guide, num)


def twice(num):
    """Two linear uses of different elements; a third of elements that were used, so that these are not projected."""

    def model(num):
        w = prior(num, "w", 14)
        f = w[..., :6] @ fixed(2, 6).mT
        g = w[..., 6:12] @ fixed(2, 6, seed=4).mT
        h = w[..., 10:] @ fixed(2, 4, seed=5).mT
        observe(f + g.tanh() + h)

    def guide(num):
        weights(num, "w", 14)

    return case(model, guide, num)


def convolution(num):
    """Each replicate is a channel."""

    def model(num):
        w = prior(num, "w", 2, 3, 3)
        f = F.conv2d(fixed(1, 2, 4, 4), w)
        observe(f.reshape(num, -1))

    def guide(num):
        weights(num, "w", 2, 3, 3)

    return case(model, guide, num)


def scaled(num):
    """A plate that is subsampled, a scale and a mask."""
    mask = torch.arange(3) < 2

    def model(num):
        with poutine.scale(scale=0.4):
            w = prior(num, "w", 8)
        with pyro.plate("rows", 12, subsample_size=3, dim=-1), poutine.mask(mask=mask):
            with pyro.plate("observations", num, dim=-2):
                pyro.sample("y", dist.Normal(w @ fixed(3, 8).mT, 0.5), obs=fixed(3, seed=2))

    def guide(num):
        with poutine.scale(scale=0.4):
            weights(num, "w", 8)

    return case(model, guide, num)


def unequal_scales(num):
    """Prior and guide count by other factors."""

    def model(num):
        with poutine.scale(scale=0.3):
            w = prior(num, "w", 8)
        observe(w @ fixed(3, 8).mT)

    def guide(num):
        with poutine.scale(scale=1.7):
            weights(num, "w", 8)

    return case(model, guide, num)


def hierarchy(num):
    """The prior depends on an earlier draw, and so does the guide."""

    def model(num):
        m = prior(num, "m")
        with pyro.plate("replicates of w", num, dim=-1):
            fn = dist.Normal(m.unsqueeze(-1), m.mul(0.3).exp().unsqueeze(-1)).expand([num, 8])
            w = pyro.sample("w", fn.to_event(1))
        observe(w @ fixed(3, 8).mT)

    def guide(num):
        m = weights(num, "m")
        loc, scale = parameter(num, "loc", fixed(8, seed=3)), positive(num, "scale", 0.5 + fixed(8, seed=4).abs())
        with pyro.plate("replicates of w", num, dim=-1):
            fn = dist.Normal(loc + 0.5 * m.unsqueeze(-1), scale * (0.2 * m).exp().unsqueeze(-1))
            pyro.sample("w", fn.to_event(1))

    return case(model, guide, num)


def heavy_tails(num):
    """The prior is not Gaussian: it has no analytic mean."""

    def model(num):
        with pyro.plate("replicates of w", num, dim=-1):
            w = pyro.sample("w", dist.StudentT(5.0, 0.0, 1.0).expand([8]).to_event(1))
        observe(w @ fixed(3, 8).mT)

    def guide(num):
        weights(num, "w", 8)

    return case(model, guide, num)


def learned_prior(num):
    def model(num):
        loc, scale = parameter(num, "prior_loc", fixed(8, seed=5)), positive(num, "prior_scale", torch.ones(8))
        with pyro.plate("replicates of w", num, dim=-1):
            w = pyro.sample("w", dist.Normal(loc, scale).to_event(1))
        observe(w @ fixed(3, 8).mT)

    def guide(num):
        weights(num, "w", 8)

    return case(model, guide, num)


def switches(num):
    """Discrete sites of three values before and after the weights in the guide."""

    def model(num):
        w = prior(num, "w", 8)
        with replicates(num, -2), pyro.plate("rows", 3, dim=-1):
            s = pyro.sample("s", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("y", dist.Normal(w @ fixed(3, 8).mT + s, 0.5), obs=fixed(3, seed=2))

    def guide(num):
        weights(num, "w", 8)
        logits = parameter(num, "logits", fixed(3, 3, seed=6))
        with replicates(num, -2), pyro.plate("rows", 3, dim=-1):
            pyro.sample("s", dist.Categorical(logits=logits))

    return case(model, guide, num)


def switched_weights(num):
    """The prior of the weights, and their guide, depend on a discrete site."""

    def model(num):
        with replicates(num, -1):
            k = pyro.sample("k", dist.Bernoulli(0.4)).unsqueeze(-1)
            w = pyro.sample("w", dist.Normal(k, 1.0 + k).expand(k.shape[:-1] + (8,)).to_event(1))
            pyro.sample("y", dist.Normal(w @ fixed(3, 8).mT, 0.5).to_event(1), obs=fixed(3, seed=2))

    def guide(num):
        logits = parameter(num, "logits", torch.tensor(0.3))
        loc, scale = parameter(num, "loc", fixed(8, seed=3)), positive(num, "scale", 0.5 + fixed(8, seed=4).abs())
        slope = parameter(num, "slope", fixed(8, seed=5))
        with replicates(num, -1):
            k = pyro.sample("k", dist.Bernoulli(logits=logits)).unsqueeze(-1)
            pyro.sample("w", dist.Normal(loc + slope * k, scale * (1.0 + 0.5 * k)).to_event(1))

    return case(model, guide, num)


CASES = [
    layer_and_bias,
    network,
    parts,
    twice,
    scaled,
    unequal_scales,
    hierarchy,
    heavy_tails,
    learned_prior,
]


def draw_pair(make, num=2000, num_calls=1, **options):
    """The difference between the gradients at two scales, with the same random numbers."""
    problem = replace(Problem(make), num=num)
    losses = [RaoBlackwell_ELBO(control_variate_scale=c, **{**OPTIONS, **options}) for c in (3.0, 1e-9)]
    rows = []
    for seed in range(num_calls):
        found = []
        for elbo in losses:
            pyro.set_rng_seed(seed)
            found.append(problem.draw(elbo))
        rows.append({name: x - found[1][name] for name, x in found[0].items()})
    assert any("and path gradient, c = " in row.treatment for row in losses[0].report())
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def check_mean_is_zero(found):
    difference = {name: x for name, x in found.items() if x.std(0).max() > 1e-6}
    assert len(difference) > 1
    size = max(x.std(0).max().item() for x in difference.values())
    assert_unbiased(difference, {n: 0 * x[0] for n, x in difference.items()}, detect=0.3, scale=size)


@pytest.mark.parametrize("make", CASES)
def test_added_term_has_mean_zero(make):
    check_mean_is_zero(draw_pair(make))


@pytest.mark.parametrize("make", [layer_and_bias, twice])
@pytest.mark.parametrize("solver", ["cholesky", "qr", "cg"])
def test_added_term_has_mean_zero_by_all_solvers(make, solver):
    check_mean_is_zero(draw_pair(make, solver=solver))


@pytest.mark.parametrize("solver", ["cholesky", "qr", "auto"])
def test_added_term_of_convolutions_has_mean_zero(solver):
    check_mean_is_zero(draw_pair(convolution, num=20, num_calls=60, solver=solver))


@pytest.mark.parametrize("options", [{"k": 3}, {"budget": 2}, {"baseline": None, "budget": 2}], ids=str)
@pytest.mark.parametrize("scale", [1.0, "adaptive"])
@pytest.mark.parametrize("make", [switches, switched_weights])
def test_with_discrete_sites(make, scale, options):
    elbo = RaoBlackwell_ELBO(control_variate_scale=scale, **options, **OPTIONS)
    ours = replace(Problem(make), num=5000).draw(elbo, 5)
    theirs = replace(Problem(make), num=8000).draw(Trace_ELBO(max_plate_nesting=2))
    treatments = {row.site: row.treatment for row in elbo.report()}
    assert "projected and path gradient" in treatments["w"]
    assert "single draw" not in treatments["s" if make is switches else "k"]
    assert_unbiased(ours, independent=theirs, projections=20, detect=2.0)


@pytest.mark.parametrize("options", [{"k": 3}, {"budget": 2}], ids=str)
def test_added_term_has_mean_zero_with_slots(options):
    check_mean_is_zero(draw_pair(switched_weights, **options))


def test_scale_zero_is_projection_alone():
    ours, theirs = (
        Problem(network).draw(elbo)
        for elbo in (RaoBlackwell_ELBO(control_variate_scale=0.0, **OPTIONS), R2G2_ELBO(max_plate_nesting=2))
        if pyro.set_rng_seed(0) is None
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- With scale 1 it is the conditional mean of the path gradient --------------------------


@pytest.mark.parametrize("rows", [2, 5])
def test_scale_one_is_the_conditional_mean_of_the_path_gradient(rows, monkeypatch):
    size, num, noise = 6, 200_000, 0.5
    x, y = fixed(rows, size, seed=1), fixed(rows, seed=2)
    loc = fixed(size, seed=3).requires_grad_()
    scale = (0.5 + fixed(size, seed=4).abs()).requires_grad_()
    prior_loc, prior_scale = fixed(size, seed=5), 0.5 + fixed(size, seed=6).abs()

    def model():
        w = pyro.sample("w", dist.Normal(prior_loc, prior_scale).to_event(1))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    def guide():
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    eps = fixed(size, seed=7)
    monkeypatch.setattr(gaussian, "_standard_normal", lambda *args, **kwargs: eps)
    elbo = RaoBlackwell_ELBO(control_variate_scale=1.0, pre_activations="shared", solver="cholesky")
    ours = torch.autograd.grad(elbo.differentiable_loss(model, guide), [loc, scale])

    matrix = x * scale.detach()
    projector = torch.linalg.pinv(matrix) @ matrix
    other = torch.randn(num, size)
    drawn = other - other @ projector + eps @ projector  # has the same pre-activations
    v = (loc + scale * drawn).expand(num, size)
    log_q = dist.Normal(loc.detach(), scale.detach()).log_prob(v).sum(-1)
    log_p = dist.Normal(prior_loc, prior_scale).log_prob(v).sum(-1) + dist.Normal(v @ x.mT, noise).log_prob(y).sum(-1)
    by_draw = torch.autograd.grad((log_q - log_p).sum(), v)[0]
    for found, samples in zip(ours, (by_draw, by_draw * drawn)):
        error = (found - samples.mean(0)) / (samples.std(0) / num**0.5 + 1e-9)
        assert error.abs().max() < 4.5


# -- Report ---------------------------------------------------------------------------------


def rows_of(make, num_steps=1, num=50, **options):
    with pyro.get_param_store().scope():
        made = make(num)
        elbo = RaoBlackwell_ELBO(**{**OPTIONS, **options})
        for _ in range(num_steps):
            elbo.loss_and_grads(made.model, made.guide, num)
        return {row.site: row for row in elbo.report()}


def test_report_gives_the_scale():
    row = rows_of(layer_and_bias, num_steps=8)["w"]
    assert row.treatment.startswith("projected and path gradient, c = ")
    assert "3 rows, fan-in 9" in row.reason


def test_correlated_site_is_projected_only():
    def model(num):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(fixed(3, 20) @ w, 0.5), obs=torch.zeros(3))

    def guide(num):
        loc = pyro.param("loc", torch.zeros(20))
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=0.1 * torch.eye(20)))

    row = rows_of(lambda num: case(model, guide, num))["w"]
    assert row.treatment == "projected" and "no path gradient" in row.reason
