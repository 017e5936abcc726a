# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Right, or a clear error."""

import math
import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated, planar, sylvester
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, autoguide
from pyro.optim import Adam

from pyro_rb import RejectionSamplingError, RVRSGuide
from tests.infer.rvrs.models import GRID, Local, bound, curve, one_guide, one_model
from tests.support.cases import positive, real


def normal_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def normal_guide():
    pyro.sample("z", dist.Normal(real("m", 0.2), positive("s", 0.9)))


# -- Arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 1}, "Invalid num_samples: 1. Expected an int >= 2"),
        ({"num_samples": 2.0}, "Invalid num_samples: 2.0"),
        ({"max_steps": 0}, "Invalid max_steps: 0. Expected an int >= 1"),
        ({"epsilon": 0.0}, "Invalid epsilon: 0.0. Expected a float between 0 and 1"),
        ({"epsilon": 1}, "Invalid epsilon: 1"),
        ({"epsilon": 0.4}, "Invalid Z_target: 0.33. Expected a float between epsilon=0.4"),
        ({"Z_target": 1.0}, "Invalid Z_target: 1.0"),
        ({"adaptation": "dual"}, "Invalid adaptation: 'dual'. Expected one of"),
        ({"T": math.nan}, "Invalid T: nan. Expected a finite float"),
        ({"T_lr": 0.0}, "Invalid T_lr: 0.0. Expected a positive float"),
        ({"local_plate": 3}, "Invalid local_plate: 3"),
        ({"local_size": 3}, "local_size=3 without local_plate"),
        ({"local_plate": "n", "local_size": 0}, "Invalid local_size: 0"),
        ({"local_plate": "n", "T": 0.0}, "T=0.0 with local_plate='n' and no local_size"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RVRSGuide(normal_model, normal_guide, **options)


def test_counts_of_draws():
    guide = RVRSGuide(normal_model, normal_guide)
    with pytest.raises(ValueError, match="Invalid num_samples: 0. Expected an int >= 1"):
        guide.sample_posterior(0)
    with pytest.raises(ValueError, match="Invalid num_samples: 1. Expected an int >= 2"):
        guide.elbo(1)
    case = Local(has_global=True)
    guide = RVRSGuide(case.model, case.guide, local_plate="items")
    with pytest.raises(ValueError, match="Invalid num_samples: 7. Expected an int >= 8"):
        guide.elbo(7)


# -- Guides that cannot be used ----------------------------------------------------


def refuse(guide, message, error=NotImplementedError, model=normal_model, **options):
    guide = RVRSGuide(model, guide, **options)
    names = set(pyro.get_param_store())
    values = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    with pytest.raises(error, match=message):
        guide()
    for name in names:
        assert torch.equal(pyro.param(name), values[name])
    assert not pyro.poutine.runtime.am_i_wrapped()


def test_missing_site():
    refuse(lambda: None, "The model samples 'z', which the guide does not", ValueError)


def test_surplus_site():
    def guide():
        normal_guide()
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match=r"sites \['extra'\] in the guide but not in the model"):
        RVRSGuide(normal_model, guide)()


def test_point_estimates():
    refuse(autoguide.AutoDelta(normal_model), "'z' has the same value in two draws")

    def constant():
        pyro.sample("z", dist.Delta(torch.tensor(0.3)))

    refuse(constant, "'z' has the same value in two draws")


def test_learned_delta():
    """The path gradient would miss what goes through the parameters."""

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        m, s = real("m", 0.2), positive("s", 0.9)
        pyro.sample("z", dist.Delta(m + s * u, log_density=-s.log()))

    refuse(guide, "'z' of type Delta is computed from parameters")


@pytest.mark.parametrize("start", [torch.tensor(0.0), torch.tensor([0.2, -0.1])])
def test_delta_of_any_parameter(start):
    """Also of one that is zero now, or has several elements."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros_like(start), 1.0).to_event(start.dim()))

    def guide():
        normal = dist.Normal(torch.zeros_like(start), 1.0).to_event(start.dim())
        u = pyro.sample("u", normal, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u + pyro.param("m", start), event_dim=start.dim()))

    refuse(guide, "'z' of type Delta is computed from parameters", model=model)


@pytest.mark.parametrize("wrap", [lambda guide: guide, lambda guide: lambda: guide()])
def test_rvrs_guide_as_proposal(wrap):
    guide = wrap(RVRSGuide(normal_model, normal_guide))
    refuse(guide, "'z' is drawn by RVRSGuide.*its attribute 'guide'")


def test_learned_factor_in_the_guide():
    def guide():
        normal_guide()
        pyro.factor("f", real("c", 0.3).exp(), has_rsample=True)

    refuse(guide, "'f' of type Unit is computed from parameters")


def test_discrete():
    def model():
        normal_model()
        pyro.sample("k", dist.Bernoulli(0.5))

    def guide():
        normal_guide()
        pyro.sample("k", dist.Bernoulli(0.5))

    refuse(guide, "'k', made of Bernoulli, has no path gradient: not rep", model=model)


def test_moving_support():
    def guide():
        pyro.sample("z", dist.Uniform(-1.0, positive("b", 2.0)))

    refuse(guide, "'z', made of Uniform, has no path gradient: its support depends")


def test_flow_without_known_score():
    guide = autoguide.AutoNormalizingFlow(normal_model, partial(iterated, 2, sylvester))
    refuse(guide, "made of Normal, Sylvester, Sylvester, has no path gradient: its log_abs_det_jacobian")


def test_flow_without_inverse_outside_of_the_local_plate():
    flow = planar(2)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [flow]))
        with pyro.plate("items", 3):
            pyro.sample("y", dist.Normal(positive("s", 1.0), 1.0))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("items", 3):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    refuse(guide, "no path gradient: it has no inverse, and is outside of plate", model=model, local_plate="items")


def test_guide_messenger():
    guide = autoguide.AutoNormalMessenger(normal_model)
    refuse(guide, "GuideMessenger, AutoNormalMessenger")


def test_scaled_guide():
    refuse(poutine.scale(normal_guide, 0.5), "'z' is scaled by 0.5. Expected a guide without")


def test_guide_that_cannot_be_vectorized():
    def guide():
        z = pyro.sample("z", dist.Normal(real("m", 0.2), 1.0))
        pyro.sample("u", dist.Normal(z.item(), 1.0), infer={"is_auxiliary": True})

    refuse(guide, "The guide runs once, but not for 2 proposals", RuntimeError)

    def mixed():
        z = pyro.sample("z", dist.Normal(real("m", 0.2), 1.0))
        pyro.sample("u", dist.Normal(z.sum(), 1.0), infer={"is_auxiliary": True})

    refuse(mixed, "the log density of the guide for two proposals at a time")


@pytest.mark.filterwarnings("ignore")  # of the JIT
def test_jit():
    svi = SVI(normal_model, RVRSGuide(normal_model, normal_guide), Adam({}), JitTrace_ELBO())
    with pytest.raises(NotImplementedError, match="inside of torch.jit.trace"):
        svi.step()


def test_plates_around():
    guide = RVRSGuide(normal_model, normal_guide)
    with pyro.plate("a", 2, dim=-1), pyro.plate("b", 2, dim=-2):
        with pytest.raises(NotImplementedError, match="inside of the plates"):
            guide()
    case = Local()
    guide = RVRSGuide(case.model, case.guide, local_plate="items")
    with pyro.plate("particles", 2, dim=-3):
        with pytest.raises(NotImplementedError, match="was called inside of plate 'particles'"):
            guide()


# -- Local plates ------------------------------------------------------------------


def test_subsampling_needs_local_plate():
    case = Local(subsample_size=2)
    message = "'items' at site .* subsamples 2 of 4.*set local_plate='items'"
    refuse(case.guide, message, model=case.model)


def test_local_plate_that_is_not_there():
    message = r"Invalid local_plate: 'item'.*one of \['items'\]"
    case = Local()
    refuse(case.guide, message, ValueError, case.model, local_plate="item")


def test_local_plate_of_another_size():
    case = Local()
    message = "local_size=5, and plate 'items' of size 4"
    refuse(case.guide, message, ValueError, case.model, local_plate="items", local_size=5)


def test_local_plate_that_is_a_loop():
    def model():
        for i in pyro.plate("items", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    def loop():
        for i in pyro.plate("items", 2):
            pyro.sample(f"z_{i}", dist.Normal(real("m", 0.1), 1.0))

    refuse(loop, "local_plate 'items' is a loop", model=model, local_plate="items")
    RVRSGuide(model, loop)()  # accepted or rejected together


def test_local_site_drawn_outside_of_the_plate():
    case = Local()
    guide = autoguide.AutoDiagonalNormal(case.model)
    refuse(guide, "'z' has the same value in two draws", model=case.model, local_plate="items")


def test_outside_depends_on_inside():
    """Other items' acceptance would have to know."""

    def model():
        with pyro.plate("items", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        with pyro.plate("items", 4):
            pyro.sample("z", dist.Normal(real("m", 0.1), 1.0))

    message = "Site 'x' is outside of plate 'items', and depends on latents inside"
    refuse(guide, message, model=model, local_plate="items")


# -- Models -----------------------------------------------------------------------


def quadrature(log_likelihood, epsilon, T):
    """ELBO and draws of a model with prior N(0, 1), and q = N(m, s)."""
    z = GRID
    lq = dist.Normal(pyro.param("m"), pyro.param("s")).log_prob(z)
    lp = dist.Normal(0.0, 1.0).log_prob(z) + log_likelihood(z)
    return bound(lp - lq, lq + (z[1] - z[0]).log(), T, epsilon)


def test_model_that_cannot_be_vectorized():
    torch.set_default_dtype(torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = curve(z) if z.item() > 0 else z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    guide = RVRSGuide(model, normal_guide, T=1.0, adaptation="fixed")
    with pytest.warns(UserWarning, match="evaluated for one proposal at a time"):
        value, error = guide.elbo(2000)
    exact = quadrature(
        lambda z: dist.Normal(torch.where(z > 0, curve(z), z), 1.0).log_prob(torch.tensor(1.0)), 0.01, 1.0
    )
    assert value == pytest.approx(exact.item(), abs=5 * error)
    loss = Trace_ELBO().differentiable_loss(model, guide)
    assert all(torch.autograd.grad(loss, guide_parameters()))


def guide_parameters():
    return [p for _, p in pyro.get_param_store().named_parameters()]


def test_model_that_mixes_proposals():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.sum() ** 2)

    with pytest.warns(UserWarning, match="the log density of the model for two proposals"):
        RVRSGuide(model, normal_guide)()


def test_matrix_product_without_batch():
    """Common code, right for one draw and of too high a rank for several."""
    X = torch.randn(6, 3)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", 6):
            pyro.sample("y", dist.Bernoulli(logits=w @ X.T), obs=torch.ones(6))

    with pytest.warns(UserWarning, match="Put each batch dim of the site in a pyro.plate"):
        loss = Trace_ELBO().differentiable_loss(model, RVRSGuide(model))
    assert loss.isfinite()


def test_random_model():
    def model():
        normal_model()
        pyro.factor("f", torch.rand(()))

    refuse(normal_guide, "differs between two runs at the same values", model=model)


def test_dropout_in_the_guide():
    layer = torch.nn.Dropout(0.5)

    def guide():
        # Of so many that no two masks are the same.
        pyro.sample("z", dist.Normal(layer(real("m", *[0.02] * 30)).sum(), 1.0))

    RVRSGuide(normal_model, guide)()


def test_scale_around_both():
    torch.set_default_dtype(torch.float64)
    guide = RVRSGuide(one_model, one_guide, T=1.0, adaptation="fixed")
    guide()
    elbo = Trace_ELBO()
    for scale in (1.0, 0.5):
        pyro.set_rng_seed(0)
        loss = elbo.loss(poutine.scale(one_model, scale), poutine.scale(guide, scale))
        assert loss == pytest.approx(scale * (expected := loss / scale))
    pyro.set_rng_seed(0)
    assert expected == pytest.approx(elbo.loss(one_model, guide))


def test_scale_and_mask_inside_of_the_model():
    torch.set_default_dtype(torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.3):
            pyro.sample("x", dist.Normal(curve(z), 1.0), obs=torch.tensor(1.0))
        with poutine.mask(mask=False):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(100.0))
        pyro.factor("f", -0.1 * z**2)
        pyro.deterministic("d", 2 * z)

    guide = RVRSGuide(model, normal_guide, T=1.0, adaptation="fixed")
    value, error = guide.elbo(3000)

    def log_likelihood(z):
        return 0.3 * dist.Normal(curve(z), 1.0).log_prob(torch.tensor(1.0)) - 0.1 * z**2

    exact = quadrature(log_likelihood, 0.01, 1.0).item()
    assert value == pytest.approx(exact, abs=5 * error)
    losses = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(400)])
    assert -losses.mean().item() == pytest.approx(exact, abs=5 * losses.std().item() / 20)


def test_changing_data():
    """More items, and then another plate."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", x.shape[-1]):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if x.dim() == 1 else x[0])
            if x.dim() == 2:
                with pyro.plate("rows", len(x)):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        normal_guide()

    rvrs = RVRSGuide(model, guide)
    svi = SVI(model, rvrs, Adam({}), Trace_ELBO())
    for x in (torch.ones(3), torch.ones(5), torch.ones(2, 4), torch.ones(3)):
        assert math.isfinite(svi.step(x))


def test_model_changed_in_place():
    def guide():
        z = pyro.sample("z", dist.Normal(real("m", 0.2), 1.0))
        z.add_(1.0)

    with pytest.raises(RuntimeError, match="'z' was changed in place"):
        RVRSGuide(normal_model, guide, T=3.0)()


# -- Where the density is zero --------------------------------------------------------


def edge_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(z > 0, 2 * z - 0.1 * z.clamp(min=0).sqrt(), -math.inf))


def edge_guide():
    pyro.sample("z", dist.Normal(real("m", 0.6), positive("s", 1.1)))


def test_zero_density():
    guide = RVRSGuide(edge_model, edge_guide, T=0.0, adaptation="fixed", num_samples=20)
    with pytest.warns(UserWarning, match="proposals had a log density that is -inf"):
        for _ in range(10):
            loss = Trace_ELBO().differentiable_loss(edge_model, guide)
    assert loss.isfinite() and (guide.sample_posterior(500)["z"] > 0).all()
    assert all(g.isfinite() for g in torch.autograd.grad(loss, guide_parameters()))
    value, error = guide.elbo(3000)
    assert math.isfinite(value) and 0 < error < 0.1


def test_nan_density():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z > -1, -z, math.nan))

    guide = RVRSGuide(model, edge_guide)
    with pyro.validation_enabled(False):  # else Pyro raises
        with pytest.warns(UserWarning, match="that is -inf, .inf or NaN; they were rejected"):
            for _ in range(30):
                guide()
        assert (guide.sample_posterior(100)["z"] > -1).all()


def test_no_density_at_all():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(-math.inf))

    refuse(edge_guide, "no finite log density among 64 proposals", RejectionSamplingError, model)
    with pytest.raises(RejectionSamplingError, match="no finite log density among 30"):
        RVRSGuide(model, edge_guide, T=0.0).elbo(30)


def test_collapse():
    guide = RVRSGuide(normal_model, normal_guide, T=-1e4, epsilon=1e-6, max_steps=700)
    message = (
        r"Accepted 0 of the 2 samples wanted, after 700 proposals \(max_steps=700\). "
        r"Mean acceptance 1e-06 at T = -1e\+04; mean log weight -\d.*not finite. Expected"
    )
    with pytest.raises(RejectionSamplingError, match=message):
        guide()


def test_collapse_of_an_item():
    case = Local()
    guide = RVRSGuide(
        case.model, case.guide, local_plate="items", local_size=4, T=0.0, epsilon=1e-6, max_steps=300
    )
    guide.T[2] = -1e4
    with pytest.raises(RejectionSamplingError, match="for item 2 of 4, the worst, after 300 proposals"):
        guide()
