# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A step through RVRSGuide is a graph: one round of proposals. Rare ways are eager."""

import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_rb
from pyro_rb import CompiledSVI, RVRSGuide
from tests.compiled import models
from tests.compiled.training import assert_equal, assert_replayed, train

pytestmark = pytest.mark.slow


def rejecting(case, **options):
    def make():
        model, proposal, args = case()
        return model, RVRSGuide(model, proposal, **options), args

    return make


def hierarchical():
    x = torch.linspace(-1.0, 1.0, 6)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    return model, AutoNormal(model, init_scale=0.3), lambda i: ()


def learned():
    """The model has a parameter."""
    x = torch.linspace(-1.0, 2.0, 5)

    def model():
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return model, AutoNormal(model), lambda i: ()


CASES = {
    "schools": models.schools,
    "joint": models.schools_joint,
    "low rank": models.schools_low_rank,
    "hierarchical": hierarchical,
    "function": models.conjugate,
    "learned": learned,
}


@pytest.mark.parametrize("name", CASES)
def test_equal_bit_by_bit(name):
    """Loss, parameters, threshold, acceptance and random numbers, over 30 steps."""
    assert_replayed(Trace_ELBO, rejecting(CASES[name]), 30)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 12},
        {"Z_target": 0.1},
        {"T": -3.0},
        {"epsilon": 0.01},
        {"T": 9.0, "adaptation": "fixed"},
    ],
    ids=str,
)
def test_options(options):
    make = rejecting(models.conjugate, **options)
    expected = train(Trace_ELBO(), make, 40)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    assert_equal(train(loss, make, 40), expected)
    # Where the acceptance changes, rounds of another size are graphs of their own.
    assert loss.num_graphs >= 1 and loss.report()[-1].treatment == "replayed"


@pytest.mark.parametrize(
    "options",
    [{"num_particles": 2}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}],
    ids=["looped", "vectorized"],
)
def test_particles(options):
    assert_replayed(lambda: Trace_ELBO(**options), rejecting(models.schools), 30)


def one_graph(make, steps=6, **options):
    """A guide, its compiled loss and a function that makes steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = make()
    loss = pyro_rb.compile(Trace_ELBO(), "replay", **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    for i in range(steps):
        svi.step(*args(i))
    assert loss.num_graphs == 1
    return model, guide, args, loss, svi


def count_eager(loss, monkeypatch):
    calls = []
    inner = loss.eager.loss_and_grads
    monkeypatch.setattr(loss.eager, "loss_and_grads", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    return calls


def test_too_few_accepted(monkeypatch):
    """Such a step is eager, with the same proposals and more; all others are not."""
    monkeypatch.setattr("pyro_rb.infer.rvrs_sampler.FEW_ELEMENTS", 0)  # one call in ten
    make, num_steps = rejecting(models.conjugate), 100
    expected = train(Trace_ELBO(), make, num_steps)
    rounds = []
    inner = RVRSGuide._adapt

    def adapt(self, proposer, accepted):
        rounds.append(len(accepted.rounds))
        inner(self, proposer, accepted)

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    calls = count_eager(loss, monkeypatch)
    monkeypatch.setattr(RVRSGuide, "_adapt", adapt)
    assert_equal(train(loss, make, num_steps), expected)
    assert loss.num_graphs == 1
    num_short = sum(n > 1 for n in rounds)
    assert num_short >= 3
    # The first step, comparisons, and those with several rounds.
    assert num_short + 3 <= len(calls) <= num_short + 8


@pytest.mark.parametrize("options", [{}, {"T": 1.0, "adaptation": "fixed"}], ids=str)
@pytest.mark.parametrize("unroll", [1, 4])
def test_steps_with_the_optimizer(monkeypatch, unroll, options):
    """Where a step is made again, those before it stand, and it has its random numbers."""
    monkeypatch.setattr("pyro_rb.infer.rvrs_sampler.FEW_ELEMENTS", 0)
    torch.set_default_dtype(torch.float64)

    def run(kind, loss, **unrolled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = rejecting(learned, **options)()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, **unrolled)
        if kind is CompiledSVI:
            losses = svi.run(80, progress_bar=False)
        else:
            losses = torch.tensor([svi.step() for _ in range(80)])
        store = {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}
        return losses, store, guide.T.clone(), guide.Z.clone(), torch.get_rng_state()

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    found, expected = run(CompiledSVI, loss, unroll=unroll), run(SVI, Trace_ELBO())
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[4], expected[4])
    assert (loss.num_graphs == 1) == (not options)


def test_threshold_that_is_unknown_again(monkeypatch):
    model, guide, args, loss, svi = one_graph(rejecting(models.conjugate))
    calls = count_eager(loss, monkeypatch)
    guide.T.fill_(torch.nan)
    svi.step(*args(0))
    assert len(calls) == 1 and guide.T.isfinite()
    svi.step(*args(0))
    assert len(calls) == 1


def test_proposals_that_are_not_allowed():
    """The eager loss warns of them as it does, and of no other share of them."""

    def make():
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("edge", torch.where(z > -2.6, 0.0, -torch.inf))

        return model, AutoNormal(model, init_scale=1.0), lambda i: ()

    expected = train(Trace_ELBO(), rejecting(make), 60)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    assert_equal(train(loss, rejecting(make), 60), expected)
    assert loss.num_graphs == 1


def test_local_plate_is_eager():
    def make():
        model, proposal, args = models.conjugate()
        return model, RVRSGuide(model, proposal, local_plate="data"), args

    expected = train(Trace_ELBO(), make, 6)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    with pytest.warns(UserWarning, match="RVRSGuide with local_plate='data' proposes until"):
        assert_equal(train(loss, make, 6), expected)
    assert loss.report()[-1].treatment == "eager"


def test_evaluation_leaves_the_threshold_alone():
    model, guide, args, loss, svi = one_graph(rejecting(models.schools))
    before = {k: v.clone() for k, v in guide.state_dict().items() if isinstance(v, torch.Tensor)}
    guide.eval()
    for i in range(5):
        svi.step(*args(i))
    for name in ("T", "T_step", "T_age", "Z"):
        assert torch.equal(getattr(guide, name), before[name])
    guide.train()
    svi.step(*args(0))
    assert not torch.equal(guide.T_step, before["T_step"])


def test_state_is_loaded():
    """The graph uses what is loaded."""

    def make_on(guides):
        def make():
            model, proposal, args = models.conjugate()
            guide = RVRSGuide(model, proposal)
            guides.append(guide)

            def load(i):
                if i == 10:
                    state = guide.state_dict()
                    guide.load_state_dict({k: v + 1.0 if k == "T" else v for k, v in state.items()})
                return args(i)

            return model, guide, load

        return make

    guides = []
    expected = train(Trace_ELBO(), make_on(guides), 20)
    assert_equal(train(pyro_rb.compile(Trace_ELBO(), "replay"), make_on(guides), 20), expected)
    assert torch.equal(guides[0].T, guides[1].T)


def test_function_inside_of_the_guide_is_watched():
    """A closure of the proposal, which RVRSGuide holds."""

    def make():
        width = 1.0

        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def proposal():
            m = pyro.param("m", torch.tensor(0.2))
            pyro.sample("z", dist.Normal(m, width))

        def args(i):
            nonlocal width
            width = 1.0 if i < 12 else 1.5
            return ()

        return model, RVRSGuide(model, proposal), args

    assert_replayed(Trace_ELBO, make, 24, num_graphs=2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor makes a wrong program of it, which is not used")
def test_inductor():
    """The steps of SVI but for rounding, with the threshold in the graph."""

    def run(kind, loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = rejecting(models.conjugate)()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        losses = [svi.step(*args(0)) for _ in range(60)]
        store = {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}
        return losses, store, guide.T.clone(), guide.Z.clone(), torch.get_rng_state()

    expected = run(SVI, Trace_ELBO())
    loss = pyro_rb.compile(Trace_ELBO(), background=False)
    found = run(CompiledSVI, loss)
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[4], expected[4])
    assert loss.report()[-1].treatment == "compiled"
