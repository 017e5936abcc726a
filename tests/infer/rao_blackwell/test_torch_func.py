# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Losses inside of :func:`torch.func.grad`, with discrete sites: the gradient is that of ``backward``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.func import functional_call, grad, grad_and_value

from pyro_rb import RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO
from tests.infer.rao_blackwell.models import fixed, pick
from tests.support.elbo_contract import assert_same

SETTINGS = {
    "default": {},
    "budget": {"budget": 3},
    "no_baseline": {"k": 1, "baseline": None},
    "one_more_draw": {"k": 1, "baseline": "reinforce+"},
    "path": {"control_variate_scale": 1.0},
    "no_projection": {"pre_activations": None},
    "draws": {"draws": 3},
    "particles": {"draws": 1, "num_particles": 2},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def local_params():
    """Parameters of modules are those of the modules, as functional_call needs."""
    with pyro.settings.context(module_local_params=True):
        yield


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(fixed(4, seed=1))

    def forward(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(9), 1.0).to_event(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(logits=fixed(4, seed=2) * z.unsqueeze(-1)))
            b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.4)).to_event(1))
            loc = pick(self.locs, y) + z + b.sum(-1) + fixed(3, 9, seed=3) @ w
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(9))
        self.loc, self.scale = nn.Parameter(fixed(3, seed=4)), PyroParam(torch.ones(3), constraints.positive)
        self.logits, self.bits = nn.Parameter(fixed(3, 4, seed=5)), nn.Parameter(fixed(3, 2, seed=6))

    def forward(self, x):
        pyro.sample("w", dist.Normal(self.weights, 0.5).to_event(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale))
            y = pyro.sample("y", dist.Categorical(logits=self.logits + z.unsqueeze(-1)))
            pyro.sample("b", dist.Bernoulli(logits=self.bits + 0.3 * y.unsqueeze(-1)).to_event(1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_functional_call(setting, local_params):
    x = fixed(3, seed=7)
    options = {"max_plate_nesting": 1, **SETTINGS[setting]}
    # Nothing is projected there.
    losses = [RaoBlackwell_ELBO(**{**options, **o})(Model(), Guide()) for o in ({"pre_activations": None}, {})]
    parameters = {name: p.detach().clone() for name, p in losses[1].named_parameters()}
    for seed in range(3):
        losses[0].zero_grad()
        pyro.set_rng_seed(seed)
        expected = losses[0](x)
        expected.backward()
        pyro.set_rng_seed(seed)
        actual, value = grad_and_value(lambda p: functional_call(losses[1], p, (x,)))(parameters)
        assert_same(value, expected.detach())
        assert_same(actual, {name: p.grad for name, p in losses[0].named_parameters()})


def loss_of(logits, elbo, kind="plate", entrance="differentiable_loss"):
    """Of a table in a plate of three, on which a datum depends inside of it, or outside."""

    def sample(logits, infer=None):
        return pyro.sample("y", dist.Categorical(logits=logits), infer=infer)

    def model(logits):
        with pyro.plate("data", 3) as plate:
            y = sample(torch.zeros(3, 4)).double()
            if kind == "model":
                y = y + pyro.sample("m", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            if kind != "outside":
                pyro.sample("x", dist.Normal(y, 1.0), obs=torch.ones(len(plate)))
        if kind == "outside":
            with pyro.plate("one", 1):
                pyro.sample("x", dist.Normal(y.sum(-1, keepdim=True), 1.0), obs=torch.ones(1))

    def guide(logits):
        with pyro.plate("data", 3):
            sample(logits, infer.get(kind))

    infer = {
        "sequential": {"enumerate": "sequential"},
        "parallel": {"enumerate": "parallel"},
        "baseline": {"topk": 1, "baseline": {"use_decaying_avg_baseline": True}},
    }
    pyro.set_rng_seed(3)
    return getattr(elbo, entrance)(model, guide, logits)


@pytest.mark.parametrize("kind", ["plate", "outside", "sequential", "parallel"])
@pytest.mark.filterwarnings("ignore:at .* possibly invalid dependency:RuntimeWarning")
def test_function_of_a_tensor(kind):
    leaf = fixed(3, 4, seed=1).requires_grad_()
    for options in ({"budget": 2}, {"k": 4}):
        pyro.clear_param_store()
        elbo = RaoBlackwellTopK_ELBO(max_plate_nesting=1, **options)
        (expected,) = torch.autograd.grad(loss_of(leaf, elbo, kind), leaf)
        pyro.clear_param_store()
        elbo = RaoBlackwellTopK_ELBO(max_plate_nesting=1, **options)
        assert_same(grad(lambda p: loss_of(p, elbo, kind))(leaf.detach()), expected)


def test_loss_without_gradients():
    elbo, logits, seen = RaoBlackwell_ELBO(max_plate_nesting=1), fixed(3, 4, seed=1), []
    expected = loss_of(logits, elbo, entrance="loss")
    grad(lambda p: seen.append(loss_of(p, elbo, entrance="loss")) or p.sum())(logits)
    assert seen == [expected]


def test_what_is_refused():
    logits = fixed(3, 4, seed=1)
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    with pytest.raises(NotImplementedError, match=r"model that enumerates the sites \['m'\].*in the guide"):
        grad(lambda p: loss_of(p, elbo, "model"))(logits)
    with pytest.raises(NotImplementedError, match="'y', which learns parameters"):
        grad(lambda p: loss_of(p, elbo, "baseline"))(logits)
