# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which log densities are in one weight, and weights of zero."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_rb.infer import DReG_ELBO
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate
from tests.support.iwae import grid, iwae_loss, log_normal
from tests.support.models import CONJ_X, conj, conj_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- One weight for a plate, or one an item ----------------------------------


def test_guide_site_outside_of_the_plate_counts_once():
    """RenyiELBO counts it once for each item, and is no bound."""
    x = torch.tensor(CONJ_X)
    guide = AutoDiagonalNormal(conj_model)
    guide(x)

    def loss(elbo):
        pyro.set_rng_seed(0)
        return elbo.loss(conj_model, guide, x)

    expected = loss(Trace_ELBO())
    for vectorize in (False, True):
        elbo = DReG_ELBO(1, 1, vectorize_particles=vectorize)
        assert loss(elbo) == pytest.approx(expected)
    assert abs(loss(RenyiELBO(num_particles=1)) - expected) > 1.0


def test_weights_of_items_are_their_own():
    """The gradient of an item does not change when another item is added."""
    few, many = conj(), conj()
    few.args = (torch.tensor(CONJ_X)[:1],)
    noise = torch.randn(3, 4)

    def fixed(n):
        class Fixed(dist.Normal):
            def rsample(self, sample_shape=torch.Size()):
                return self.loc + self.scale * noise[:, :n]

        def guide(x):
            with pyro.plate("data", n):
                pyro.sample("z", Fixed(real("loc", *CONJ_X)[:n], 0.9))

        return guide

    results = []
    for case, n in ((few, 1), (many, 4)):
        case.guide = fixed(n)
        elbo = DReG_ELBO(3, 1, vectorize_particles=True)
        results.append(evaluate(elbo, case)[1]["loc"])
    assert results[0][0].item() == pytest.approx(results[1][0].item())


def test_weights_of_nested_plates():
    """Both plates hold all sites: one weight for each of the six items."""
    x = torch.randn(2, 3)

    def model():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(real("loc", 0.3), positive("scale", 0.9)))

    for vectorize in (False, True):
        options = {"num_particles": 4, "vectorize_particles": vectorize, "max_plate_nesting": 2}
        losses = []
        for elbo in (DReG_ELBO(**options), RenyiELBO(**options)):
            pyro.set_rng_seed(0)
            losses.append(elbo.loss(model, guide))
        assert losses[0] == pytest.approx(losses[1])


def test_batch_without_a_plate_has_one_weight():
    """Dimensions that no plate declares independent are summed, validated or not."""
    x = torch.tensor(CONJ_X)

    def make(event):
        def model():
            z = pyro.sample("z", event(dist.Normal(torch.zeros(4), 1.0)))
            pyro.sample("x", event(dist.Normal(z, 0.5)), obs=x)

        def guide():
            pyro.sample("z", event(dist.Normal(real("loc", *CONJ_X), 1.0)))

        return model, guide

    losses = []
    with pyro.validation_enabled(False):
        for event in (lambda d: d.to_event(1), lambda d: d):
            pyro.set_rng_seed(0)
            losses.append(DReG_ELBO(3).loss(*make(event)))
    assert losses[0] == pytest.approx(losses[1])


# -- Subsampling, scale, mask --------------------------------------------------


def subsampled(local):
    """conj or, if not local, one latent for all data; two of four items at a time."""
    x = torch.tensor(CONJ_X)

    def model():
        z = None if local else pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 4, subsample_size=2) as i:
            seen.append(i.tolist())
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0)) if local else z
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide():
        if not local:
            pyro.sample("z", dist.Normal(real("loc", 0.3), 0.8))
        with pyro.plate("data", 4, subsample_size=2):
            if local:
                pyro.sample("z", dist.Normal(real("loc", 0.3), 0.8))

    seen = []
    return model, guide, seen


@pytest.mark.parametrize("local", [False, True])
def test_looped_particles_share_the_subsample(local):
    model, guide, seen = subsampled(local)
    DReG_ELBO(5).loss_and_grads(model, guide)
    assert len(seen) == 5 and all(i == seen[0] for i in seen)
    DReG_ELBO(5).loss_and_grads(model, guide)
    assert seen[5] != seen[0] and all(i == seen[5] for i in seen[5:])


def test_looped_particles_of_renyi_do_not():
    model, guide, seen = subsampled(True)
    RenyiELBO(num_particles=5).loss_and_grads(model, guide)
    assert any(i != seen[0] for i in seen)


def test_subsampling_multiplies_the_bound():
    """Not the log weights: with all items alike, any subsample gives the full bound."""

    def make(subsample_size):
        def model():
            with pyro.plate("data", 4, subsample_size=subsample_size):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.7).expand(subsample_size))

        class Fixed(dist.Normal):
            def rsample(self, sample_shape=torch.Size()):
                return torch.tensor([[0.3], [0.9], [-0.4]]) + 0.0 * self.loc

        def guide():
            with pyro.plate("data", 4, subsample_size=subsample_size):
                pyro.sample("z", Fixed(real("loc", 0.3), 0.8))

        return model, guide

    losses = [DReG_ELBO(3, 1, vectorize_particles=True).loss(*make(n)) for n in (1, 2, 4)]
    assert losses == pytest.approx([losses[2]] * 3)


def test_subsampling_inside_of_the_weights_as_renyi():
    """A latent outside of the plate: the factor stays within the one weight."""
    model, guide, _ = subsampled(False)
    losses = []
    for cls in (DReG_ELBO, RenyiELBO):
        pyro.set_rng_seed(0)
        elbo = cls(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_scale_tempers_the_weights_as_renyi(entrance):
    case = conj()
    case.model, case.guide = (poutine.scale(f, 0.3) for f in (case.model, case.guide))
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    loss, expected = evaluate(RenyiELBO(**options), case, seed=0)
    plain = evaluate(DReG_ELBO(**options, control_variate_scale=0.0), case, entrance, seed=0)
    assert_same(plain, (loss, expected))
    assert evaluate(DReG_ELBO(**options), case, entrance, seed=0)[0] == pytest.approx(loss)


@pytest.mark.parametrize("vectorize", [False, True])
def test_masked_items_add_nothing(vectorize):
    case, mask = conj(), torch.tensor([True, False, True, True])
    case.model, case.guide = (poutine.mask(f, mask) for f in (case.model, case.guide))
    elbo = DReG_ELBO(3, vectorize_particles=vectorize)
    for entrance in ENTRANCES:
        for gradient in evaluate(elbo, case, entrance)[1].values():
            assert gradient[1] == 0 and gradient[mask].all()


# -- Sequential plates ---------------------------------------------------------


def in_sequence(size, scale=1.0):
    """A latent for each item of a sequential plate, of which ``size`` are taken."""
    x = torch.tensor([0.5, -1.2, 2.0])

    def model():
        for i in pyro.plate("data", 3, subsample_size=size):
            z = pyro.sample(f"z{i}", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 0.7), obs=x[i])

    def guide():
        loc, width = real("loc", 0.3, -0.5, 0.9), positive("width", 0.8)
        for i in pyro.plate("data", 3, subsample_size=size):
            with poutine.scale(scale=scale):
                pyro.sample(f"z{i}", dist.Normal(loc[i], width))

    def exact(num_particles):
        nodes, weights = grid(1)
        total = 0.0
        for i in range(3):
            m, s = pyro.param("loc")[i], pyro.param("width")
            z = m + s * nodes[:, 0]
            log_w = log_normal(z, 0.0, 1.0) + log_normal(x[i], z, 0.7)
            total += iwae_loss(log_w - scale * log_normal(z, m, s), weights, num_particles)
        return total

    return Case(model, guide), exact


@pytest.mark.parametrize(
    "size, scale, vectorize",
    [(None, 1.0, False), (None, 1.6, True), (2, 1.0, False), (2, 1.6, True), (1, 0.6, True)],
)
def test_items_of_a_sequential_plate_have_weights(size, scale, vectorize):
    case, exact = in_sequence(size, scale)
    copies = pyro.plate("copies", 200, dim=-1)
    model, guide = copies(case.model), copies(case.guide)
    elbo = DReG_ELBO(4, 2 if vectorize else math.inf, vectorize_particles=vectorize)
    losses, rows = [], []
    for _ in range(30 if size is None else 150):
        losses.append(elbo.loss_and_grads(model, guide) / 200)
        leaves = case.parameters()
        rows.append({name: p.grad / 200 for name, p in leaves.items()})
        for p in leaves.values():
            p.grad = None
    bound = exact(4)
    assert_unbiased(torch.tensor(losses), bound.detach(), detect=0.2)
    expected = dict(zip(leaves, torch.autograd.grad(bound, list(leaves.values()))))
    samples = {name: torch.stack([row[name] for row in rows]) for name in leaves}
    assert_unbiased(samples, expected, detect=0.5)


def test_sequential_plate_is_as_a_vectorized_one():
    """With the same noise, also for a plate that is made once and run through again and again."""
    noise, x = torch.randn(3, 4), torch.tensor([0.5, -1.2, 2.0, 0.3])

    class Fixed(dist.Normal):
        column = 0

        def rsample(self, sample_shape=torch.Size()):
            eps = noise[:, Fixed.column % 4] if sequential else noise
            Fixed.column += 1
            return self.loc + self.scale * eps

    def make(plate):
        def model():
            for i in range(1) if not sequential else plate():
                with plate() if not sequential else poutine.scale(scale=1.0):
                    name, data = (f"_{i}", x[i]) if sequential else ("", x)
                    z = pyro.sample(f"z{name}", dist.Normal(torch.zeros(()), 1.0))
                    pyro.sample(f"x{name}", dist.Normal(z, 0.7), obs=data)

        def guide():
            loc = real("loc", 0.3, -0.5, 0.9, 0.1)
            for i in range(1) if not sequential else plate():
                with plate() if not sequential else poutine.scale(scale=1.0):
                    name, m = (f"_{i}", loc[i]) if sequential else ("", loc)
                    pyro.sample(f"z{name}", Fixed(m, 0.8))

        return Case(model, guide)

    results = []
    for sequential in (False, True, True):
        made = pyro.plate("data", 4)
        reused = len(results) == 2
        case = make(lambda: made if reused else pyro.plate("data", 4))
        for entrance in ENTRANCES:
            Fixed.column = 0
            elbo = DReG_ELBO(3, 1 - sequential, vectorize_particles=True)
            results.append(evaluate(elbo, case, entrance))
    for result in results[1:]:
        assert_same(result, results[0])


def test_site_outside_of_a_sequential_plate():
    """One weight, as with RenyiELBO, and scales of the subsampling within it."""

    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        for i in pyro.plate("data", 4, subsample=torch.tensor([0, 2])):
            z = pyro.sample(f"z{i}", dist.Normal(u, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 0.7), obs=torch.tensor(CONJ_X)[i])

    def guide():
        u = pyro.sample("u", dist.Normal(real("u_loc", 0.3), 0.5))
        for i in pyro.plate("data", 4, subsample=torch.tensor([0, 2])):
            pyro.sample(f"z{i}", dist.Normal(real("loc", 0.2) + 0.5 * u, positive("width", 0.6)))

    case = Case(model, guide)
    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 0}):
        expected = evaluate(RenyiELBO(num_particles=3, **options), case, seed=0)
        plain = DReG_ELBO(3, control_variate_scale=0.0, **options)
        assert_same(evaluate(plain, case, seed=0), expected)
        assert evaluate(DReG_ELBO(3, **options), case, seed=0)[0] == pytest.approx(expected[0])


# -- Weights of zero -----------------------------------------------------------


def uniform_likelihood():
    """Draws beyond 0.5 of the observation have no weight."""

    def model():
        z = pyro.sample("z", dist.Normal(real("prior", 0.1), 1.0))
        pyro.sample("x", dist.Uniform(z - 0.5, z + positive("end", 0.5)), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Normal(real("loc", 0.0), positive("scale", 1.0)))

    return model, guide


def restricted():
    """By a factor, in one of the items of a plate."""

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=torch.tensor(CONJ_X))
            pyro.factor("positive", torch.where(z > -1.5, 0.0, -math.inf))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(real("loc", *CONJ_X), positive("scale", 0.8)))

    return model, guide


def overflow():
    """The rate at a draw is infinite, and so is its derivative."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 400.0))
        y = pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("none", -(z + y).exp())  # a Poisson's log density of zero

    def guide():
        z = pyro.sample("z", dist.Normal(real("loc", 0.0), 400.0))
        pyro.sample("y", dist.Normal(real("slope", 0.1) * z, 1.0))

    return model, guide


ZEROS = {f.__name__: f for f in (uniform_likelihood, restricted, overflow)}


@pytest.mark.parametrize("c", [1.0, 0.4, "adaptive"])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", ZEROS)
def test_particle_without_weight(name, vectorize, c):
    with pyro.validation_enabled(False):
        case = Case(*ZEROS[name]())
        particles = {"num_particles": 8, "vectorize_particles": vectorize, "max_plate_nesting": 1}
        first, second = (DReG_ELBO(**particles, control_variate_scale=c) for _ in range(2))
        for seed in range(5):
            loss, gradient = evaluate(first, case, "loss_and_grads", seed)
            assert math.isfinite(loss)
            assert all(g.isfinite().all() for g in gradient.values())
            actual = evaluate(second, case, "differentiable_loss", seed)
            assert_same(actual, (loss, gradient), rtol=1e-7, atol=1e-8)
        pyro.set_rng_seed(seed)
        assert loss == pytest.approx(RenyiELBO(**particles).loss(case.model, case.guide))


def test_particle_without_weight_is_as_none():
    """The gradient is that of the others, but for the number of particles in the mean."""
    noise = torch.tensor([0.2, 5.0, 0.6])
    case, results = Case(*uniform_likelihood()), []

    class Fixed(dist.Normal):
        def rsample(self, sample_shape=torch.Size()):
            return self.loc + self.scale * (noise if len(results) == 0 else noise[::2])

    def guide():
        pyro.sample("z", Fixed(real("loc", 0.0), positive("scale", 1.0)))

    case.guide = guide
    with pyro.validation_enabled(False):
        for num_particles in (3, 2):
            elbo = DReG_ELBO(num_particles, 0, vectorize_particles=True)
            results.append(evaluate(elbo, case))
    assert results[0][0] == pytest.approx(results[1][0] + math.log(3 / 2))
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("vectorize", [False, True])
def test_all_particles_without_weight(vectorize, entrance):
    """At one item of a plate: a warning, and the gradient of the others."""
    case = Case(*restricted())
    pyro.param("loc").unconstrained().data[1] = -9.0
    elbo = DReG_ELBO(4, 1, vectorize_particles=vectorize)
    with pytest.warns(UserWarning, match="all particles have weight zero.*support of the guide"):
        loss, gradient = evaluate(elbo, case, entrance, seed=0)
    assert loss == math.inf
    assert gradient["loc"][1] == 0.0 and (gradient["loc"] != 0.0).sum() == 3
    assert gradient["scale"].isfinite()
    assert elbo.loss(case.model, case.guide) == math.inf  # as RenyiELBO


def test_training_survives_a_step_without_weights():
    case = Case(*uniform_likelihood())
    svi = SVI(case.model, case.guide, pyro.optim.SGD({"lr": 0.1}), DReG_ELBO(2))
    pyro.param("loc").unconstrained().data.fill_(9.0)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="loss .* is infinite"):
        assert svi.step() == math.inf
    assert pyro.param("loc") == 9.0
