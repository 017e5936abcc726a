# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import inspect
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_rb.diagnostics import (
    check_unbiased,
    compare,
    find_parameters,
    gradient_moments,
    sample_gradients,
)
from pyro_rb.infer import STLTrace_ELBO
from tests.support.common import assert_unbiased
from tests.support.models import conj, discrete_first

pytestmark = pytest.mark.slow


def model():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def guide():
    loc = pyro.param("loc", torch.tensor([0.5, -1.0, 2.0]))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


class PlainGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, self.frozen).to_event(1))


def test_shapes_and_names():
    gradients = sample_gradients(Trace_ELBO(), model, guide, num_samples=4, seed=0)
    assert {name: tuple(g.shape) for name, g in gradients.items()} == {
        "loc": (4, 3),
        "scale": (4,),
    }


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_gradients_are_those_of_unconstrained_parameters(loss):
    case = conj()
    samples = sample_gradients(loss(num_particles=5), case.model, case.guide, case.args, num_samples=300)
    assert_unbiased(samples, case.exact_gradient(), detect=0.2)


@pytest.mark.parametrize(
    "loss", [RenyiELBO(alpha=0, num_particles=2), TraceEnum_ELBO(max_plate_nesting=0, strict_enumeration_warning=False)]
)
def test_other_losses_run(loss):
    gradients = sample_gradients(loss, model, guide, num_samples=3, seed=0)
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients.values())


def test_reweighted_wake_sleep_runs():
    loss = ReweightedWakeSleep(num_particles=2, vectorize_particles=False, insomnia=1.0)
    gradients = sample_gradients(loss, model, guide, num_samples=3, seed=0)
    assert (gradients["loc"] != 0).any()


def test_discrete_guide():
    case = discrete_first()
    samples = sample_gradients(
        Trace_ELBO(), case.model, case.guide, case.args, num_samples=400, seed=1
    )
    assert_unbiased(samples, case.exact_gradient(), detect=2.0)


def test_plain_module_needs_no_param_sites():
    net = PlainGuide()
    gradients = sample_gradients(Trace_ELBO(), model, net, num_samples=200, seed=0)
    assert list(gradients) == ["loc", "unused"]
    assert (gradients["unused"] == 0).all()
    assert_unbiased(gradients["loc"], net.loc.detach(), detect=0.3)


def test_plain_module_and_a_loss_without_differentiable_loss():
    with pytest.raises(NotImplementedError, match="RenyiELBO has no differentiable_loss.*pyro.module"):
        sample_gradients(RenyiELBO(num_particles=2), model, PlainGuide())


def test_moments_agree_with_samples():
    arguments = dict(num_samples=20, num_burn_in=3, seed=5)
    samples = sample_gradients(Trace_ELBO(), model, guide, **arguments)
    moments = gradient_moments(Trace_ELBO(), model, guide, **arguments)
    assert samples.keys() == moments.keys()
    for name, rows in samples.items():
        assert moments[name].count == 20
        torch.testing.assert_close(moments[name].mean, rows.double().mean(0))
        torch.testing.assert_close(moments[name].variance, rows.double().var(0))


def test_signatures_agree():
    assert inspect.signature(sample_gradients).parameters == (
        inspect.signature(gradient_moments).parameters
    )


def test_seed_fixes_the_draws_and_burn_in_does_not_shift_them():
    def draw(**arguments):
        return sample_gradients(Trace_ELBO(), model, guide, num_samples=5, **arguments)["loc"]

    assert torch.equal(draw(seed=1), draw(seed=1))
    assert torch.equal(draw(seed=1), draw(seed=1, num_burn_in=4))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    assert torch.equal(draw(), draw())  # none drawn in between: paired
    first = draw()
    torch.rand(())
    assert not torch.equal(first, draw())


def test_two_losses_see_the_same_numbers():
    arguments = dict(num_samples=10, seed=3)
    a = sample_gradients(Trace_ELBO(), model, guide, **arguments)
    b = sample_gradients(STLTrace_ELBO(control_variate_scale=0.0), model, guide, **arguments)
    assert torch.equal(a["loc"], b["loc"])


def test_burn_in_reaches_the_loss():
    class Counting(Trace_ELBO):
        calls = 0

        def loss_and_grads(self, *args, **kwargs):
            self.calls += 1
            return super().loss_and_grads(*args, **kwargs)

    loss = Counting()
    gradients = sample_gradients(loss, model, guide, num_samples=5, num_burn_in=7)
    assert loss.calls == 12 and len(gradients["loc"]) == 5


def test_world_is_left_as_found():
    loc = pyro.param("loc", torch.tensor([0.5, -1.0, 2.0]))
    loc.grad = torch.ones(3)
    state = torch.get_rng_state()
    sample_gradients(Trace_ELBO(), model, guide, num_samples=3)
    assert list(pyro.get_param_store()) == ["loc"]
    assert torch.equal(loc.grad, torch.ones(3))
    assert torch.equal(state, torch.get_rng_state())


def test_given_parameters_only():
    pyro.clear_param_store()
    guide()
    leaf = pyro.param("scale").unconstrained()
    gradients = sample_gradients(
        Trace_ELBO(), model, guide, num_samples=3, seed=0, parameters={"mine": leaf}
    )
    found = sample_gradients(Trace_ELBO(), model, guide, num_samples=3, seed=0)
    assert list(gradients) == ["mine"]
    assert torch.equal(gradients["mine"], found["scale"])


def test_constrained_parameter_is_rejected():
    guide()
    with pytest.raises(ValueError, match=r"parameters\['scale'\] is not a leaf.*unconstrained\(\)"):
        sample_gradients(Trace_ELBO(), model, guide, parameters={"scale": pyro.param("scale")})


def test_no_parameters():
    with pytest.raises(ValueError, match="no parameter that requires a gradient: expected a pyro.param"):
        sample_gradients(Trace_ELBO(), model, model)


@pytest.mark.parametrize("numbers", [{"num_samples": 0}, {"num_burn_in": -1}])
def test_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="expected num_samples >= 1 and num_burn_in >= 0, got"):
        sample_gradients(Trace_ELBO(), model, guide, **numbers)


def test_find_parameters_of_an_autoguide():
    auto = AutoNormal(model)
    assert list(find_parameters(model, auto)) == ["AutoNormal.locs.z", "AutoNormal.scales.z"]


def test_find_parameters_module_local():
    with pyro.settings.context(module_local_params=True):
        auto = AutoNormal(model)
        found = find_parameters(model, auto)
        assert len(found) == 2
        assert {id(p) for p in found.values()} == {id(p) for p in auto.parameters()}
        gradients = sample_gradients(Trace_ELBO(), model, auto, num_samples=3, seed=0)
        assert all((g != 0).any() for g in gradients.values())


def test_find_parameters_each_tensor_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 3)
            self.loc = nn.Parameter(torch.zeros(3))

        def model(self):
            pyro.module("decoder", self.net)
            model()

        def guide(self):
            pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    both = Both()
    found = find_parameters(both.model, both.guide)
    assert list(found) == ["decoder$$$weight", "decoder$$$bias", "loc"]


def test_names_that_are_taken():
    class PlainModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self):
            pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    assert list(find_parameters(PlainModel(), PlainGuide())) == ["loc", "unused", "model.loc"]


def test_sparse_gradients():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3, sparse=True)

        def forward(self):
            pyro.module("table", self.table)
            loc = self.table(torch.tensor([2]))[0]
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    gradients = sample_gradients(Trace_ELBO(), model, Table(), num_samples=2, seed=0)
    rows = gradients["table$$$weight"]
    assert rows.shape == (2, 4, 3)
    assert (rows[:, 2] != 0).all() and (rows[:, [0, 1, 3]] == 0).all()


def test_progress_bar(capsys, monkeypatch):
    sample_gradients(Trace_ELBO(), model, guide, num_samples=2, progress=True)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sample_gradients(Trace_ELBO(), model, guide, num_samples=2)
    assert capsys.readouterr().err == ""
    sample_gradients(Trace_ELBO(), model, guide, num_samples=2, progress=True)
    assert "/2" in capsys.readouterr().err


ROWS = torch.linspace(-2.0, 2.0, 50)


def batch_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 50, subsample=x):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def batch_guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.2))


def batch():
    return (ROWS[torch.randperm(50)[:5]],)


def test_new_minibatch_at_each_draw():
    """Its noise counts: the variance of the gradient is that of both."""
    moving = sample_gradients(Trace_ELBO(), batch_model, batch_guide, batch, num_samples=400, seed=0)["loc"]
    fixed = sample_gradients(Trace_ELBO(), batch_model, batch_guide, (ROWS[:5],), num_samples=400, seed=0)["loc"]
    # 50 times the mean of 5 of 50 rows, drawn without replacement.
    of_batches = 50**2 * ROWS.var() / 5 * (1 - 5 / 50)
    assert (moving.var() - fixed.var()).item() == pytest.approx(of_batches.item(), rel=0.25)


def test_all_losses_see_the_same_minibatch():
    batches = []

    def recorded():
        batches.append(batch()[0])
        return (batches[-1],)

    options = dict(num_samples=10, num_burn_in=2, progress=False, train_steps=[3])
    result = compare(batch_model, batch_guide, ["TraceMeanField_ELBO"], args=recorded, **options)
    row = result.states[0].losses[1]
    assert not row.biased and row.detectable_bias < 1.0
    # Three for the traces, of which two to see that it follows the seed; three to train; four times three to
    # see which parameters matter; two a draw; memory.
    assert len(batches) >= 3 + 3 + 12 + 2 * 12
    drawn = batches[18 : 18 + 24]
    assert all(torch.equal(a, b) for a, b in zip(drawn[::2], drawn[1::2]))
    assert not torch.equal(drawn[0], drawn[2])
    assert check_unbiased("STLTrace_ELBO", batch_model, batch_guide, args=batch, num_samples=50).max_abs_z < 5
    with pytest.raises(AssertionError, match="biased in loc"):
        check_unbiased("STLTrace_ELBO", batch_model, batch_guide, args=lambda: (2 * batch()[0],),
                       reference={"loc": torch.tensor(1e3)}, num_samples=50)


def test_minibatches_that_do_not_follow_the_seed():
    loader = iter(ROWS.split(5))
    with pytest.raises(ValueError, match=r"args\(\): it returned other values when called again"):
        sample_gradients(Trace_ELBO(), batch_model, batch_guide, lambda: (next(loader),))
    with pytest.raises(TypeError, match=r"args\(\): expected it to return a tuple.*got Tensor"):
        sample_gradients(Trace_ELBO(), batch_model, batch_guide, lambda: ROWS)
    with pytest.raises(TypeError, match="args: expected a tuple.*for minibatches give a function"):
        sample_gradients(Trace_ELBO(), batch_model, batch_guide, iter(ROWS.split(5)))
