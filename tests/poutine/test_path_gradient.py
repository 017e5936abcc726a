# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_rb.poutine import TapMessenger


@pytest.fixture
def loc():
    return torch.tensor([0.3, -0.2], requires_grad=True)


def run(guide, *args):
    with TapMessenger() as tap:
        trace = poutine.trace(guide).get_trace(*args)
    return tap, trace


def grad(output, *inputs):
    return torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)


def test_trace_records_the_tapped_value(loc):
    tap, trace = run(lambda: pyro.sample("z", dist.Normal(loc, 1.0).to_event(1)))
    assert trace.nodes["z"]["value"] is tap.path.values["z"]
    assert tap.reasons == {"z": "reparameterized draw"}


def test_same_draws_as_without(loc):
    def guide():
        return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    pyro.set_rng_seed(1)
    expected = guide()
    pyro.set_rng_seed(1)
    assert torch.equal(run(guide)[1].nodes["z"]["value"], expected)


def test_gate(loc):
    tap, trace = run(lambda: pyro.sample("z", dist.Normal(loc, 1.0).to_event(1)))
    total = (trace.nodes["z"]["value"] * loc.detach()).sum()
    assert torch.equal(grad(total, loc)[0], loc.detach())
    with tap.path.closed():
        assert grad(total, loc) == (None,)
    with pytest.raises(ZeroDivisionError), tap.path.closed():
        1 / 0
    assert torch.equal(grad(total, loc)[0], loc.detach())


def test_partial_derivatives_on_two_levels(loc):
    # log q = log N(z1; m, 1) + log N(z2; w z1, 1), by hand:
    # d/dz1 = -(z1 - m) + w (z2 - w z1), d/dz2 = -(z2 - w z1), draws held fixed.
    m = torch.tensor(0.4, requires_grad=True)
    w = torch.tensor(0.7, requires_grad=True)

    def guide():
        z1 = pyro.sample("z1", dist.Normal(m, 1.0))
        pyro.sample("z2", dist.Normal(w * z1, 1.0))

    tap, trace = run(guide)
    log_q = trace.log_prob_sum()
    z1, z2 = (trace.nodes[name]["value"] for name in ("z1", "z2"))
    with tap.path.closed():
        a1, a2, score_m, score_w = grad(log_q, z1, z2, m, w)
    torch.testing.assert_close(a1, -(z1 - m) + w * (z2 - w * z1))
    torch.testing.assert_close(a2, -(z2 - w * z1))
    torch.testing.assert_close(score_m, z1 - m)
    torch.testing.assert_close(score_w, z1 * (z2 - w * z1))
    # With the gate open the way through z2 is counted as well.
    assert not torch.allclose(grad(log_q, z1)[0], a1)


NOT_TAPPED = {
    "not reparameterized": lambda p: pyro.sample("z", dist.Bernoulli(p.sigmoid())),
    "depends on no parameter": lambda p: pyro.sample("z", dist.Normal(0.0, 1.0)),
    "a Delta": lambda p: pyro.sample("z", dist.Delta(p, log_density=p)),
    "a Delta ": lambda p: pyro.sample("z", dist.Delta(p).expand([2]).to_event(1)),
    "ShapeAugmentedGamma is not known": lambda p: pyro.sample(
        "z", dist.testing.rejection_gamma.ShapeAugmentedGamma(p.exp(), p.exp())
    ),
    "support depends on a parameter": lambda p: pyro.sample(
        "z", dist.Uniform(torch.zeros(()), p.exp())
    ),
    "the very tensor": lambda p: pyro.sample(
        "z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), p.sigmoid())
    ),
}


@pytest.mark.parametrize("reason", NOT_TAPPED)
def test_sites_that_are_not_tapped(reason):
    import pyro.distributions.testing.rejection_gamma  # noqa: F401

    p = torch.tensor(0.3, requires_grad=True)
    tap, trace = run(NOT_TAPPED[reason], p)
    assert tap.path.values == {}
    assert reason.strip() in tap.reasons["z"]


def test_observed_and_subsample_sites_are_passed_over(loc):
    def guide():
        with pyro.plate("plate", 2, subsample_size=1):
            pyro.sample("x", dist.Normal(loc[:1], 1.0), obs=torch.zeros(1))

    tap, _ = run(guide)
    assert tap.path.values == {} and tap.reasons == {}


def test_supplied_values_are_not_tapped(loc):
    def guide():
        return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    supplied = poutine.trace(guide).get_trace()
    tap, _ = run(poutine.replay(guide, trace=supplied))
    assert tap.path.values == {}
    assert tap.reasons == {"z": "its value was supplied, not drawn"}


def test_user_transforms_are_not_called_by_the_tap():
    class Doubled(dist.transforms.AffineTransform):
        num_calls = 0

        def _call(self, x):
            self.num_calls += 1
            return super()._call(x)

    transform = Doubled(torch.tensor(0.0, requires_grad=True), 2.0)

    def guide():
        pyro.sample("z", dist.TransformedDistribution(dist.Gamma(1.0, 1.0), [transform]))

    tap, _ = run(guide)
    assert transform.num_calls == 1
    assert tap.reasons == {"z": "the mean of its score may not be zero: Doubled of tests is not known"}


def test_edits_in_place_are_found(loc):
    tap, trace = run(lambda: pyro.sample("z", dist.Normal(loc, 1.0).to_event(1)))
    tap.path.raise_if_edited()
    trace.nodes["z"]["value"].add_(1.0)
    with pytest.raises(RuntimeError, match="guide site 'z' was changed in place"):
        tap.path.raise_if_edited()


def test_infer_dict_of_the_user_is_left_alone(loc):
    infer = {"mine": 1}
    run(lambda: pyro.sample("z", dist.Normal(loc, 1.0).to_event(1), infer=infer))
    assert infer == {"mine": 1}


def test_graphs_are_freed_without_the_garbage_collector(loc):
    import weakref

    tap, trace = run(lambda: pyro.sample("z", dist.Normal(loc, 1.0).to_event(1)))
    value = weakref.ref(trace.nodes["z"]["value"])
    gc.disable()
    try:
        del tap, trace
        assert value() is None
    finally:
        gc.enable()


def test_torch_func(loc):
    def total(p):
        with TapMessenger():
            return pyro.sample("z", dist.Normal(p, 1.0).to_event(1)).sum()

    assert torch.equal(torch.func.grad(total)(loc), torch.ones(2))
