# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What recent runs had no use for is left out, and comes back when there is a use."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO
from pyro_rb.infer import run_mixin
from pyro_rb.infer.pause import MAX_STRUCTURES, NUM_LOOKS, Pause
from tests.support.cases import positive, real

NOT_WATCHED = "linear uses are not looked for"
SHARED = {"max_plate_nesting": 1, "pre_activations": "shared"}


def model(is_linear=False, size=20, has_switch=False):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    f = torch.ones(3, size) @ w if is_linear else w.exp().sum() + torch.zeros(3)
    if has_switch:
        f = f + pyro.sample("s", dist.Bernoulli(0.5))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(f, 1.0), obs=torch.zeros(3))


def guide(is_linear=False, size=20, has_switch=False):
    loc = pyro.param("loc", torch.zeros(40))[:size]
    pyro.sample("w", dist.Normal(loc, positive("scale", 0.3)).to_event(1))
    if has_switch:
        pyro.sample("s", dist.Bernoulli(logits=real("logits", 0.2)))


def steps(elbo, num, **options):
    for _ in range(num):
        elbo.loss_and_grads(model, guide, **options)
    return {row.site: row for row in elbo.report()}


@pytest.fixture
def watched(monkeypatch):
    """The runs in which uses were watched, by number."""
    runs = []

    class Watched(run_mixin.Projection):
        def __init__(self, *args, **kwargs):
            runs.append(len(runs))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_mixin, "Projection", Watched)
    return runs


def test_pauses_where_no_use_is_linear(watched):
    elbo = RaoBlackwell_ELBO(**SHARED)
    assert NOT_WATCHED not in steps(elbo, NUM_LOOKS)["w"].reason
    assert len(watched) == NUM_LOOKS
    assert NOT_WATCHED in steps(elbo, 1)["w"].reason
    steps(elbo, 200)
    # The 16th, 32nd, 64th and 128th run are looked at.
    assert len(watched) == NUM_LOOKS + 4


def test_never_pauses_where_one_is(watched):
    steps(RaoBlackwell_ELBO(**SHARED), 50, is_linear=True)
    assert len(watched) == 50


@pytest.mark.parametrize("change", [{"size": 30, "is_linear": True}, {"is_linear": True, "has_switch": True}])
def test_looks_again_when_shapes_or_sites_change(change):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    assert NOT_WATCHED in steps(elbo, 20)["w"].reason
    assert NOT_WATCHED in steps(elbo, 1, **change)["w"].reason
    assert "projected" in steps(elbo, 1, **change)["w"].treatment


def test_looks_again_when_the_mode_of_a_module_changes():
    class Model(torch.nn.Module):
        def forward(self):
            return model(is_linear=not self.training)

    program, elbo = Model(), RaoBlackwell_ELBO(max_plate_nesting=1)
    for _ in range(20):
        elbo.loss_and_grads(program, lambda: guide())
    assert NOT_WATCHED in elbo.report()[0].reason
    program.eval()
    for _ in range(2):
        elbo.loss_and_grads(program, lambda: guide())
    assert "projected" in elbo.report()[0].treatment


def test_looks_now_and_then():
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    steps(elbo, 20)
    assert "projected" in steps(elbo, 12, is_linear=True)["w"].treatment


def test_is_the_same_gradient():
    """That of a loss which does not project at all."""
    found = []
    for pre_activations in ("auto", None):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            elbo = RaoBlackwell_ELBO(max_plate_nesting=1, pre_activations=pre_activations)
            losses = []
            for _ in range(30):
                losses.append(elbo.loss_and_grads(model, guide))
            grad = pyro.get_param_store()["loc"].unconstrained().grad.clone()
        found.append((torch.tensor(losses), grad))
    assert all(map(torch.equal, *found))


def test_projection_with_analytic_terms_is_not_paused(watched):
    """R2G2_ELBO has these at sites that are not projected, and so has the scale 0."""
    steps(R2G2_ELBO(), 20)
    steps(RaoBlackwell_ELBO(control_variate_scale=0.0, **SHARED), 20)
    assert len(watched) == 40


def test_losses_do_not_count(watched):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    for _ in range(30):
        elbo.loss(model, guide)
    assert len(watched) == 30
    steps(elbo, 1)
    assert len(watched) == 31


def test_a_rare_use_is_known_at_once():
    pause = Pause()
    for _ in range(NUM_LOOKS):
        pause.note("idle", True, False)
    pause.note("used", False, False)
    assert not pause.is_on
    pause.note("used", True, True)
    for _ in range(NUM_LOOKS):
        assert not pause.is_on
        pause.note("idle", True, False)
    assert pause.is_on


def test_shapes_that_always_change():
    pause = Pause()
    for i in range(MAX_STRUCTURES + 2 * NUM_LOOKS):
        pause.note(i, not pause.is_on, False)
    assert pause.is_on


# -- Enumeration -----------------------------------------------------------------------------


@pytest.fixture
def ready(monkeypatch):
    """The runs that were made ready for enumeration."""
    runs = []

    class Ready(run_mixin.TopK):
        def __init__(self, *args, **kwargs):
            runs.append(len(runs))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_mixin, "TopK", Ready)
    return runs


def test_no_enumeration_where_nothing_is_discrete(ready):
    steps(RaoBlackwell_ELBO(max_plate_nesting=1), 10)
    assert len(ready) == 1


def test_discrete_sites_that_come_later_are_enumerated_at_once(ready):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    steps(elbo, 5)
    assert steps(elbo, 1, has_switch=True)["s"].treatment == "exact"
    assert len(ready) >= 2


def test_discrete_sites_that_come_later_have_the_same_gradient():
    found = []
    for num_before in (0, 4):
        elbo = RaoBlackwell_ELBO(max_plate_nesting=1, control_variate_scale=1.0, pre_activations=None)
        with pyro.get_param_store().scope():
            guide(has_switch=True)
            for _ in range(num_before):
                elbo.loss(model, guide)
            pyro.set_rng_seed(3)
            elbo.loss_and_grads(model, guide, has_switch=True)
            found.append({n: p.grad.clone() for n, p in pyro.get_param_store().named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("infer", [{"enumerate": "parallel"}, {"enumerate": "sequential"}])
def test_sites_that_ask_for_enumeration_come_later(infer):
    def late_guide(has_switch=False):
        guide()
        if has_switch:
            pyro.sample("s", dist.Bernoulli(logits=real("logits", 0.2)), infer=infer)

    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    for has_switch in (False, False, True, True):
        elbo.loss_and_grads(lambda has_switch: model(has_switch=has_switch), late_guide, has_switch)
    assert infer["enumerate"] in {row.site: row for row in elbo.report()}["s"].reason


def test_sites_that_the_model_enumerates_come_later():
    def late_model(has_switch=False):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        f = w.sum()
        if has_switch:
            f = f + pyro.sample("s", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(f, 1.0), obs=torch.tensor(0.0))

    elbo, found = RaoBlackwell_ELBO(max_plate_nesting=0), []
    for has_switch in (False, False, True):
        pyro.set_rng_seed(0)
        found.append(elbo.loss(late_model, lambda has_switch: guide(), has_switch))
    pyro.set_rng_seed(0)
    other = RaoBlackwell_ELBO(max_plate_nesting=0).loss(late_model, lambda has_switch: guide(), True)
    assert found[0] == found[1] != found[2] == other
