# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.compare import compiled, measurement
from pyro_rb.diagnostics.compare.compiled import (
    CompiledTime,
    time_compiled,
    with_compiled,
)
from pyro_rb.diagnostics.compare.recommend import Ranked, Recommendation
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.run.problem import prepared
from tests.support.compiled import needs_compiled

pytestmark = pytest.mark.slow

X = torch.tensor([0.3, -0.8, 1.4])
ADAM = pyro.optim.Adam({"lr": 0.01})


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def replay_only(monkeypatch):
    """Nothing is worth Inductor's seconds. No column is hidden."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0.0)


def times_of(model, guide, args, loss="Trace_ELBO"):
    with prepared(model, guide, args) as problem:
        return time_compiled(problem, loss, make_loss(loss), ADAM)


@needs_compiled
@pytest.mark.parametrize("loss", ["Trace_ELBO", "STLTrace_ELBO", "RaoBlackwell_ELBO", "TraceMeanField_ELBO"])
def test_steps_are_timed(loss, replay_only):
    """How much faster they are is a question for the benchmarks."""
    (found,) = times_of(model, AutoNormal(model), (X,), loss)
    assert found.error is None and found.backend == "replay"
    assert min(found.seconds, found.eager_seconds) > 0 and found.setup_seconds >= 0


@needs_compiled
def test_inductor_comes_after_replay():
    replayed, inductor = times_of(model, AutoNormal(model), (X,))
    assert (replayed.backend, inductor.backend) == ("replay", "inductor")
    assert replayed.error is None and inductor.error is None
    # Not more, where Inductor has the program from an earlier run.
    assert inductor.setup_seconds >= replayed.setup_seconds


@needs_compiled
def test_minibatches_are_drawn_anew(replay_only):
    seen = []

    def args():
        seen.append(X + torch.rand(()))
        return (seen[-1],)

    (found,) = times_of(model, AutoNormal(model), args)
    assert found.error is None and len(seen) > 20


@needs_compiled
def test_a_model_that_cannot_be_captured():
    def branches(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])

    (found,) = times_of(branches, AutoNormal(branches), (X,))
    assert "if z > 0" in found.error
    assert found.share(10) == 1.0 and found.pays_from is None


def test_a_guide_without_a_param_site():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    (found,) = times_of(model, Guide(), (X,))
    assert "pyro.param" in found.error


def advice(**times):
    ranking = [Ranked(name, time, 0.01, [time, time]) for name, time in times.items()]
    return Recommendation(min(times, key=times.get), "Take it.", [], ranking, "usage")


def test_what_compilation_saves_is_counted_over_the_steps():
    one = CompiledTime("STLTrace_ELBO", "inductor", 4e-3, 2e-4, 10.0)
    found = with_compiled(advice(Trace_ELBO=1.0, STLTrace_ELBO=0.5), [one], 10000)
    first = found.ranking[0]
    assert first.name == "STLTrace_ELBO, compiled" and first.time == pytest.approx(0.5 * 0.3)
    assert found.usage.endswith("CompiledSVI(model, guide, optim, loss=STLTrace_ELBO())")
    assert found.caveats == [
        "With CompiledSVI a step takes 0.2 ms in place of 4 ms, after 10 s of compilation: 0.3 of the time for "
        "10000 steps, and it pays from step 2632 on."
    ]
    few = with_compiled(advice(Trace_ELBO=1.0, STLTrace_ELBO=0.5), [one], 100)
    assert few.usage == "usage" and few.ranking[0].name == "STLTrace_ELBO"
    assert few.caveats == ["Compiled steps pay from 2632 steps, more than the 100 that are intended."]


@pytest.mark.parametrize("num_steps, expected", [(1000, 3.0), (10000, 12.0)])
def test_steps_are_replayed_until_inductor_is_done(num_steps, expected):
    replay = CompiledTime("STLTrace_ELBO", "replay", 4e-3, 2e-3, 1.0)
    one = CompiledTime("STLTrace_ELBO", "inductor", 4e-3, 2e-4, 11.0, 2e-3, 1.0)
    assert num_steps * 4e-3 * one.share(num_steps) == pytest.approx(expected)
    assert one.pays_from == replay.pays_from == 500
    found = with_compiled(advice(Trace_ELBO=1.0, STLTrace_ELBO=0.5), [replay, one], num_steps)
    assert found.usage.endswith("CompiledSVI(model, guide, optim, loss=STLTrace_ELBO())")
    assert "after 11 s of compilation, until which it takes 2 ms" in found.caveats[0]


def test_the_second_may_win_once_compiled():
    slow = CompiledTime("STLTrace_ELBO", "inductor", 4e-3, 3e-3, 1.0)
    fast = CompiledTime("RaoBlackwell_ELBO", "replay", 4e-3, 1e-3, 1.0)
    found = with_compiled(advice(Trace_ELBO=1.0, STLTrace_ELBO=0.5, RaoBlackwell_ELBO=0.6), [slow, fast], 10000)
    assert found.loss == "RaoBlackwell_ELBO"
    assert 'compile(RaoBlackwell_ELBO(), "replay")' in found.usage


def test_a_compiled_loss_must_be_worth_the_change():
    seconds = {"Trace_ELBO": 1e-3, "A": 9.8e-4}
    times = [CompiledTime(name, "replay", 4e-3, seconds[name], 1.0) for name in seconds]
    assert with_compiled(advice(Trace_ELBO=1.0, A=1.0), times, 10000).loss == "Trace_ELBO"


def test_without_advice_nothing_is_added():
    thin = Recommendation(None, "No advice.", [], [Ranked("Trace_ELBO", 1.0, 0.0, [1.0])])
    assert with_compiled(thin, [CompiledTime("Trace_ELBO", "replay", 4e-3, 1e-3, 1.0)], 10000).usage is None


@pytest.fixture
def steady(monkeypatch):
    """A clock for the measurement of gradients, by which those of all losses take the same time on every machine."""
    ticks = itertools.count()
    monkeypatch.setattr(measurement, "choose_clock", lambda tensors: lambda: 0.001 * next(ticks))


@needs_compiled
def test_compare_times_what_it_recommends(replay_only, steady):
    guide = AutoNormal(model)
    guide(X)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    options = dict(args=(X,), num_samples=60, num_burn_in=5, train_steps=[5], progress=False)
    result = compare(model, guide, ["TraceMeanField_ELBO"], steps=100_000, **options)
    assert result.settings["steps"] == 100_000
    assert [one.backend for one in result.compiled] == ["replay"] * len(result.compiled)
    assert result.compiled[0].name == compare(model, guide, ["TraceMeanField_ELBO"], **options).recommendation.loss
    assert "CompiledSVI" in result.recommendation.usage and "replayed" in result.table()
    assert "Whole steps" in result.table() and "times as fast" in result.table() and "times as fast" in result.to_html()
    assert json.loads(json.dumps(result.to_dict()))["compiled"][0]["backend"] == "replay"
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, before[name])


@needs_compiled
def test_the_reason_why_nothing_is_compiled_is_shown(steady):
    def branches(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z if z > 0 else -z, 1.0), obs=x[0])

    options = dict(args=(X,), num_samples=60, num_burn_in=5, train_steps=[5], progress=False)
    result = compare(branches, AutoNormal(branches), ["STLTrace_ELBO:1.0"], steps=1000, **options)
    assert "is not compiled: It looks at the value of a tensor" in " ".join(result.table().split())
    assert "times as fast" not in result.to_html()


def test_compiles_by_default_unless_losses_are_named(replay_only, steady):
    options = dict(args=(X,), num_samples=150, num_burn_in=0, train_steps=[1], progress=False)
    result = compare(model, AutoNormal(model), **options)
    assert result.compiled and result.settings["steps"] == 10_000
    assert not compare(model, AutoNormal(model), ["STLTrace_ELBO"], **options).compiled


def test_steps_are_checked():
    with pytest.raises(ValueError, match="steps: expected 0 or more, got -1"):
        compare(model, AutoNormal(model), args=(X,), steps=-1)


@pytest.mark.parametrize("num_steps, backends", [(10, ["replay"]), (10**9, ["replay", "inductor"])])
def test_inductor_is_tried_where_it_can_pay(num_steps, backends, monkeypatch):
    monkeypatch.setattr(compiled, "WORTH_COMPILING", math.inf)

    def one_step(one, *_):
        one.eager_seconds, one.seconds, one.setup_seconds = 2e-3, 1e-3, 0.5

    monkeypatch.setattr(compiled, "_time", one_step)
    found = time_compiled(None, "Trace_ELBO", None, ADAM, num_steps)
    assert [one.backend for one in found] == backends
