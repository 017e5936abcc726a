# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.nn import DenseNN
from torch import nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pyro_rb.ops.score_identity import flat_transforms, score_obstacle

LOGIT = T.SigmoidTransform().inv
LOG = T.ExpTransform().inv


def learned(*value):
    return torch.tensor(value[0] if len(value) == 1 else value, requires_grad=True)


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


def affine(loc=0.0, scale=1.0):
    return T.AffineTransform(loc, scale)


def vector(fn=dist.Normal):
    """Three of them, of different scales."""
    return fn(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.5, 1.0, 1.5])).to_event(1)


def conditional(make):
    torch.manual_seed(0)
    flow = make(3, 2, [8])
    return dist.ConditionalTransformedDistribution(vector(), [flow]).condition(torch.ones(2))


# Of positive parameters p and q, each scalar.
FAMILIES = {
    "asymmetric laplace": lambda p, q: dist.AsymmetricLaplace(p, q, p),
    "beta": lambda p, q: dist.Beta(p, q),
    "beta of small concentration": lambda p, q: dist.Beta(p / 4, q / 4),
    "cauchy": lambda p, q: dist.Cauchy(p, q),
    "chi2": lambda p, q: dist.Chi2(p + q),
    "continuous bernoulli": lambda p, q: dist.ContinuousBernoulli(logits=p - q),
    "exponential": lambda p, q: dist.Exponential(p * q),
    "fisher snedecor": lambda p, q: dist.FisherSnedecor(p, q),
    "folded": lambda p, q: dist.FoldedDistribution(dist.Laplace(p, q)),
    "gamma": lambda p, q: dist.Gamma(p, q),
    "gamma of small concentration": lambda p, q: dist.Gamma(p / 8, q),
    "gumbel": lambda p, q: dist.Gumbel(p, q),
    "half cauchy": lambda p, q: dist.HalfCauchy(p * q),
    "half normal": lambda p, q: dist.HalfNormal(p * q),
    "inverse gamma": lambda p, q: dist.InverseGamma(p, q),
    "kumaraswamy": lambda p, q: dist.Kumaraswamy(p, q),
    "laplace": lambda p, q: dist.Laplace(p, q),
    "log normal": lambda p, q: dist.LogNormal(p, q),
    "logistic": lambda p, q: dist.Logistic(p, q),
    "masked mixture": lambda p, q: dist.MaskedMixture(torch.rand(p.shape) < 0.5, dist.Normal(p, q), dist.Gamma(p, q)),
    "normal": lambda p, q: dist.Normal(p, q),
    "pareto": lambda p, q: dist.Pareto(torch.ones_like(p), p * q),
    "relaxed bernoulli": lambda p, q: dist.RelaxedBernoulli(q, logits=p),
    "skew logistic": lambda p, q: dist.SkewLogistic(p, q, q),
    "soft asymmetric laplace": lambda p, q: dist.SoftAsymmetricLaplace(p, q, p, q),
    "soft laplace": lambda p, q: dist.SoftLaplace(p, q),
    "student": lambda p, q: dist.StudentT(p + q, p, q),
    "weibull": lambda p, q: dist.Weibull(p, q),
    # Transforms of the real line, and what may follow.
    "affine laplace": lambda p, q: transformed(dist.Laplace(0.0, 1.0), affine(p, q)),
    "inverse affine": lambda p, q: transformed(dist.Normal(0.0, 1.0), affine(p, q).inv),
    "logistic by hand": lambda p, q: transformed(dist.Uniform(0.0, 1.0), LOGIT, affine(p, q)),
    "beta to the line and back": lambda p, q: transformed(dist.Beta(0.5, 2.0), LOGIT, affine(p, q), LOGIT.inv),
    "gamma to the line and back": lambda p, q: transformed(dist.Gamma(0.5, 2.0), LOG, affine(p, q), LOG.inv),
    # The density vanishes at the ends that move.
    "shifted log normal": lambda p, q: transformed(dist.Normal(0.0, 1.0), LOG.inv, affine(p, q)),
    "stretched logit normal": lambda p, q: transformed(dist.Normal(0.0, 1.0), LOGIT.inv, affine(p, q)),
    # Zero stays.
    "scaled half normal": lambda p, q: transformed(dist.HalfNormal(1.0), affine(0.0, p * q)),
    "scaled from one": lambda p, q: transformed(dist.Gamma(p, 1.0), affine(1.0, q)),
    "power of gamma": lambda p, q: transformed(dist.Gamma(p, 1.0), T.PowerTransform(q), affine(0, q)),
    "masked transform": lambda p, q: transformed(dist.Normal(0.0, 1.0), affine(p, q)).mask(torch.rand(p.shape) < 0.5),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_mean_of_the_score_is_zero(make):
    p, q = (torch.full((20_000,), x, dtype=torch.double, requires_grad=True) for x in (1.5, 0.8))
    fn = make(p, q)
    assert score_obstacle(fn) is None
    scores = torch.autograd.grad(fn.log_prob(fn.rsample().detach()).sum(), (p, q), allow_unused=True)
    for score in scores:
        if score is not None:
            assert abs(score.mean()) < 5 * score.std() / len(score) ** 0.5 < 0.5


JOINT = {
    "dirichlet": lambda: dist.Dirichlet(learned(1.0, 0.3, 2.0)),
    "expanded": lambda: dist.ExpandedDistribution(dist.Gamma(learned(1.0), 1.0), [3]),
    "multivariate normal": lambda: dist.MultivariateNormal(learned(0.0, 1.0), torch.eye(2)),
    "multivariate student": lambda: dist.MultivariateStudentT(torch.tensor(3.0), learned(0.0, 1.0), torch.eye(2)),
    "projected normal": lambda: dist.ProjectedNormal(learned(0.0, 1.0)),
    "wishart": lambda: dist.Wishart(learned(3.0), torch.eye(2)),
    "relaxed one hot": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=learned(0.0, 1.0)),
    "simplex": lambda: transformed(dist.Normal(learned(0.0, 1.0), 1.0), T.StickBreakingTransform()),
    "cholesky": lambda: transformed(dist.Normal(learned(0.0, 1.0, 2.0), 1.0), T.CorrCholeskyTransform()),
    "gamma, permuted": lambda: transformed(
        dist.Gamma(learned(1.0, 2.0), 1.0).to_event(1), T.Permute(torch.tensor([1, 0])), affine(0.0, learned(1.0))
    ),
    "beta, reshaped": lambda: transformed(
        dist.Beta(learned(1.0, 2.0), 1.0).to_event(1), T.ReshapeTransform((2,), (2, 1))
    ),
    "gamma, linear": lambda: transformed(
        dist.Gamma(learned(1.0, 2.0), 1.0).to_event(1), T.LowerCholeskyAffine(torch.zeros(2), torch.eye(2))
    ),
    "simplex to the line": lambda: transformed(
        dist.Dirichlet(learned(1.0, 0.3, 2.0)), T.StickBreakingTransform().inv, T.affine_coupling(2)
    ),
    "inverse autoregressive": lambda: transformed(vector(), T.affine_autoregressive(3), T.spline(3)),
    "stable": lambda: transformed(vector(dist.Laplace), T.affine_autoregressive(3, stable=True)),
    "splines": lambda: transformed(vector(), T.spline_coupling(3).inv, T.spline_autoregressive(3)),
    "composed": lambda: transformed(vector(), T.ComposeTransform([T.householder(3), affine(learned(1.0))]).inv),
    "iterated": lambda: transformed(vector(), T.iterated(2, T.affine_coupling, 3)),
    "channels": lambda: transformed(
        dist.Normal(torch.zeros(2, 2, 2), 1.0).to_event(3), T.generalized_channel_permute(channels=2)
    ),
    "conditional": lambda: conditional(T.conditional_affine_autoregressive),
    "conditional coupling": lambda: conditional(T.conditional_affine_coupling),
    "conditional householder": lambda: conditional(T.conditional_householder),
    "conditional spline": lambda: conditional(T.conditional_spline),
    "conditional splines": lambda: conditional(T.conditional_spline_autoregressive),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # Wishart says so of all
@pytest.mark.parametrize("make", JOINT.values(), ids=JOINT.keys())
def test_joint_distributions(make):
    fn = make()
    assert score_obstacle(fn) is None
    # A copy, as the tap's, can be inverted.
    assert fn.log_prob(fn.rsample((4,)).detach().clone()).requires_grad


class OwnLogProb(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) / 2


class OwnTransform(T.AffineTransform):
    pass


class Shifted(nn.Module):
    def forward(self, x):
        return x.new_zeros(x.shape[:-1] + (2,)), x.new_zeros(x.shape[:-1] + (2,))


LEARNED = "may not be zero: learned "
KNOWN = " is not known"
MEMORY = "log_prob works only on the very tensor"
OBSTACLES = {
    "uniform": ("support depends", lambda p: dist.Uniform(0.0, p)),
    "uniform, wrapped": ("support depends", lambda p: dist.Uniform(-p, torch.ones(2)).to_event(1).mask(False)),
    "uniform, in a mixture": (
        "support depends",
        lambda p: dist.MaskedMixture(torch.tensor(True), dist.Uniform(0.0, p), dist.Normal(p, 1.0)),
    ),
    "delta": ("a Delta has", lambda p: transformed(dist.Delta(p, log_density=p), affine())),
    "pareto": (LEARNED + "Aff", lambda p: dist.Pareto(p, 3.0)),
    "affine beta": (LEARNED + "Aff", lambda p: dist.AffineBeta(2.0, 3.0, p, 1.0)),
    "shifted half normal": (LEARNED + "Aff", lambda p: transformed(dist.HalfNormal(1.0), affine(p))),
    "shifted folded": (LEARNED + "Aff", lambda p: transformed(dist.FoldedDistribution(dist.Normal(0, 1)), affine(p))),
    "shifted half cauchy": (LEARNED + "Aff", lambda p: transformed(dist.HalfCauchy(1.0), affine(p))),
    "shifted, then composed": (
        LEARNED + "Aff",
        lambda p: transformed(dist.Gamma(1.0, 1.0), T.ComposeTransform([affine(p), LOG.inv])),
    ),
    "shifted twice": (LEARNED + "Aff", lambda p: transformed(dist.Gamma(1.0, 1.0), affine(1.0), affine(0.0, p))),
    "shifted by an inverse": (LEARNED + "Aff", lambda p: transformed(dist.Gamma(1.0, 1.0), affine(1.0, p).inv)),
    "stretched logistic": (LEARNED + "Aff", lambda p: transformed(dist.Logistic(0.0, 1.0), LOGIT.inv, affine(0.0, p))),
    "shifted exp of laplace": (LEARNED + "Aff", lambda p: transformed(dist.Laplace(0.0, 1.0), LOG.inv, affine(p))),
    "masked inside": (LEARNED + "Aff", lambda p: transformed(dist.Normal(0.0, 1.0).mask(False), affine(0.0, p))),
    "surface": (
        LEARNED + "Aff",
        lambda p: transformed(ExpRelaxedCategorical(torch.tensor(0.5), logits=torch.ones(2)), affine(0.0, p)),
    ),
    "flow of a bounded one": (LEARNED + "Spline", lambda p: transformed(vector(dist.Uniform), T.spline(3))),
    "flow of heavy tails": (LEARNED + "Aff", lambda p: transformed(vector(dist.Cauchy), T.affine_coupling(3))),
    "part of an interval": ("another support", lambda p: transformed(dist.Uniform(0.2, 0.8), LOGIT, affine(p))),
    "no injection": ("another support", lambda p: transformed(dist.Normal(p, 1.0), T.PowerTransform(2.0))),
    "jump": (KNOWN, lambda p: transformed(dist.Normal(0.0, 1.0), T.LeakyReLUTransform(), affine(p))),
    "own log_prob": ("OwnLogProb of tests" + KNOWN, lambda p: OwnLogProb(p, 1.0).to_event(0)),
    "own transform": (
        "OwnTransform of tests" + KNOWN,
        lambda p: transformed(dist.Normal(0.0, 1.0), OwnTransform(p, 1.0)),
    ),
    "own module": ("Shifted of tests" + KNOWN, lambda p: transformed(vector(), T.AffineCoupling(1, Shifted()))),
    "own function": ("function" + KNOWN, lambda p: transformed(vector(), T.AffineCoupling(1, lambda x: (x, x)))),
    "planar": (MEMORY, lambda p: transformed(vector(), T.affine_autoregressive(3), T.planar(3))),
    "block": (MEMORY, lambda p: transformed(vector(), T.block_autoregressive(3))),
    "conditional planar": (MEMORY, lambda p: conditional(T.conditional_planar)),
    "sylvester": ("not that of its Jacobian", lambda p: transformed(vector(), T.sylvester(3))),
    "jump in a flow": (
        "LeakyReLUTransform" + KNOWN,
        lambda p: transformed(vector(), T.block_autoregressive(3, activation="LeakyReLU")),
    ),
    "bounds of a flow": (LEARNED + "Block", lambda p: transformed(vector(dist.Laplace), T.block_autoregressive(3))),
    "bounds of two flows": (
        LEARNED + "Block",
        lambda p: transformed(vector(), T.neural_autoregressive(3), T.block_autoregressive(3)),
    ),
    "straight through": (MEMORY, lambda p: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=p)),
}


@pytest.mark.parametrize("reason, make", OBSTACLES.values(), ids=OBSTACLES.keys())
def test_obstacles(reason, make):
    assert reason in score_obstacle(make(learned(1.5)))


@pytest.mark.parametrize("name", ["planar", "block", "conditional planar"])
def test_known_at_the_last_draw(name):
    assert score_obstacle(OBSTACLES[name][1](learned(1.5)), at_draw=True) is None


@pytest.mark.parametrize(
    "layer",
    [
        T.affine_autoregressive,
        T.affine_coupling,
        T.block_autoregressive,
        T.neural_autoregressive,
        T.planar,
        T.radial,
        T.spline,
        T.spline_autoregressive,
        T.spline_coupling,
        partial(T.householder, count_transforms=2),
    ],
)
def test_log_determinants_are_those_of_jacobians(layer):
    """Else the mean of the score is not zero."""
    layer = layer(4).double()
    for p in layer.parameters():
        p.data += 0.5 * torch.randn_like(p)
    x = torch.randn(4, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(layer._call, x)
    log_det = layer.log_abs_det_jacobian(x, layer(x)).sum()
    assert (jacobian.det().abs().log() - log_det).abs() < 1e-6


@pytest.mark.parametrize(
    "make, mean",
    [
        (lambda p: dist.Uniform(torch.zeros_like(p), p), -1 / 1.5),
        (lambda p: dist.Pareto(p, 3.0 * torch.ones_like(p)), 3 / 1.5),
        (lambda p: transformed(dist.HalfNormal(torch.ones_like(p)), affine(p)), (2 / torch.pi) ** 0.5),
        (lambda p: transformed(dist.Laplace(torch.zeros_like(p), 1.0), LOG.inv, affine(p)), 0.5),
    ],
    ids=["uniform", "pareto", "shifted half normal", "shifted exp of laplace"],
)
def test_what_a_moving_support_does(make, mean):
    # The density at the end, times its speed.
    p = torch.full((200_000,), 1.5, dtype=torch.double, requires_grad=True)
    fn = make(p)
    # Stay clear of the very end, where rounding may put a draw outside.
    z = fn.rsample().detach() * (1 - 1e-12) + 1e-12
    (score,) = torch.autograd.grad(fn.log_prob(z).sum(), p)
    assert abs(score.mean() - mean) < 0.05


def test_subclasses_that_inherit():
    class Loguniform(dist.TransformedDistribution):
        def __init__(self, low, high):
            super().__init__(dist.Uniform(low, high), [T.ExpTransform()])

    class Mine(dist.Normal):
        tag = "mine"

    assert score_obstacle(Mine(learned(0.0), 1.0).expand([3]).to_event(1)) is None
    assert "support" in score_obstacle(Loguniform(0.0, learned(1.0)))
    fn = Mine(learned(0.0), 1.0)
    fn.log_prob = lambda value: -value
    assert "Mine of tests" + KNOWN in score_obstacle(fn)


def test_nothing_is_remembered():
    b = torch.tensor(1.5)
    fn = transformed(dist.Gamma(learned(1.0), 1.0), affine(b))
    assert score_obstacle(fn) is None
    b.requires_grad_()
    assert "learned" in score_obstacle(fn)

    norm = T.batchnorm(3)
    fn = transformed(vector(), norm)
    assert "BatchNorm may differ" in score_obstacle(fn)
    norm.eval()
    assert score_obstacle(fn) is None

    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Tanh(), DenseNN(4, [4], [2, 2]))
    fn = transformed(vector(), T.AffineCoupling(1, net))
    assert "Dropout may differ" in score_obstacle(fn)
    net.eval()
    assert score_obstacle(fn) is None


def test_hooks():
    flow = T.affine_coupling(3)
    fn = transformed(vector(), flow)
    hook = flow.nn.layers[0].register_forward_hook(lambda module, inputs, output: output + torch.rand(()))
    assert "Linear may differ" in score_obstacle(fn)
    hook.remove()
    assert score_obstacle(fn) is None


def test_no_value_is_looked_at():
    # On this device there are none: a look would raise, as a look on a GPU would wait.
    with torch.device("meta"):
        p = torch.ones(3, requires_grad=True)
        normal = dist.Normal(p, 1.0, validate_args=False)
        gamma = dist.Gamma(p, p, validate_args=False)
        uniform = dist.Uniform(torch.zeros(3), p, validate_args=False)
        assert score_obstacle(transformed(normal, LOG.inv, affine(torch.zeros(3), p))) is None
        assert score_obstacle(transformed(gamma, affine(torch.zeros(3), p))) is None
        assert score_obstacle(transformed(gamma, affine(p, p))) is not None
        assert score_obstacle(transformed(uniform, LOGIT)) is not None


def test_flat_transforms():
    parts = T.ComposeTransform([T.ExpTransform(), affine(1.0)])
    fn = transformed(transformed(dist.Normal(0.0, 1.0), T.TanhTransform()), T.IndependentTransform(parts, 0).inv)
    names = [type(t.inv if i else t).__name__ for i, t in enumerate(flat_transforms(fn))]
    assert names == ["TanhTransform", "AffineTransform", "ExpTransform"]
