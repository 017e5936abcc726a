# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Handlers around a loss: all of them see one tensor for a draw, and what they do counts."""

from contextlib import ExitStack, contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample

from pyro_rb import DReG_ELBO, STLTrace_ELBO
from tests.support.cases import positive, real
from tests.support.elbo_contract import ENTRANCES, assert_same

LOSSES = {
    "c = 1": lambda: STLTrace_ELBO(control_variate_scale=1.0),
    "adaptive": STLTrace_ELBO,
    "looped": lambda: STLTrace_ELBO(num_particles=2),
    "vectorized": lambda: STLTrace_ELBO(num_particles=3, vectorize_particles=True),
    "DReG, looped": lambda: DReG_ELBO(num_particles=2, vectorize_particles=False),
    "DReG, vectorized": lambda: DReG_ELBO(num_particles=2, vectorize_particles=True),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def model():
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, 0.7))
    pyro.sample("x", dist.Normal(z2, 0.5), obs=torch.tensor(1.3))


def guide():
    z1 = pyro.sample("z1", dist.Normal(real("m", 0.3), positive("s1", 0.8)))
    pyro.sample("z2", dist.Normal(real("b", 0.4) * z1, positive("s2", 0.6)))


class Seen(Messenger):
    """What a handler knows draws by: the tensors that each sample statement returned."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _pyro_post_sample(self, msg):
        if not (msg["is_observed"] or site_is_subsample(msg)):
            self.values.setdefault(msg["name"], []).append(msg["value"])


GUIDES = [
    lambda: guide,
    lambda: AutoNormal(model),
    lambda: AutoMultivariateNormal(model),
    lambda: AutoIAFNormal(model),
    lambda: AutoStructured(model),
    lambda: AutoNormalMessenger(model),
    lambda: AutoHierarchicalNormalMessenger(model),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("make_guide", GUIDES)
def test_handlers_see_one_tensor(name, make_guide):
    made, elbo = make_guide(), LOSSES[name]()
    elbo.loss(model, made)  # sets up the guide, and guesses the nesting of plates
    outer, inner, returned = Seen(), Seen(), []
    with outer, poutine.block(hide=["x"]), inner:
        returned = [pair for pair in elbo._get_traces(model, made, (), {})]
    assert outer.values.keys() == inner.values.keys() >= {"z1", "z2"}
    for site, values in outer.values.items():
        assert all(a is b for a, b in zip(values, inner.values[site], strict=True))
        recorded = [t.nodes[site]["value"] for pair in returned for t in pair if site in t]
        # A guide that is a messenger makes both traces from one statement.
        assert {id(value) for value in recorded} == {id(value) for value in values}
        assert len({id(value) for value in values}) == len(returned)
    assert not am_i_wrapped()


class LocalReparameterization(Messenger):
    """Knows the distribution of a weight by the tensor that was drawn first from it."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def _pyro_post_sample(self, msg):
        self.known.setdefault(id(msg["value"]), (msg["value"], msg["fn"]))

    def linear(self, x, w):
        fn = self.known[id(w)][1]
        while isinstance(fn, dist.Independent):
            fn = fn.base_dist
        loc, scale = x @ fn.mean, (x**2 @ fn.variance).sqrt()
        return loc + scale * torch.randn(loc.shape)


def test_local_reparameterization_knows_the_guide():
    """In the model it would else take the prior, and no gradient would reach the guide."""
    x = torch.linspace(-1.0, 1.0, 40)[:, None]

    def regression():
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(handler.linear(x, w), 0.1), obs=0.7 * x[:, 0])

    def mean_field():
        loc, scale = real("loc", 0.5), positive("scale", 0.05)
        w = pyro.sample("w", dist.Normal(loc, scale).expand([1]).to_event(1))
        return handler.linear(x, w)

    def step(elbo):
        nonlocal handler
        handler = LocalReparameterization()
        pyro.set_rng_seed(0)
        with handler:
            loss = elbo.differentiable_loss(regression, mean_field)
        parameters = dict(pyro.get_param_store().named_parameters()).values()
        return loss.detach(), torch.stack(torch.autograd.grad(loss, parameters))

    handler = None
    loss, gradient = step(Trace_ELBO())
    for scale in (1.0, 0.3):
        actual = step(STLTrace_ELBO(control_variate_scale=scale))
        assert_same(actual[0], loss)
        assert len(handler.known) == 3  # w, the indices of the plate, and y
        noise = (next(iter(handler.known.values()))[0].detach().squeeze() - 0.5) / 0.05
        score = torch.stack([noise / 0.05, noise**2 - 1.0])
        assert_same(actual[1], gradient - scale * score)


class Copies(Messenger):
    def _pyro_post_sample(self, msg):
        if msg["name"] == "z1":
            msg["value"] = 1.0 * msg["value"]


class Supplies(Messenger):
    """A value with a gradient, that is no draw from the guide's distribution."""

    def _pyro_sample(self, msg):
        if msg["name"] == "z1" and msg["value"] is None:
            msg["value"] = 2.0 * pyro.param("m") + torch.randn(())


class Widens(Messenger):
    def _pyro_sample(self, msg):
        if msg["name"] == "z2":
            msg["fn"] = dist.Normal(msg["fn"].mean + 0.1, 1.3 * msg["fn"].stddev)


class Stops(Messenger):
    def _pyro_sample(self, msg):
        msg["stop"] = True


def nested(*makers):
    @contextmanager
    def enter():
        with ExitStack() as stack:
            for make in makers:
                stack.enter_context(make())
            yield

    return enter


def hide_z2():
    return poutine.block(hide=["z2"])


BOTH, SECOND = {"z1", "z2"}, {"z2"}
# The sites that have a path gradient under each, and why another has not.
HANDLERS = {
    "nothing": (Messenger, BOTH, ""),
    "scale": (lambda: poutine.scale(scale=2.5), BOTH, ""),
    "mask": (lambda: poutine.mask(mask=torch.tensor(False)), BOTH, ""),
    "infer": (lambda: poutine.infer_config(config_fn=lambda site: {"mine": 1}), BOTH, ""),
    "seed": (lambda: poutine.seed(rng_seed=3), BOTH, ""),
    "another distribution": (Widens, BOTH, ""),
    "block": (poutine.block, BOTH, ""),
    "partial block": (hide_z2, BOTH, ""),
    "block inside": (nested(Seen, poutine.block), BOTH, ""),
    "two blocks": (nested(hide_z2, Seen, poutine.block), BOTH, ""),
    "copy": (Copies, SECOND, "a handler has replaced its value"),
    "copy in a block": (nested(poutine.block, Copies), SECOND, "a handler has replaced its value"),
    "supply": (Supplies, SECOND, "its value was supplied, not drawn"),
    "supply in a block": (nested(hide_z2, Supplies), SECOND, "its value was supplied, not drawn"),
    "supply around": (nested(Supplies, hide_z2), SECOND, "its value was supplied, not drawn"),
    "stop": (Stops, set(), "a handler around the loss hides it"),
}


def gradient(elbo, handler, entrance="loss_and_grads"):
    parameters = dict(pyro.get_param_store().named_parameters())
    for p in parameters.values():
        p.grad = None
    pyro.set_rng_seed(1)
    with handler():
        loss = getattr(elbo, entrance)(model, guide)
        if entrance == "differentiable_loss":
            loss.backward()
            loss = loss.item()
    return loss, {name: p.grad for name, p in parameters.items()}


def score(handler, names):
    """By a second run of the guide, the values of the sites with a path gradient held fixed."""

    def run(fixed):
        pyro.set_rng_seed(1)
        with handler(), poutine.replay(trace=fixed):
            return poutine.trace(guide).get_trace()

    fixed = run(poutine.Trace())
    for name in list(fixed.nodes):
        if name in names:
            fixed.nodes[name]["value"] = fixed.nodes[name]["value"].detach()
        else:
            fixed.remove_node(name)
    trace = run(fixed)
    trace.compute_log_prob()
    parameters = dict(pyro.get_param_store().named_parameters())
    total = sum([trace.nodes[name]["log_prob_sum"] for name in names], 0.0 * parameters["m"])
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: 0.0 if g is None else g for name, g in zip(parameters, found)}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_around_the_loss(name, entrance):
    handler, tapped, why = HANDLERS[name]
    guide()
    expected_loss, expected = gradient(Trace_ELBO(), handler, entrance)
    removed = score(handler, sorted(tapped))
    for scale in (1.0, 0.3):
        elbo = STLTrace_ELBO(control_variate_scale=scale)
        loss, actual = gradient(elbo, handler, entrance)
        assert_same(loss, expected_loss)
        for p in expected:
            assert_same(actual[p], expected[p] - scale * removed[p])
        rows = {row.site: row for row in elbo.report()}
        assert {site for site in rows if "path" in rows[site].treatment} == tapped
        assert {rows[site].reason for site in rows.keys() - tapped} <= {why}
    assert not am_i_wrapped()


def test_stack_is_left_as_it_was_after_an_error():
    def broken():
        guide()
        raise ZeroDivisionError

    for handler in (Messenger, poutine.block, Supplies):
        with pytest.raises(ZeroDivisionError), handler():
            STLTrace_ELBO().loss_and_grads(model, broken)
        assert not am_i_wrapped()
    STLTrace_ELBO().loss_and_grads(model, guide)
