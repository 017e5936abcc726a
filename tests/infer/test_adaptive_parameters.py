# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Parameters that come and go, or are of an unusual kind, under the adaptive scale.

At each step the gradient is that of Trace_ELBO less the scale of each site times its score,
which is computed here on its own, from the densities of a guide that is replayed.
"""

from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.utils.checkpoint import checkpoint

from pyro_rb import DReG_ELBO, STLTrace_ELBO

pytestmark = pytest.mark.slow

X = torch.tensor([1.0, -0.5, 0.3], dtype=torch.double)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def target(*args):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def normal(loc, scale=0.3):
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(loc, scale))


def zeros(*shape):
    return torch.zeros(*shape, requires_grad=True)


class Scenario:
    """A model and a guide, and what happens to their parameters on the way."""

    model = staticmethod(target)
    tolerance = 1e-9
    step = 0

    def before(self):
        pass

    def args(self):
        return ()


class FrozenInTurn(Scenario):
    def __init__(self):
        self.parameters = self.loc, self.log_scale = zeros(3), zeros(3)

    def before(self):
        self.log_scale.requires_grad_(not 20 <= self.step < 40)
        self.loc.requires_grad_(self.step < 50)

    def guide(self):
        normal(self.loc, (self.log_scale - 1).exp())


class Branches(Scenario):
    def __init__(self):
        self.parameters = self.shared, self.often, self.rarely = zeros(3), zeros(3), zeros(1)

    def guide(self):
        own = self.often if self.step % 3 else self.rarely
        normal(own, (self.shared - 1).exp())


class NewAtEachStep(Scenario):
    def __init__(self):
        self.loc = zeros(3)

    @property
    def parameters(self):
        return [self.loc, *(p for _, p in pyro.get_param_store().named_parameters())]

    def guide(self):
        normal(self.loc + pyro.param(f"of step {self.step}", torch.zeros(3)))


class Shape(Scenario):
    def __init__(self):
        self.parameters = [torch.nn.Parameter(torch.zeros(3))]

    def before(self):
        if self.step in (20, 40):
            self.parameters[0].data = torch.zeros(2, 3) if self.step == 20 else torch.zeros(3)

    def guide(self):
        normal(self.parameters[0].reshape(-1, 3).sum(0))


class DType(Scenario):
    tolerance = 1e-5

    def __init__(self):
        self.net = torch.nn.Linear(2, 6)
        self.parameters = list(self.net.parameters())

    def before(self):
        if self.step in (20, 40):
            self.net.to(torch.float32 if self.step == 20 else torch.float64)

    def guide(self):
        out = self.net(torch.ones(2, dtype=self.net.weight.dtype)).double()
        normal(out[:3], (out[3:] - 1).exp())


class Sparse(Scenario):
    def __init__(self):
        self.table = torch.nn.Embedding(10, 2, sparse=True)
        self.parameters = [self.table.weight]

    def args(self):
        return (torch.arange(3) * self.step % 10,)

    def guide(self, index):
        loc, log_scale = self.table(index).unbind(-1)
        normal(loc, (log_scale - 1).exp())


class SparseAndDense(Sparse):
    def guide(self, index):
        loc, log_scale = self.table(index).unbind(-1)
        if self.step % 3 == 0:
            loc = loc + self.table.weight.mean()
        normal(loc, (log_scale - 1).exp())


class SparseGuideDenseModel(Sparse):
    def model(self, index):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(self.table.weight.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)


class Inputs(Scenario):
    """Data that require grad, of a size that varies."""

    def __init__(self):
        self.encoder = torch.nn.Linear(1, 2)
        self.data = torch.arange(60.0).sin().requires_grad_()
        self.parameters = [*self.encoder.parameters(), self.data]

    def args(self):
        return ({"x": [self.data[: 2 + self.step % 3]]},)

    def model(self, batch):
        (x,) = batch["x"]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, batch):
        (x,) = batch["x"]
        loc, log_scale = self.encoder(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (log_scale - 1).exp()))


class Complex(Scenario):
    def __init__(self):
        self.parameters = [torch.zeros(3, dtype=torch.complex128, requires_grad=True)]

    def guide(self):
        normal(self.parameters[0].real + 0.3 * self.parameters[0].imag)


class Odd(Scenario):
    """Of size zero, with strides, and of another dtype."""

    tolerance = 1e-5

    def __init__(self):
        self.parameters = [
            zeros(0),
            torch.zeros(3, 3).t().requires_grad_(),
            torch.zeros(3, dtype=torch.float32, requires_grad=True),
        ]

    def guide(self):
        empty, strided, single = self.parameters
        normal(strided.sum(1) + empty.sum() + single.double())


class GroupsMerge(Scenario):
    """Sites that share parameters at some steps only."""

    def __init__(self):
        self.parameters = [zeros(()) for _ in range(3)]

    def model(self):
        z = [pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(3)]
        pyro.sample("x", dist.Normal(z[0] + z[1] * z[2], 0.5), obs=torch.tensor(1.0))

    def guide(self):
        for i, own in enumerate(self.parameters):
            loc = own + self.parameters[(i + 1) % 3] if self.step % 4 == i else own
            pyro.sample(f"z{i}", dist.Normal(loc, 0.2 + 0.1 * i))


SCENARIOS = Scenario.__subclasses__() + Sparse.__subclasses__()


def dense(loss, parameters):
    requires_grad = [p for p in parameters if p.requires_grad]
    found = [None] * len(requires_grad)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, requires_grad, allow_unused=True, retain_graph=True)
    pairs = zip(found, requires_grad)
    return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs]


def replayed(guide, args, seed):
    """Densities of the sites of a guide, its values held fixed."""
    pyro.set_rng_seed(seed)
    fixed = poutine.trace(guide).get_trace(*args)
    for name in fixed.stochastic_nodes:
        fixed.nodes[name]["value"] = fixed.nodes[name]["value"].detach()
    trace = poutine.trace(poutine.replay(guide, trace=fixed)).get_trace(*args)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("kind", SCENARIOS)
def test_gradient_at_each_step(kind):
    scenario, elbo = kind(), STLTrace_ELBO()
    scales = []
    for scenario.step in range(60):
        scenario.before()
        model, guide, args = scenario.model, scenario.guide, scenario.args()
        pyro.set_rng_seed(scenario.step)
        loss = elbo.differentiable_loss(model, guide, *args)
        actual = dense(loss, scenario.parameters)
        pyro.set_rng_seed(scenario.step)
        reference = Trace_ELBO().differentiable_loss(model, guide, *args)
        expected = dense(reference, scenario.parameters)
        trace = replayed(guide, args, scenario.step)
        for name, scale in elbo._scales.items():
            score = dense(trace.nodes[name]["log_prob_sum"], scenario.parameters)
            expected = [g - scale * s for g, s in zip(expected, score)]
        for g, g_expected in zip(actual, expected):
            torch.testing.assert_close(g, g_expected, rtol=scenario.tolerance, atol=scenario.tolerance)
        scales.append(list(elbo._scales.values()))
    assert not any(map(any, scales[:3])), "starts as Trace_ELBO"
    assert max(m.updates for m in elbo._adaptive._variates.values()) >= 20, "has learned"


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("kind", SCENARIOS)
def test_dreg_runs(kind, vectorize):
    scenario = kind()
    elbo = DReG_ELBO(
        num_particles=2,
        vectorize_particles=vectorize,
        max_plate_nesting=1,
        control_variate_scale="adaptive",
    )
    for scenario.step in range(60):
        scenario.before()
        loss = elbo.differentiable_loss(scenario.model, scenario.guide, *scenario.args())
        assert all(g.isfinite().all() for g in dense(loss, scenario.parameters))


def run(scenario, num_steps):
    elbo = STLTrace_ELBO()
    for scenario.step in range(num_steps):
        scenario.before()
        elbo.differentiable_loss(scenario.model, scenario.guide, *scenario.args())
    return elbo


def test_freezing_one_parameter_keeps_what_the_other_has_learned():
    scenario = FrozenInTurn()
    moments = run(scenario, 60)._adaptive._variates
    assert moments[scenario.loc].updates == 50
    assert moments[scenario.log_scale].updates == 30
    assert [m._mean_h.numel() for m in moments.values()] == [3, 3]


def test_each_branch_learns_its_own():
    scenario = Branches()
    moments = run(scenario, 90)._adaptive._variates
    updates = [moments[p].updates for p in scenario.parameters]
    assert updates[0] > updates[1] > updates[2] > 10


def test_a_stream_of_new_parameters_does_not_keep_the_start_up_going():
    scenario = NewAtEachStep()
    elbo = run(scenario, 150)
    assert elbo._scales["z"] > 0.0
    assert 50 < elbo._adaptive._variates[scenario.loc].updates < 60


def test_inputs_that_require_grad_are_no_parameters():
    scenario = Inputs()
    moments = run(scenario, 30)._adaptive._variates
    assert set(map(id, moments)) == set(map(id, scenario.encoder.parameters()))


def test_parameters_may_be_passed_as_arguments():
    scenario = FrozenInTurn()
    stored = pyro.param("stored", torch.zeros(3)).unconstrained()

    def guide(loc, log_scale, stored):
        normal(loc + stored, log_scale.exp())

    loc, log_scale = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    elbo = STLTrace_ELBO()
    elbo.differentiable_loss(scenario.model, guide, loc, log_scale, stored)
    known = set(map(id, elbo._adaptive._variates))
    assert known == {id(loc), id(log_scale), id(stored)}


def test_a_site_of_inputs_only_is_as_under_trace_elbo():
    scenario, x = FrozenInTurn(), zeros(3)
    for seed in range(10):
        gradients = []
        for elbo in (STLTrace_ELBO(), Trace_ELBO()):
            pyro.set_rng_seed(seed)
            loss = elbo.differentiable_loss(scenario.model, lambda x: normal(x), x)
            gradients.append(torch.autograd.grad(loss, x)[0])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_code_that_allows_for_one_backward_pass_only(where):
    """Such as compiled code; here a checkpoint that is entered again."""
    layer = torch.nn.Linear(1, 1)

    def once(x):
        return checkpoint(layer, x[:, None], use_reentrant=True).squeeze(-1)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(once(z) if where == "model" else z, 0.5), obs=X)

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        normal(once(loc) if where == "guide" else loc)

    elbo = STLTrace_ELBO()
    for seed in range(20):
        gradients = []
        for loss in (elbo, Trace_ELBO()):
            pyro.set_rng_seed(seed)
            loss.loss_and_grads(model, guide)
            parameters = [*layer.parameters(), pyro.param("loc").unconstrained()]
            gradients.append([p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        torch.testing.assert_close(*gradients)
    (row,) = elbo.report()
    assert "c is not learned: When use_reentrant=True" in row.reason


def clipped(grad):
    return grad.clamp(-1e-3, 1e-3)


@pytest.mark.parametrize("entrance", ["loss_and_grads", "differentiable_loss"])
def test_hooks_fire_once_a_step(entrance):
    """Those of parameters, of values of sites, and after accumulation."""

    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net, calls, seen = torch.nn.Linear(1, 2), Counter(), []
        for name, p in net.named_parameters():
            p.register_hook(lambda grad, name=name: calls.update([name]))
            p.register_post_accumulate_grad_hook(lambda p: calls.update(["accumulated"]))
        both = list(net.parameters())
        torch.autograd.graph.register_multi_grad_hook(both, lambda grads: calls.update(["multi"]))

        def guide():
            pyro.module("net", net)
            scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
            scale.register_hook(lambda grad: calls.update(["constrained"]))
            loc, log_scale = net(X[:, None]).unbind(-1)
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(loc, log_scale.exp() * scale))
            z.register_hook(seen.append)
            z.retain_grad()
            retained.append(z)

        retained = []
        for seed in range(8):
            pyro.set_rng_seed(seed)
            loss = getattr(elbo, entrance)(target, guide)
            if entrance == "differentiable_loss":
                loss.backward()
        return calls, seen, [z.grad for z in retained]

    expected = run(Trace_ELBO())
    assert set(expected[0].values()) == {8, 16}
    for scale in ("adaptive", 1.0, 0.3):
        actual = run(STLTrace_ELBO(control_variate_scale=scale))
        assert actual[0] == expected[0]
        torch.testing.assert_close(actual[1:], expected[1:])


def test_hooks_that_clip_do_not_change_what_is_learned():
    def run(clips):
        pyro.clear_param_store()
        elbo, loc = STLTrace_ELBO(), pyro.param("loc", torch.zeros(3)).unconstrained()
        if clips:
            loc.register_hook(clipped)
        for seed in range(10):
            pyro.set_rng_seed(seed)
            elbo.loss_and_grads(target, lambda: normal(pyro.param("loc")))
        assert bool(loc.grad.abs().max() < 0.1) is clips
        return elbo._scales

    assert run(True) == run(False)
