# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.compare import race as race_module
from pyro_rb.diagnostics.compare.race import Curve, race
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.problem import prepared

pytestmark = pytest.mark.slow

X = torch.tensor([0.5, -1.2, 2.0])


def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=X)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """By which a step takes 5 ms on every machine."""
    ticks = itertools.count()
    monkeypatch.setattr(race_module, "choose_clock", lambda tensors: lambda: 0.005 * next(ticks))


class Lame(Trace_ELBO):
    """Its steps lead nowhere."""

    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        for tensor in pyro.get_param_store().named_parameters():
            tensor[1].grad.zero_()
        return loss


class Failing(Trace_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        raise RuntimeError("no")


def test_the_better_loss_wins_and_all_is_put_back():
    made = {"Trace_ELBO": Trace_ELBO(), "lame": Lame(), "failing": Failing()}
    optim = pyro.optim.Adam({"lr": 0.01, "betas": (0.9, 0.99)})
    with prepared(model, AutoNormal(model), seed=0) as problem, TimedBar(False, None, {"training": 1}, {}) as bar:
        before = [tensor.detach().clone() for tensor in problem.parameters.values()]
        found = race(problem, "Trace_ELBO", list(made), made, optim, 0.5, bar, learning_rates=(1e-5, 0.05))
        after = list(problem.parameters.values())
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    trace, lame, failing = found.curves
    assert found.winner == "Trace_ELBO" and found.margin > 3 * found.margin_error
    assert trace.learning_rate == 0.05 and len(trace.losses) == 3 and len(trace.losses[0]) == len(trace.seconds)
    assert trace.losses[0][0] > trace.losses[0][-1] and trace.steps[-1] == pytest.approx(100, abs=5)
    assert "RuntimeError: no" in failing.error and not failing.losses
    assert str(found).startswith("Trained for 0.5 s each: Trace_ELBO ends lowest, by ")


def test_no_difference():
    curves = [
        Curve(name, 0.1, [1.0], [5.0], [[value] for value in values])
        for name, values in (("a", (1.0, 2.0, 3.0)), ("b", (1.1, 1.9, 3.1)), ("c", (math.nan, 1.0, 1.0)))
    ]
    found = race_module._judged(curves, 1.0)
    assert found.winner is None and str(found) == "Trained for 1 s each: no difference seen."


def test_in_a_comparison():
    arguments = dict(num_samples=4, num_burn_in=0, train_steps=[1], progress=False)
    result = compare(model, AutoNormal(model), "TraceMeanField_ELBO", train=0.05, **arguments)
    assert [curve.name for curve in result.race.curves] == ["Trace_ELBO", "TraceMeanField_ELBO"]
    assert str(result.race) in " ".join(str(result).split()) and "learning rate" in result.to_html()
    assert len(result.plot(kind="race").axes) == 1
    assert result.to_dict()["race"]["curves"][0]["learning_rate"] > 0
    assert compare(model, AutoNormal(model), [], **arguments).race is None
    assert not pyro.get_param_store()
