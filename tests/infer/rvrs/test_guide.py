# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What an RVRSGuide does besides gradients: thresholds, draws, state, guides, entrances."""

import copy
import io
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Predictive, Trace_ELBO, autoguide
from pyro.nn import PyroModule
from pyro.optim import Adam

from pyro_rb import RVRSGuide
from pyro_rb.infer.rvrs_sampler import sample
from pyro_rb.infer.rvrs_surrogate import _through_draws
from tests.infer.rvrs.models import CASES, Local, one_guide, one_model

pytestmark = pytest.mark.slow


def model(x=None):
    """Constrained latents in and out of a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("items", 4):
        th = pyro.sample("th", dist.Normal(mu, tau))
        y = torch.tensor([1.0, 2.0, 3.0, 0.0]) if x is None else x
        pyro.sample("x", dist.Normal(th + w[..., 0], 1.0), obs=y)


def train(model, guide, num_steps, elbo=None, lr=0.01, args=()):
    svi = SVI(model, guide, Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(num_steps)]


def in_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["mu", "w"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["mu", "w"])))
    return guide


AUTOGUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoGuideList": in_list,
    "masked flow": lambda model: autoguide.AutoNormalizingFlow(
        model, partial(iterated, 1, affine_autoregressive)
    ),
}


# -- The path through the draws ------------------------------------------------


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_path_of_log_q(name):
    """Equals grad_z log q dz/dphi, by replaying the guide at detached values."""
    torch.set_default_dtype(torch.float64)
    proposal = AUTOGUIDES[name](model)
    guide = RVRSGuide(model, proposal)
    guide()
    proposer = guide._make_proposer((), {})
    accepted = sample(proposer, 3, lambda: guide.T, 0.01, 0.3, 1000)
    weight = torch.tensor([0.3, -1.2, 2.0])
    parameters = list(guide.parameters())
    actual = torch.autograd.grad(
        _through_draws(proposer, accepted, weight), parameters, retain_graph=True, allow_unused=True
    )
    expected = [torch.zeros_like(p) for p in parameters]
    (proposals,) = accepted.rounds  # one round at this seed
    drawn = proposals.tap.path.values
    run = proposer.run(proposer.guide, len(proposals.log_weight), {k: v.detach() for k, v in drawn.items()})
    score = (weight * proposer.log_prob_sum(run)[accepted.position]).sum()
    total = (weight * proposals.log_q[accepted.position]).sum()
    for sign, x in ((1, total), (-1, score)):
        grads = torch.autograd.grad(x, parameters, allow_unused=True)
        for e, g in zip(expected, grads):
            e += 0 if g is None else sign * g
    for p, a, e in zip(parameters, actual, expected):
        torch.testing.assert_close(torch.zeros_like(p) if a is None else a, e)


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_guides(name):
    guide = RVRSGuide(model, AUTOGUIDES[name](model))
    losses = train(model, guide, 15)
    losses += train(model, guide, 3, Trace_ELBO(num_particles=5, vectorize_particles=True))
    assert torch.tensor(losses).isfinite().all()
    draws = guide.sample_posterior(6)
    assert {k: v.shape for k, v in draws.items()} == {
        "mu": (6,),
        "tau": (6,),
        "w": (6, 3),
        "th": (6, 4),
    }
    assert (draws["tau"] > 0).all()
    torch.testing.assert_close(draws["w"].sum(-1), torch.ones(6))


def test_default_guide():
    assert isinstance(RVRSGuide(model).guide, autoguide.AutoDiagonalNormal)


def test_improves_on_its_guide():
    """Most of what mean field misses on a skewed posterior is gained."""
    pyro.clear_param_store()
    proposal = autoguide.AutoNormal(one_model)
    train(one_model, proposal, 400, Trace_ELBO(20, vectorize_particles=True), lr=0.03)
    with torch.no_grad():
        mean_field = -Trace_ELBO(4000, vectorize_particles=True).loss(one_model, proposal)
    guide = RVRSGuide(one_model, proposal, Z_target=0.2)
    train(one_model, guide, 50, lr=0.001)
    value, error = guide.elbo(4000)
    assert error < 0.05
    assert value > mean_field + 5 * error


# -- Thresholds ----------------------------------------------------------------


@pytest.mark.parametrize("start", [None, 10.0, -50.0, 1e5])
def test_threshold_reaches_the_target(start):
    guide = RVRSGuide(one_model, one_guide, T=start)
    train(one_model, guide, 150, lr=1e-3)
    T = guide.T.item()
    draws = guide._make_proposer((), {}).propose(4000, False).log_weight
    mean = (0.01 + 0.99 * (draws + T).sigmoid()).mean().item()
    assert mean == pytest.approx(0.33, abs=0.08)
    assert guide.Z.item() == pytest.approx(0.33, abs=0.15)


def frozen(call):
    guide = RVRSGuide(one_model, one_guide)
    train(one_model, guide, 2)
    T, Z = guide.T.clone(), guide.Z.clone()
    call(guide)
    return torch.equal(T, guide.T) and torch.equal(Z, guide.Z)


def test_threshold_is_frozen_in_evaluation():
    def no_grad(guide):
        with torch.no_grad():
            guide()

    def svi(guide):
        SVI(one_model, guide, Adam({}), Trace_ELBO()).evaluate_loss()

    assert not frozen(lambda guide: guide())
    assert frozen(no_grad) and frozen(svi)
    assert frozen(lambda guide: guide.eval()())
    assert frozen(lambda guide: guide.sample_posterior(3))
    assert frozen(lambda guide: guide.elbo(10))
    assert frozen(lambda guide: Predictive(one_model, guide=guide, num_samples=3)())
    guide = RVRSGuide(one_model, one_guide, T=1.25, adaptation="fixed")
    train(one_model, guide, 3)
    assert guide.T == 1.25 and not guide.Z.isnan()


def test_thresholds_of_items():
    """Of items that were seen only; with one pilot batch, then adapted."""
    case = Local(subsample_size=1)
    guide = RVRSGuide(case.model, case.guide, local_plate="items", local_size=4)
    assert guide.T.shape == (4,) and guide.T.isnan().all()
    train(case.model, guide, 1)
    assert guide.T.isfinite().sum() == 1
    for _ in range(40):
        train(case.model, guide, 1)
    assert guide.T.isfinite().all()


# -- A variational autoencoder ---------------------------------------------------


class VAE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(5, 4), torch.nn.Linear(2, 5)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        h = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(h[:, :2], h[:, 2:].exp()).to_event(1))


@pytest.mark.parametrize("is_small", [True, False])
def test_amortized(is_small):
    vae, x = VAE(), torch.bernoulli(torch.full((12, 5), 0.4))
    guide = RVRSGuide(vae.model, vae.guide, local_plate="data", Z_target=0.3)
    svi = SVI(vae.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x[:4])
    guide._structure = guide._structure._replace(is_small=is_small)
    for _ in range(6):
        svi.step(x[:5])
        svi.step(x[5:])
    assert guide.Z.item() == pytest.approx(0.3, abs=0.1)
    guide.eval()
    unseen = torch.bernoulli(torch.full((3, 5), 0.6))
    value, error = guide.elbo(2000, unseen)
    losses = torch.tensor([svi.evaluate_loss(unseen) for _ in range(300)])
    assert -losses.mean().item() == pytest.approx(value, abs=5 * (losses.std() / 300**0.5).item() + 0.05)
    assert error < 0.05
    assert guide.sample_posterior(7, unseen)["z"].shape == (7, 3, 2)


def test_one_threshold_for_all_items():
    vae, x = VAE(), torch.bernoulli(torch.full((12, 5), 0.4))
    guide = RVRSGuide(vae.model, vae.guide, local_plate="data", T=3.0, adaptation="fixed")
    train(vae.model, guide, 2, args=(x,))
    guide(x[:3])


# -- Prediction, quantiles, bounds ---------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = RVRSGuide(model, autoguide.AutoNormal(model, init_scale=0.5))
    guide()
    predict = Predictive(model, guide=guide, num_samples=200, parallel=parallel)
    draws = predict()
    assert draws["th"].shape == (200, 4) and draws["x"].shape == (200, 4)
    # The same distribution as that of sample_posterior, not that of the proposals.
    for name in ("mu", "tau"):
        a, b = draws[name].squeeze(), guide.sample_posterior(1000)[name]
        error = b.std() * (1 / 200 + 1 / 1000) ** 0.5
        assert (a.mean() - b.mean()).abs() < 5 * error


def test_predictive_of_local():
    case = Local(has_global=True)
    guide = RVRSGuide(case.model, case.guide, local_plate="items", local_size=4)
    draws = Predictive(case.model, guide=guide, num_samples=3)()
    assert draws["z"].shape == (3, 4)
    draws = guide.sample_posterior(5)
    assert draws["g"].shape == (5,) and draws["z"].shape == (5, 4)
    assert len(draws["g"].unique()) == 5


def test_median_and_quantiles():
    guide = RVRSGuide(model, autoguide.AutoNormal(model, init_scale=0.5))
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.9])
    assert median["th"].shape == (4,) and quantiles["w"].shape == (2, 3)
    assert (quantiles["tau"][0] < median["tau"]) and (median["tau"] < quantiles["tau"][1])


def test_bound_is_what_losses_estimate():
    guide = RVRSGuide(one_model, one_guide, T=1.0, adaptation="fixed")
    value, error = guide.elbo(3000)
    losses = torch.tensor([Trace_ELBO().loss(one_model, guide) for _ in range(600)])
    spread = (error**2 + losses.var().item() / 600) ** 0.5
    assert -losses.mean().item() == pytest.approx(value, abs=5 * spread)


@pytest.mark.parametrize("options", [{}, {"has_global": True}, {"subsample_size": 2}])
def test_local_bound_is_what_losses_estimate(options):
    case = Local(**options)
    guide = RVRSGuide(
        case.model, case.guide, T=1.0, local_plate="items", local_size=4, adaptation="fixed"
    )
    value, error = guide.elbo(6000)
    losses = torch.tensor([Trace_ELBO().loss(case.model, guide) for _ in range(400)])
    spread = (error**2 + losses.var().item() / 400) ** 0.5
    assert -losses.mean().item() == pytest.approx(value, abs=5 * spread)


# -- State -----------------------------------------------------------------------


def test_names_of_parameters_stay():
    proposal = autoguide.AutoNormal(model)
    train(model, proposal, 3)
    store = pyro.get_param_store()
    before = {name: value.detach().clone() for name, value in store.items()}
    guide = RVRSGuide(model, proposal)
    guide.eval()()
    assert {n: v.tolist() for n, v in store.items()} == {n: v.tolist() for n, v in before.items()}
    train(model, guide, 2)
    assert store.keys() == before.keys()
    assert guide.guide is proposal
    assert "guide.locs.mu_unconstrained" in dict(guide.named_parameters())
    owned = {id(p) for p in Trace_ELBO()(torch.nn.Identity(), guide).parameters()}
    assert owned == {id(p) for p in proposal.parameters()} and owned


class Named(PyroModule):
    """A guide without a Pyro name, which PyroModule would rename on access."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, 1.0))


def test_a_guide_without_a_name_is_not_renamed():
    proposal = Named()
    proposal()
    guide = RVRSGuide(one_model, proposal)
    train(one_model, guide, 2)
    assert guide.guide.loc is proposal.loc
    assert set(pyro.get_param_store()) == {"loc", "prior", "noise"}


def test_state_dict():
    guide = RVRSGuide(one_model, one_guide)
    train(one_model, guide, 3)
    other = RVRSGuide(one_model, one_guide)
    assert other.T.isnan()
    other.load_state_dict(guide.state_dict())
    assert other.T == guide.T and other.Z == guide.Z
    pyro.set_rng_seed(1)
    expected = guide.eval()()
    pyro.set_rng_seed(1)
    # The first call looks at model and guide, with random numbers of its own.
    other._structure = guide._structure
    assert other.eval()() == expected


def plain_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.tanh(), 1.0), obs=torch.tensor(1.0))


def saved(guide):
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), saved])
def test_copies(clone):
    guide = RVRSGuide(plain_model)
    train(plain_model, guide, 3)
    copied = clone(guide)
    assert copied.T == guide.T and copied.model is plain_model
    train(plain_model, copied, 2)
    train(plain_model, guide, 2)


def test_module_local_params():
    with pyro.settings.context(module_local_params=True):
        guide = RVRSGuide(plain_model)
        Trace_ELBO().differentiable_loss(plain_model, guide).backward()
        assert all(p.grad is not None for p in guide.parameters())
        assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    torch.set_default_dtype(dtype)
    guide = RVRSGuide(one_model, one_guide)
    train(one_model, guide, 3)
    assert all(p.dtype == dtype for p in pyro.get_param_store().values())
    torch.set_default_dtype(torch.float32)
    assert guide.sample_posterior(2)["z"].dtype == dtype


def test_two_guides_share_nothing():
    guides = [RVRSGuide(CASES[c][0], CASES[c][1]) for c in ("one", "two")]
    for guide in guides * 2:
        guide()
    assert set(guides[0]()) == {"z"} and set(guides[1]()) == {"a", "b"}
