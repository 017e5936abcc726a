# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What holds in each draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceMeanField_ELBO

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import (
    KINDS,
    fixed,
    net,
    reasons,
    regression,
    spent,
    treatments,
    weights,
)
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def params():
    return {name: p.detach() for name, p in pyro.get_param_store().items()}


def draw(case, seed=0):
    pyro.set_rng_seed(seed)
    trace = poutine.trace(case.guide).get_trace(*case.args)
    return {name: site["value"].detach() for name, site in trace.iter_stochastic_nodes()}


def project(a, eps):
    """The dense projection to the row space; ``a`` is ``[..., m, n]``."""
    return (torch.linalg.pinv(a) @ (a @ eps.unsqueeze(-1))).squeeze(-1)


# -- The gradient is the conditional expectation of the plain one ------------

X, Y, C = fixed(3, 5, seed=1), fixed(3, seed=2), 0.7 * fixed(5, 8, seed=3)
SHAPES = {"w1": (7, 8), "b1": (7,), "w2": (1, 7), "b2": (1,)}


def two_layers():
    """Two layers with biases, behind a matrix ``c`` that is a parameter of the model."""

    def model():
        c = pyro.param("c", lambda: C.to(torch.get_default_dtype()))
        w = {
            name: pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
            for name, shape in SHAPES.items()
        }
        h = F.linear(X.to(c) @ c, w["w1"], w["b1"])
        z = F.linear(torch.tanh(h), w["w2"], w["b2"]).squeeze(-1)
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=Y.to(c))

    def guide():
        for i, (name, shape) in enumerate(SHAPES.items()):
            loc = pyro.param(f"{name}.loc", lambda: fixed(*shape, seed=10 + i).double() * 0.5)
            scale = pyro.param(
                f"{name}.scale",
                lambda: 0.4 * (0.3 * fixed(*shape, seed=20 + i).double()).exp(),
                constraint=constraints.positive,
            )
            pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))

    return Case(model, guide)


def hand_gradient(at, eps, star):
    """
    The plain gradient of the likelihood of ``two_layers``, worked out by hand, with all
    noise that does not determine a pre-activation taken from ``star``.
    """
    w = {n: at[f"{n}.loc"] + at[f"{n}.scale"] * eps[n] for n in SHAPES}
    w_star = {n: at[f"{n}.loc"] + at[f"{n}.scale"] * star[n] for n in SHAPES}
    x = X.double() @ at["c"]
    h = F.linear(x, w["w1"], w["b1"])
    z = F.linear(h.tanh(), w["w2"], w["b2"])
    d2 = (z - Y.double()[:, None]) / 0.25
    d1 = (d2 @ w_star["w2"]) * (1 - h.tanh() ** 2)
    grads = {
        "w2": d2.mT @ h.tanh(),
        "b2": d2.sum(-2),
        "w1": d1.mT @ x,
        "b1": d1.sum(-2),
    }
    found = {"c": X.double().mT @ (d1 @ w_star["w1"])}
    for name, grad in grads.items():
        found[f"{name}.loc"] = grad
        # The unconstrained parameter is the logarithm.
        found[f"{name}.scale"] = grad * star[name] * at[f"{name}.scale"]
    return found


def conditional_means(at, eps, noise=None):
    """Of ``noise``, by default ``eps``, given the pre-activations that ``eps`` makes."""
    noise = eps if noise is None else noise
    w = {n: at[f"{n}.loc"] + at[f"{n}.scale"] * eps[n] for n in SHAPES}
    x1 = X.double() @ at["c"]
    x2 = F.linear(x1, w["w1"], w["b1"]).tanh()
    star = {}
    for x, weight, bias in ((x1, "w1", "b1"), (x2, "w2", "b2")):
        x = torch.cat([x, torch.ones(3, 1)], -1)
        scale = torch.cat([at[f"{weight}.scale"], at[f"{bias}.scale"][:, None]], -1)
        joint = torch.cat([noise[weight], noise[bias][:, None]], -1)
        found = project(x * scale[:, None], joint)
        star[weight], star[bias] = found[:, :-1], found[:, -1]
    return star


def likelihood_gradient(case, elbo, seed):
    """Without the KL terms, which are analytic."""
    _, gradient = evaluate(elbo, case, seed=seed)
    at = params()
    for name in SHAPES:
        gradient[f"{name}.loc"] = gradient[f"{name}.loc"] - at[f"{name}.loc"]
        gradient[f"{name}.scale"] = gradient[f"{name}.scale"] - (at[f"{name}.scale"] ** 2 - 1)
    eps = {n: (v - at[f"{n}.loc"]) / at[f"{n}.scale"] for n, v in draw(case, seed).items()}
    return gradient, at, eps


@pytest.mark.parametrize("solver", ["auto", "cholesky", "cg", "qr"])
def test_gradient_is_that_at_the_conditional_mean(solver):
    case = two_layers()
    for seed in range(3):
        gradient, at, eps = likelihood_gradient(case, R2G2_ELBO(solver=solver), seed)
        expected = hand_gradient(at, eps, conditional_means(at, eps))
        assert_same(gradient, expected, rtol=1e-7, atol=1e-8)
        assert not torch.allclose(gradient["w1.scale"], hand_gradient(at, eps, eps)["w1.scale"])


def test_gradient_is_the_conditional_expectation():
    """Averages the plain gradient over noise with the same pre-activations."""
    case = two_layers()
    gradient, at, eps = likelihood_gradient(case, R2G2_ELBO(), 0)
    star, samples = conditional_means(at, eps), {}
    for seed in range(500):
        pyro.set_rng_seed(seed)
        fresh = {n: torch.randn(e.shape) for n, e in eps.items()}
        taken = conditional_means(at, eps, fresh)
        same = {n: star[n] + fresh[n] - taken[n] for n in SHAPES}
        for name, value in hand_gradient(at, same, same).items():
            samples.setdefault(name, []).append(value)
    assert_unbiased({n: torch.stack(v) for n, v in samples.items()}, gradient, detect=0.2)


# -- Special cases -------------------------------------------------------------


def test_one_row_is_local_reparameterization():
    """Theorem 4.3: ``xi = A eps / |A|`` is the noise of the pre-activation."""
    case = regression(rows=1)
    _, gradient = evaluate(R2G2_ELBO(), case, seed=0)
    at, x, y = params(), fixed(1, 8, seed=6), 1.0
    loc, scale, w = at["w.loc"], at["w.scale"], draw(case)["w"]
    a = x * scale
    xi = (a @ ((w - loc) / scale)) / a.norm()
    delta = ((x @ w) - y) / 0.49
    kl = scale / 2.25 - 1 / scale
    by_hand = delta * x[0] ** 2 * scale * xi / a.norm()
    assert_same(gradient["w.scale"], scale * (by_hand + kl))
    assert_same(gradient["w.loc"], delta * x[0] + loc / 2.25)


def test_sum_of_scaled_gradients_is_kept():
    """``A eps* = A eps``, so that ``<s, grad s>`` is the plain one for a single layer."""
    case = regression(rows=3)
    _, ours = evaluate(R2G2_ELBO(), case, seed=1)
    _, plain = evaluate(spent(case), case, seed=1)
    assert_same(ours["w.scale"].sum(), plain["w.scale"].sum())
    assert_same(ours["w.loc"], plain["w.loc"])
    assert (ours["w.scale"] - plain["w.scale"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_full_column_rank_is_plain(kind):
    case = regression(kind, n=3, rows=5)
    elbo = R2G2_ELBO()
    for seed in range(3):
        assert_same(evaluate(elbo, case, seed=seed), evaluate(spent(case), case, seed=seed))
        assert treatments(elbo) == {"w": "plain"}
        assert "rows >= fan-in" in reasons(elbo)["w"]


@pytest.mark.parametrize("kind", KINDS)
def test_correlated_noise_is_projected(kind):
    """One linear use: the plain gradient at the conditional mean of the whole noise."""
    case = regression(kind)
    x, y = fixed(3, 8, seed=6), torch.tensor([1.0, 0.0, 1.0])
    _, gradient = evaluate(R2G2_ELBO(), case, seed=3)
    w = draw(case, 3)["w"]
    at = params()
    pyro.set_rng_seed(3)
    if kind == "low_rank":
        eps = torch.cat([torch.randn(2), torch.randn(8)])
        factor, diagonal = at["w.factor"], at["w.diagonal"]
        v = torch.cat([factor, diagonal.sqrt().diag()], -1)
    else:
        eps = torch.randn(8)
        v = at["w.tril"] if kind == "scale_tril" else at["w.scale"].diag()
    assert_same(at["w.loc"] + v @ eps, w)
    star = project(x @ v, eps)
    assert (star - eps).abs().max() > 0.1
    a_star = x.mT @ ((x @ w - y) / 0.49)
    _, plain = evaluate(spent(case), case, seed=3)
    assert_same(gradient["w.loc"], plain["w.loc"])  # a single layer: no noise is left
    # The two differ by the likelihood's grad_V = a eps^T, at eps* in the place of eps.
    change = torch.outer(a_star, star - eps)
    if kind == "diagonal":
        expected = {"w.scale": change.diagonal() * at["w.scale"]}
    elif kind == "scale_tril":
        expected = {}
        diagonal = change.diagonal() * at["w.tril"].diagonal()
        lower = change.tril(-1) + diagonal.diag()
        assert_same((gradient["w.tril"] - plain["w.tril"]).tril(), lower, rtol=1e-7, atol=1e-8)
    else:
        expected = {
            "w.factor": change[:, :2],
            "w.diagonal": change[:, 2:].diagonal() / (2 * diagonal.sqrt()) * diagonal,
        }
    for name, value in expected.items():
        assert_same(gradient[name] - plain[name], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("guide", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_forward_is_the_same(guide, entrance):
    """The loss has the same bits with and without projection."""
    case = net(guide)
    plain = spent(case)
    for seed in range(3):
        losses = [evaluate(elbo, case, entrance, seed)[0] for elbo in (R2G2_ELBO(), plain)]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_schedule(entrance):
    case = net()
    elbo, other, plain = R2G2_ELBO(num_steps=2), R2G2_ELBO(), spent(case)
    for step in range(4):
        elbo.loss(case.model, case.guide, *case.args)  # does not count
        found = evaluate(elbo, case, entrance, seed=step)
        assert_same(found, evaluate(other if step < 2 else plain, case, entrance, seed=step))
        assert ("schedule (num_steps=2)" in reasons(elbo)["l0.weight_unconstrained"]) == (step >= 2)


def test_schedule_counts_calls_not_particles():
    case = net()
    elbo = R2G2_ELBO(num_steps=1, num_particles=3)
    evaluate(elbo, case)
    assert treatments(elbo)["l0.weight_unconstrained"] == "projected"
    evaluate(elbo, case)
    assert treatments(elbo)["l0.weight_unconstrained"] == "plain"


# -- Analytic KL ---------------------------------------------------------------


def test_kl_is_that_of_mean_field():
    """On a hand-written guide Pyro has the same terms, the plain gradient has."""
    case = weights(lambda x, w: torch.tanh(x @ w.mT))
    for seed in range(3):
        expected = evaluate(TraceMeanField_ELBO(), case, seed=seed)
        assert_same(evaluate(R2G2_ELBO(), case, seed=seed)[0], expected[0])
        assert_same(evaluate(spent(case), case, seed=seed), expected)


@pytest.mark.parametrize(
    "guide",
    [
        "AutoNormal",
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
    ],
)
def test_kl_of_autoguides_has_no_noise(guide):
    """With the likelihood masked, nothing random is left."""
    case = net(guide)
    trained = case.model

    def model(*args):
        with poutine.block(hide=["y"]):
            return trained(*args)

    silent = Case(model, case.guide, case.args)
    elbo = R2G2_ELBO()
    first, second = (evaluate(elbo, silent, seed=seed) for seed in (0, 1))
    assert_same(first, second)
    assert any(g.abs().max() > 0.1 for g in first[1].values())


def test_scale_and_mask_reach_the_kl():
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3), poutine.scale(scale=2.5), poutine.mask(mask=mask):
            pyro.sample("w", dist.Normal(torch.zeros(3), 1.5))

    def guide():
        loc = pyro.param("loc", lambda: fixed(3, seed=1).double())
        scale = pyro.param("scale", lambda: fixed(3, seed=2).double().exp(), constraint=constraints.positive)
        with pyro.plate("rows", 3), poutine.scale(scale=2.5), poutine.mask(mask=mask):
            pyro.sample("w", dist.Normal(loc, scale))

    case = Case(model, guide)
    assert_same(evaluate(R2G2_ELBO(), case, seed=0), evaluate(TraceMeanField_ELBO(), case, seed=1))
