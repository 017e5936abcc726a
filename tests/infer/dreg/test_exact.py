# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Against bounds and gradients by quadrature, and against RenyiELBO."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_rb.infer import DReG_ELBO
from pyro_rb.infer.importance_surrogate import Draw
from tests.support.cases import positive, real
from tests.support.common import assert_unbiased, assert_variance_ratio
from tests.support.elbo_contract import draw_gradients
from tests.support.guides import AUTOGUIDES
from tests.support.iwae import BOUNDS, Bound, grid, iwae_loss, log_normal
from tests.support.models import conj

pytestmark = pytest.mark.slow

WIDE = "AutoNormal", "AutoMultivariateNormal", "AutoHierarchicalNormalMessenger"


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=BOUNDS)
def bound(request):
    return BOUNDS[request.param]()


def make(num_particles, bound, vectorize=True, scale=1.0):
    nesting = bound.nesting + 1  # the plate of copies
    options = {"vectorize_particles": vectorize, "control_variate_scale": scale}
    return DReG_ELBO(num_particles, nesting, **options)


def check_gradient(bound, elbo, num_particles, each_subsample=True):
    # Subsamples are drawn for all copies at once, and make most of the noise: where all of them do not take turns.
    num_calls, size = 40, 100
    if bound.case.subsamples and not each_subsample:
        num_calls, size = 300, 10
    samples, exact = bound.draw_gradients(elbo, num_calls, size, each_subsample), bound.gradient(num_particles)
    for gradients in (samples, exact):
        if "tril" in gradients:  # the upper triangle is not used, and its gradient is NaN
            gradients["tril"] = gradients["tril"].tril()
    assert_unbiased(samples, exact, detect=0.5)


def test_quadrature():
    """One particle: the ELBO. All mass at one weight: its log. Two values: by hand."""
    nodes, weights = grid(1)
    assert (weights @ nodes[:, 0].square()).item() == pytest.approx(1.0)
    elbo = (weights @ log_normal(nodes[:, 0], 0.3, 0.8)).item()
    assert -iwae_loss(log_normal(nodes[:, 0], 0.3, 0.8), weights, 1).item() == pytest.approx(elbo)
    same = torch.full((3,), 0.7), torch.tensor([0.2, 0.5, 0.3])
    assert iwae_loss(*same, 8).item() == pytest.approx(-0.7)
    two = torch.tensor([1.0, 3.0]).log(), torch.tensor([0.5, 0.5])
    by_hand = 0.5 * math.log(2.0) + 0.25 * math.log(3.0)
    assert -iwae_loss(*two, 2).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("num_particles", [1, 2, 8, 64])
def test_bound(bound, num_particles):
    num_calls, size = (200, 10) if bound.case.subsamples else (40, 100)
    copies, elbo = bound.replicate(size), make(num_particles, bound)
    arguments = (copies.model, copies.guide, *copies.args)
    with pyro.validation_enabled(False):
        losses = torch.tensor([elbo.loss(*arguments) / size for _ in range(num_calls)])
    exact = bound.exact(num_particles).detach()
    assert_unbiased(losses, exact, detect=0.2)


@pytest.mark.parametrize("num_particles", [2, 8, 64])
def test_gradient(bound, num_particles):
    check_gradient(bound, make(num_particles, bound), num_particles)


@pytest.mark.parametrize("scale", [0.0, 0.5, "adaptive"])
def test_gradient_with_other_scales(bound, scale):
    elbo = make(4, bound, scale=scale)
    bound.draw_gradients(elbo, 60, 2)  # to learn from
    check_gradient(bound, elbo, 4)


def test_gradient_with_looped_particles(bound):
    """Of the subsample too: all particles must have the same."""
    check_gradient(bound, make(3, bound, vectorize=False), 3, each_subsample=False)


def test_path_gradient_with_plain_weights_is_biased(monkeypatch):
    """The obvious shortcut, and so a test of the power of the tests above: drop the score,
    keep the weights as they are."""

    bound = BOUNDS["hierarchical"]()
    monkeypatch.setattr(Draw, "factor", lambda draw, share: 1.0)
    for num_particles in (2, 8):
        samples = bound.draw_gradients(make(num_particles, bound), 40, 400)
        with pytest.raises(AssertionError, match="biased in"):
            assert_unbiased(samples, bound.gradient(num_particles), detect=None)


@pytest.mark.parametrize("name", ["tempered", "tempered_elements", "subsampled_locals"])
def test_squared_weights_are_biased_on_scaled_sites(name, monkeypatch):
    """A test of power as well: what equation 6 of the paper says of unscaled sites."""
    bound = BOUNDS[name]()
    monkeypatch.setattr(Draw, "factor", lambda draw, share: draw.broad_weight)
    samples = bound.draw_gradients(make(4, bound), 40, 100, each_subsample=True)
    with pytest.raises(AssertionError, match="biased in"):
        assert_unbiased(samples, bound.gradient(4), detect=None)


@pytest.mark.parametrize("num_particles", [2, 8])
@pytest.mark.parametrize("name", WIDE)
def test_agrees_with_scale_0_on_autoguides(name, num_particles):
    """Global latents and latents in a plate, constrained ones too. Scale 0 is plain
    differentiation of the bound."""
    case = AUTOGUIDES[name]()
    dreg, plain = (
        Bound(case, case.exact_loss, nesting=1).draw_gradients(
            DReG_ELBO(num_particles, 2, vectorize_particles=True, control_variate_scale=c), 40, 100
        )
        for c in (1.0, 0.0)
    )
    assert_unbiased(dreg, independent=plain, detect=0.5)


def test_signal_to_noise_ratio():
    """It grows with the number of particles, and falls with RenyiELBO."""

    def ratio(cls, num_particles):
        elbo = cls(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
        case = conj(shift=0.5, width=1.3)
        samples = draw_gradients(elbo, case, 250, seed=0)["loc"]
        return (samples.mean(0).abs() / samples.std(0)).mean()

    few, many = 2, 50
    assert ratio(DReG_ELBO, many) > 2.0 * ratio(DReG_ELBO, few)
    assert ratio(RenyiELBO, many) < 0.6 * ratio(RenyiELBO, few)


@pytest.mark.parametrize("num_particles", [2, 8, 64])
def test_variance_is_lower_on_a_wide_guide(num_particles):
    options = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    case = conj()
    dreg, renyi = (
        draw_gradients(cls(**options), case, 250, seed=0) for cls in (DReG_ELBO, RenyiELBO)
    )
    assert_variance_ratio(dreg, renyi, below=0.4)


def test_variance_on_a_narrow_guide():
    """Far higher, and the adaptive scale mends it."""
    options = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 1}
    case = conj(width=0.15)
    plain, renyi, adaptive = (
        draw_gradients(elbo, case, 300, seed=0, num_burn_in=100)
        for elbo in (
            DReG_ELBO(**options),
            RenyiELBO(**options),
            DReG_ELBO(**options, control_variate_scale="adaptive"),
        )
    )
    assert_variance_ratio(plain, renyi, above=3.0)
    assert_variance_ratio(adaptive, renyi, below=1.3)


@pytest.mark.parametrize("shared", [False, True])
def test_adaptive_learns_a_scale_for_what_shares_parameters(shared):
    """Not for what depends on one another's draws: a score is at fixed draws."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.7))
        pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.3))

    def guide():
        z1 = pyro.sample("z1", dist.Normal(real("m1", 0.3), positive("s1", 1.1)))
        pyro.sample("z2", dist.Normal(0.4 * z1, positive("s1" if shared else "s2", 1.1)))

    elbo = DReG_ELBO(4, 0, vectorize_particles=True, control_variate_scale="adaptive")
    for _ in range(60):
        elbo.loss_and_grads(model, guide)
    first, second = [row.treatment for row in elbo.report()]
    assert (first == second) == shared and first != "path gradient, c = 0"
