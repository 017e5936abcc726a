# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A run that is saved, loaded and resumed goes on as if it had not been interrupted."""

import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.util import get_rng_state, set_rng_state
from torch.distributions import constraints

from pyro_rb import R2G2_ELBO, DReG_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO

pytestmark = pytest.mark.slow

X = torch.tensor([1.3, 0.2, 2.1, 0.8, 1.9])
VECTORIZED = {"num_particles": 3, "vectorize_particles": True}
LOSSES = {
    "adaptive": STLTrace_ELBO,
    "c = 1": lambda: STLTrace_ELBO(control_variate_scale=1.0),
    "adaptive, vectorized": lambda: STLTrace_ELBO(**VECTORIZED),
    "adaptive, looped": lambda: STLTrace_ELBO(num_particles=2),
    "DReG": lambda: DReG_ELBO(num_particles=3),
    "adaptive DReG": lambda: DReG_ELBO(num_particles=3, control_variate_scale="adaptive"),
    "top-k": lambda: RaoBlackwellTopK_ELBO(),
    "R2-G2": R2G2_ELBO,
    "R2-G2, ends its work": lambda: R2G2_ELBO(num_steps=12),
}
NUM_STEPS, BREAK = 24, 11


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("x", dist.Normal(mu, s), obs=X)


def guide():
    scales = [pyro.param(n, torch.tensor(0.3), constraint=constraints.positive) for n in ("a", "b")]
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), scales[0]))
    pyro.sample("s", dist.LogNormal(pyro.param("l", torch.tensor(0.0)), scales[1]))


def saved(thing):
    """As a file holds it, and as it is loaded where no code of ours may run."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(elbo, make_elbo):
    state, elbo = saved(elbo.state_dict()), make_elbo()
    elbo.load_state_dict(state)
    return elbo


def by_saving_twice(elbo, make_elbo):
    return by_state_dict(by_state_dict(elbo, make_elbo), make_elbo)


def by_pickle(elbo, make_elbo):
    return pickle.loads(pickle.dumps(elbo))


WAYS = [by_state_dict, by_saving_twice, by_pickle]


@pytest.mark.parametrize("resume", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_svi_goes_on_bit_for_bit(name, resume):
    make_optim = lambda: pyro.optim.ExponentialLR(  # noqa: E731
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.95}
    )

    def run(breaks):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        store, optim, elbo = pyro.get_param_store(), make_optim(), LOSSES[name]()
        losses = []
        for step in range(NUM_STEPS):
            if step == BREAK and breaks:
                parameters, state, random = store.get_state(), optim.get_state(), get_rng_state()
                parameters = pickle.loads(pickle.dumps(parameters))
                state = pickle.loads(pickle.dumps(state))
                elbo = resume(elbo, LOSSES[name])
                pyro.clear_param_store()
                store.set_state(parameters)
                optim = make_optim()
                optim.set_state(state)
                set_rng_state(random)
            losses.append(SVI(model, guide, optim, elbo).step())
            optim.step()
        return losses, {name: p.detach().clone() for name, p in store.items()}, elbo.report()

    (losses, values, report), (expected_losses, expected, expected_report) = run(True), run(False)
    assert losses == expected_losses
    assert all(torch.equal(values[key], expected[key]) for key in expected)
    assert report == expected_report


class Model(PyroModule):
    def forward(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


class Guide(torch.nn.Module):
    """A plain module: its parameters are in no param store."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(len(X), 4)

    def forward(self, x):
        loc, log_scale = self.net(x).chunk(2)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def auto(guide_type):
    def make():
        guide = guide_type(Model())
        guide(X)
        return guide

    return make


@pytest.mark.parametrize("make_guide", [Guide, auto(AutoNormal), auto(AutoMultivariateNormal)])
@pytest.mark.parametrize("name", ["adaptive", "adaptive, vectorized", "adaptive DReG"])
def test_module_goes_on_bit_for_bit(name, make_guide):
    """As a checkpoint of Lightning does, which holds the loss's state beside the module's."""

    def start():
        loss = LOSSES[name]()
        module = loss(Model(), make_guide())
        return loss, module, torch.optim.Adam(module.parameters(), lr=0.02)

    def run(breaks):
        pyro.set_rng_seed(3)
        loss, module, optim = start()
        for step in range(NUM_STEPS):
            if step == BREAK and breaks:
                parts = [module.state_dict(), optim.state_dict(), loss.state_dict()]
                checkpoint, random = saved(parts), get_rng_state()
                loss, module, optim = start()
                for part, state in zip((module, optim, loss), checkpoint):
                    part.load_state_dict(state)
                set_rng_state(random)
            optim.zero_grad()
            module(X).backward()
            optim.step()
        return module.state_dict()

    with pyro.settings.context(module_local_params=True):
        actual, expected = run(True), run(False)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_tensors_without_a_name_are_known_by_their_order():
    def target():
        pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))

    def run(breaks):
        pyro.set_rng_seed(0)
        elbo, values = STLTrace_ELBO(), [torch.zeros(2), torch.zeros(2), torch.ones(2)]
        for step in range(12):
            if step == 0 or (step == 6 and breaks):
                elbo = by_state_dict(elbo, STLTrace_ELBO)
                values = [value.detach().clone().requires_grad_() for value in values]

            def unnamed():
                loc, offset, log_scale = values
                scale = log_scale.exp()
                pyro.sample("z", dist.Normal(loc + offset.tanh(), scale).to_event(1))

            elbo.differentiable_loss(target, unnamed).backward()
            with torch.no_grad():
                for value in values:
                    value -= 0.05 * value.grad
                    value.grad = None
        return values

    assert all(map(torch.equal, run(True), run(False)))


def trained(make_elbo, num_steps=6):
    elbo = make_elbo()
    for seed in range(num_steps):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide)
    return elbo


@pytest.mark.parametrize("name", LOSSES)
def test_state_is_a_snapshot(name):
    elbo = trained(LOSSES[name])
    state = elbo.state_dict()
    before = pickle.dumps(state)
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert pickle.dumps(state) == before


def test_names_of_parameters_are_in_the_state():
    names = [entry["name"] for entry in trained(STLTrace_ELBO).state_dict()["control_variates"]]
    assert sorted(names) == ["a", "b", "l", "m"]


def test_another_shape_is_another_parameter():
    elbo = by_state_dict(trained(STLTrace_ELBO), STLTrace_ELBO)
    pyro.clear_param_store()
    pyro.param("m", torch.zeros(3))

    def wide():
        pyro.sample("mu", dist.Normal(pyro.param("m"), 1.0).to_event(1))

    def target():
        pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    elbo.loss_and_grads(target, wide)
    assert elbo.report()[0].treatment == "path gradient, c = 0"


@pytest.mark.parametrize("name", LOSSES)
def test_state_of_another_class(name):
    elbo = LOSSES[name]()
    before = elbo.state_dict()
    message = rf"Invalid state of {type(elbo).__name__}: found the keys \['weight'\], expected"
    with pytest.raises(ValueError, match=message):
        elbo.load_state_dict({"weight": torch.zeros(1)})
    assert elbo.state_dict() == before


def test_loading_forgets_what_was_learned():
    elbo = trained(STLTrace_ELBO)
    elbo.load_state_dict(STLTrace_ELBO().state_dict())
    elbo.loss_and_grads(model, guide)
    assert {row.treatment for row in elbo.report()} == {"path gradient, c = 0"}


def test_state_is_no_part_of_the_module():
    assert "elbo" not in str(list(Trace_ELBO()(Model(), Guide()).state_dict()))
    assert len(STLTrace_ELBO()(Model(), Guide()).state_dict()) == 2
