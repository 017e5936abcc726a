# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0


import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_rb import STLTrace_ELBO, check_unbiased
from pyro_rb.diagnostics import BiasError, LowPowerError
from tests.diagnostics.stats.test_mean_test import one_sample_test
from tests.support.models import conj, discrete_first, two

pytestmark = pytest.mark.slow


class Shifted(Trace_ELBO):
    """Trace_ELBO, with a bias in one coordinate of one parameter."""

    def __init__(self, name, index, by):
        super().__init__()
        self.at = name, index, by

    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        name, index, by = self.at
        pyro.param(name).unconstrained().grad[index] += by
        return loss


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.double)


def check(loss, case, **options):
    return check_unbiased(loss, case.model, case.guide, args=case.args, **options)


@pytest.mark.parametrize("method", ["paired", "independent"])
def test_unbiased_passes(method):
    result = check(STLTrace_ELBO(), conj(), num_samples=150, method=method)
    assert result.method == method and result.num_samples == 150
    assert result.parameters == {"loc": [4], "scale": [4]}
    assert 0 < result.max_abs_z < result.threshold < 6
    assert result.at.startswith(("loc[", "scale["))
    assert 0 < result.detectable_bias and 0 < result.detectable_share < 2
    assert not result.heavy_tailed
    assert str(result).startswith("no bias seen in 8 parameter values, 150 " + method)


def test_pairs_see_smaller_biases():
    sizes = [
        check("STLTrace_ELBO:0.1", conj(), num_samples=60, method=method).detectable_bias
        for method in ("paired", "independent")
    ]
    assert sizes[0] < 0.3 * sizes[1]


def test_bias_is_named():
    with pytest.raises(BiasError, match=r"biased in loc\[2\]: z = [\d.]+ \(threshold [\d.]+\), difference 0.1 .*"
                       r"% of the gradient's norm, N = 80. A bias of .* would have been seen anywhere"):
        check(Shifted("loc", 2, 0.1), conj(), num_samples=80)
    with pytest.raises(AssertionError, match=r"biased in scale\[0\]: z = -"):
        check(Shifted("scale", 0, -5.0), conj(), num_samples=150, method="independent")


def test_exact_gradient_as_a_dict():
    case = conj()
    exact = case.exact_gradient()
    assert check("Trace_ELBO", case, reference=exact, num_samples=100).method == "exact"
    exact["loc"][1] += 5.0
    with pytest.raises(BiasError, match=r"biased in loc\[1\]"):
        check("Trace_ELBO", case, reference=exact, num_samples=100)


def test_reference_that_is_not_exact():
    with pytest.raises(ValueError, match="reference's gradient of 'loc' is random: two draws differ by .* enumerate"):
        check("Trace_ELBO", conj(), method="exact")


def test_projections_by_default_on_discrete_sites_only():
    assert check("Trace_ELBO", discrete_first(), num_samples=5).projections == 20
    assert check("Trace_ELBO", two(), num_samples=5).projections == 0
    assert check("Trace_ELBO", two(), num_samples=5, projections=3).at.startswith("projections[")


def bernoulli_model():
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(3 * k, 1.0), obs=torch.tensor(2.0))


def bernoulli_guide():
    pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)))


def test_enumeration_as_reference():
    exact = TraceEnum_ELBO(max_plate_nesting=0)
    guide = config_enumerate(bernoulli_guide)

    class Enumerated(TraceEnum_ELBO):
        """Enumerates whatever guide it is given."""

        def loss_and_grads(self, model, guide, *args, **kwargs):
            return super().loss_and_grads(model, config_enumerate(guide), *args, **kwargs)

    check_unbiased(exact, bernoulli_model, guide, exact, method="exact", num_samples=2)
    result = check_unbiased(
        "Trace_ELBO", bernoulli_model, bernoulli_guide, Enumerated(max_plate_nesting=0),
        method="exact", num_samples=150,
    )
    assert result.projections == 20 and "20 random projections of 1 parameter value, " in str(result)


def concentrated(num_values=300):
    """
    A guide of which most values are never drawn in 2,000 draws: each of them in 5 percent of the runs, but one or
    another 17 times in each, so that projections are near normal.
    """
    logits = torch.full((num_values,), -7.0)
    logits[0], logits[1] = 3.0, 2.5
    reward = torch.linspace(-1, 1, num_values)

    def model():
        k = pyro.sample("k", dist.Categorical(logits=torch.zeros(num_values)))
        pyro.sample("x", dist.Normal(reward[k], 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("k", dist.Categorical(logits=pyro.param("logits", logits.clone())))

    return model, guide


def exact_concentrated(model, guide):
    guide()
    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, config_enumerate(guide))
    return {"logits": torch.autograd.grad(loss, pyro.param("logits"))[0]}


def test_projections_where_values_are_never_drawn():
    model, guide = concentrated()
    exact = exact_concentrated(model, guide)
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=0)
    result = check_unbiased(loss, model, guide, exact, num_samples=200)
    assert result.projections == 20 and result.at.startswith("projections[")
    with pytest.raises(BiasError):  # though nothing is wrong: the reason for projections
        check_unbiased(loss, model, guide, exact, num_samples=200, projections=0)
    exact["logits"][1] += 0.5
    with pytest.raises(BiasError, match=r"biased in projections\[\d+\].*differ most in logits\[1\], by -0.[3-7]"):
        check_unbiased(loss, model, guide, exact, num_samples=200)


def test_detect():
    assert check("STLTrace_ELBO", conj(), num_samples=200, detect=2.0)
    with pytest.raises(LowPowerError, match="too little power in .* raise N from 50 to about"):
        check("STLTrace_ELBO", conj(), num_samples=50, detect=0.01)


def test_burn_in_and_copies():
    loss = STLTrace_ELBO()
    case = conj()
    check(loss, case, num_samples=20, num_burn_in=5)
    with pytest.raises(RuntimeError, match="there was none"):
        loss.report()
    before = dict(pyro.get_param_store().named_parameters())
    assert all(p.grad is None for p in before.values())


def test_seed_decides():
    results = [check("STLTrace_ELBO", conj(), num_samples=20, seed=seed) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_symmetric_heavy_tails_do_not_fail_and_are_told():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        noise = pyro.sample("noise", dist.StudentT(1.1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + noise))

    result = check_unbiased(Trace_ELBO(), model, guide, {"loc": torch.tensor(0.0)}, num_samples=200)
    assert result.heavy_tailed
    assert "the largest 1% of the draws make up" in str(result)


def test_skewness_fails_about_as_rarely_as_promised():
    # Without the correction log-normal draws fail three times as often as they should.
    scale = torch.tensor(0.8)
    draws = (scale * torch.randn(50, 4000)).exp()
    test = one_sample_test(draws, (scale**2 / 2).exp().expand(4000))
    threshold = test.threshold(0.01, num_tests=1)
    plain = (test.difference / test.standard_error).abs() > threshold
    assert plain.double().mean() > 0.024
    assert (test.z.abs() > threshold).double().mean() < 0.019


def test_skewed_tests_keep_their_promise_of_power():
    # A bias of the size that is said to be detectable is found in 95 of 100 cases.
    draws = torch.distributions.Exponential(torch.tensor(1.0)).sample((200, 2000)) - 1.0
    test = one_sample_test(draws, torch.zeros(2000))
    threshold = test.threshold(1e-3, num_tests=1)
    for sign in (-1, 1):
        moved = draws + sign * test.detectable_bias(threshold)
        found = one_sample_test(moved, torch.zeros(2000)).z.abs() > threshold
        assert found.double().mean() > 0.93


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 1}, "expected num_samples >= 2 and num_burn_in >= 0, got num_samples=1"),
        ({"projections": -1}, "projections: expected an integer >= 0 or None, got -1"),
        ({"method": "sloppy"}, r"method: expected one of \('paired', 'independent', 'exact'\), got 'sloppy'"),
        ({"reference": {}, "method": "paired"}, "method: 'paired' needs a loss as reference"),
        ({"reference": {"loc": 0.0}}, r"reference has gradients of \['loc'\], but .* \['loc', 'scale'\]"),
        ({"reference": {"loc": torch.zeros(2), "scale": torch.zeros(4)}},
         r"reference\['loc'\] has shape \(2,\), but the parameter has shape \(4,\)"),
        ({"reference": "Trace_EBLO"}, "no loss 'Trace_EBLO': did you mean Trace_ELBO?"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        check("Trace_ELBO", conj(), **options)


def test_not_a_loss():
    with pytest.raises(TypeError, match="loss: expected the name of a loss or an instance of pyro.infer.ELBO, got 3"):
        check(3, conj())


def test_gradient_that_is_not_finite():
    with pytest.raises(ValueError, match="Shifted: the gradient of 'loc' is not finite in draw 0"):
        check(Shifted("loc", 0, math.nan), conj(), num_samples=2)


def test_reference_where_the_model_enumerates():
    @pyro.infer.config_enumerate
    def mixture():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(loc + k, 0.5), obs=torch.tensor([0.0, 1.0, 0.3]))

    def one():
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.5))

    check_unbiased("RaoBlackwell_ELBO", mixture, one, num_samples=100)


def test_loss_that_cannot_be_copied():
    loss = Trace_ELBO()
    loss.lock = threading.Lock()
    with pytest.raises(TypeError, match="loss: Trace_ELBO cannot be copied, by copy.deepcopy.*lock"):
        check_unbiased(loss, two().model, two().guide)
