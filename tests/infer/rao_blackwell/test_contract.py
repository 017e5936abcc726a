# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of every loss, with models of discrete and continuous sites; its state."""

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.util import get_rng_state, set_rng_state

from pyro_rb import RaoBlackwell_ELBO
from tests.infer.rao_blackwell.models import PROBLEMS, fixed
from tests.infer.rao_blackwell.structures import STRUCTURES
from tests.support.cases import Case, positive, real
from tests.support.common import assert_variance_ratio
from tests.support.elbo_contract import (
    ENTRANCES,
    ELBOContract,
    assert_same,
    evaluate,
)
from tests.support.models import conj

pytestmark = pytest.mark.slow

MIXED = {**PROBLEMS, **STRUCTURES}


class TestRaoBlackwellContract(ELBOContract):
    # Others are in the contracts of the presets, and in test_unbiased.py, where they take less time.
    cases = ("gamma_score_function", "pyro_module")

    def make_elbo(self, **kwargs: Any) -> RaoBlackwell_ELBO:
        # Trace_ELBO spends no draws on a guess, so that none may be spent here.
        kwargs.setdefault("max_plate_nesting", 1)
        return RaoBlackwell_ELBO(**kwargs)

    def test_plate_nesting_is_guessed(self, dtype):
        case, losses = conj(), []
        for elbo in (RaoBlackwell_ELBO, TraceEnum_ELBO):
            elbo = elbo(num_particles=3, vectorize_particles=True, strict_enumeration_warning=False)
            losses.append(evaluate(elbo, case, seed=0)[0])
            assert elbo.max_plate_nesting == 2
        assert_same(*map(torch.tensor, losses))

    @pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
    def test_more_particles_have_less_variance(self, dtype, vectorize):
        problem = replace(PROBLEMS["regression"], num=500)
        options = {"num_particles": 5, "vectorize_particles": vectorize}
        many, one = (problem.draw(self.make_elbo(max_plate_nesting=2, **o)) for o in (options, {}))
        assert_variance_ratio(many, one, below=0.5)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- The contract, where discrete and continuous sites depend on each other ------------------


@pytest.mark.parametrize("particles", [{}, {"num_particles": 2}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("name", MIXED)
def test_entrances_agree(name, particles):
    case = MIXED[name].make(2)
    options = {"max_plate_nesting": MIXED[name].nesting, **particles}
    first, second = RaoBlackwell_ELBO(**options), RaoBlackwell_ELBO(**options)
    for seed in range(5):
        expected, actual = (evaluate(e, case, entrance, seed) for e, entrance in zip((first, second), ENTRANCES))
        assert_same(actual, expected)


def test_loss_is_the_same_without_gradients():
    case = PROBLEMS["chain"].make(2)
    elbo, values = RaoBlackwell_ELBO(max_plate_nesting=2), []
    for call in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(0)
        values.append(torch.as_tensor(call(case.model, case.guide, *case.args)).detach())
    assert_same(values[1:], values[:1] * 2)


def test_positional_arguments_are_pyros():
    arguments = (4, 2, None, True, False, True, {"check_trace": False}, True, -0.5)
    elbo, reference = RaoBlackwell_ELBO(*arguments), Trace_ELBO(*arguments)
    for name, value in vars(reference).items():
        assert getattr(elbo, name) == value
    with pytest.raises(TypeError, match="positional"):
        RaoBlackwell_ELBO(*arguments, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": -1}, "Invalid k"),
        ({"k": True}, "Invalid k"),
        ({"num_samples": 0}, "Invalid num_samples"),
        ({"budget": 0}, "Invalid budget"),
        ({"k": 1, "budget": 4}, "budget=4 together with k=1"),
        ({"budget": 3, "k": 1}, "budget=3 together with k=1"),
        ({"sum_up_to": -1}, "Invalid sum_up_to"),
        ({"sum_up_to": True}, "Invalid sum_up_to"),
        ({"baseline": "average"}, "Invalid baseline"),
        ({"draws": 0}, "Invalid draws"),
        ({"draws": 1.5}, "Invalid draws"),
        ({"control_variate_scale": "often"}, "Invalid control_variate_scale"),
        ({"control_variate_scale": float("nan")}, "Invalid control_variate_scale"),
        ({"pre_activations": "global"}, "Invalid pre_activations"),
        ({"solver": "lu"}, "Invalid solver"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        RaoBlackwell_ELBO(**options)


@pytest.mark.parametrize(
    "infer, message",
    [
        ({"draws": 0}, "draws.*'b'"),
        ({"topk": -1}, "k at guide site 'b'"),
        ({"rao_blackwell": "no"}, "rao_blackwell.*'b'"),
    ],
)
def test_invalid_options_of_a_site(infer, message):
    def guide():
        pyro.sample("b", dist.Bernoulli(logits=real("on", 0.2)), infer=infer)

    with pytest.raises(ValueError, match=message):
        RaoBlackwell_ELBO().loss_and_grads(lambda: pyro.sample("b", dist.Bernoulli(0.5)), guide)


# -- torch.func ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mixed", [False], ids=["continuous"])  # Dice does not work inside of torch.func
@pytest.mark.parametrize("options", [{}, {"control_variate_scale": 1.0}, {"control_variate_scale": 0.4, "k": 1}])
def test_torch_func(options, is_mixed):
    def loss(parameters):
        loc, logits = parameters

        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(torch.ones(6))) if is_mixed else 0.0
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=torch.tensor(1.0))

        def guide():
            z = pyro.sample("z", dist.Normal(loc + logits[0], 1.5))
            if is_mixed:
                pyro.sample("y", dist.Categorical(logits=logits * (1 + z)))

        pyro.set_rng_seed(3)
        return RaoBlackwell_ELBO(max_plate_nesting=0, **options).differentiable_loss(model, guide)

    parameters = (torch.tensor(0.3), fixed(6))
    leaves = [p.clone().requires_grad_() for p in parameters]
    expected = torch.autograd.grad(loss(leaves), leaves)
    assert_same(torch.func.grad(loss)(parameters), expected)


# -- State -----------------------------------------------------------------------------------

NESTING = {"max_plate_nesting": 1}  # so that a new object spends no draws on a guess


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(5)))
        pyro.sample("x", dist.Normal(mu + y, 0.8), obs=x)


def guide(x):
    pyro.sample("mu", dist.Normal(real("loc", 0.0), positive("scale", 0.3)))
    logits = pyro.param("logits", lambda: torch.zeros(len(x), 5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=logits))


class ModuleGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(0.3), dist.constraints.positive)
        self.encoder = PyroModule[torch.nn.Linear](1, 5)
        with torch.no_grad():
            self.encoder.weight.fill_(0.2), self.encoder.bias.fill_(0.1)

    def forward(self, x):
        pyro.sample("mu", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.encoder(x.unsqueeze(-1)) * torch.arange(5.0)))


def by_state_dict(elbo):
    file = io.BytesIO()
    torch.save(elbo.state_dict(), file)  # tensors and numbers, as a checkpoint holds
    file.seek(0)
    resumed = RaoBlackwell_ELBO(**NESTING)
    resumed.load_state_dict(torch.load(file))
    return resumed


COPIES = {"state_dict": by_state_dict, "pickle": lambda e: pickle.loads(pickle.dumps(e)), "deepcopy": copy.deepcopy}


def train(copy_of=None, num_steps=16, stop=9):
    """Parameters after a run that is broken off, saved and resumed by new objects; or is not."""
    x = torch.linspace(-1.0, 5.0, 6)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo, optim = RaoBlackwell_ELBO(**NESTING), pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optim, elbo)
    for step in range(num_steps):
        if step == stop and copy_of is not None:
            saved = io.BytesIO()
            torch.save((pyro.get_param_store().get_state(), optim.get_state()), saved)
            elbo, random = copy_of(elbo), get_rng_state()
            saved.seek(0)
            parameters, state = torch.load(saved, weights_only=False)
            pyro.clear_param_store()
            pyro.get_param_store().set_state(parameters)
            optim = pyro.optim.Adam({"lr": 0.05})
            optim.set_state(state)
            set_rng_state(random)
            svi = SVI(model, guide, optim, elbo)
        svi.step(x)
    named = dict(pyro.get_param_store().named_parameters())
    return {name: p.detach().clone() for name, p in named.items()}, str(elbo.report())


@pytest.mark.parametrize("copy_of", COPIES)
def test_a_resumed_run_goes_on_bit_for_bit(copy_of):
    (expected, report), (actual, resumed) = train(), train(COPIES[copy_of])
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], p) for name, p in expected.items())
    assert resumed == report


def test_without_the_state_it_does_not():
    """The scale that was learned matters, so that the test above would see it lost."""
    expected, _ = train()
    actual, _ = train(lambda elbo: RaoBlackwell_ELBO(**NESTING))
    assert not all(torch.equal(actual[name], p) for name, p in expected.items())


def test_state_of_a_module():
    """Parameters of a module, matched by name."""
    x = torch.linspace(-1.0, 5.0, 6)
    case, elbo = Case(model, ModuleGuide(), (x,)), RaoBlackwell_ELBO(**NESTING)
    for seed in range(6):
        evaluate(elbo, case, seed=seed)
    resumed = {name: copy_of(elbo) for name, copy_of in COPIES.items()}
    expected = evaluate(elbo, case, seed=9)
    pyro.clear_param_store()
    twin = Case(model, ModuleGuide(), (x,))
    for other in resumed.values():
        assert_same(evaluate(other, twin, seed=9), expected)
    fresh = evaluate(RaoBlackwell_ELBO(**NESTING), twin, seed=9)[1]
    assert any((fresh[name] - grad).abs().max() > 1e-6 for name, grad in expected[1].items())
