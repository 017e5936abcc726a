# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
``pre_activations="auto"``: noise of its own for each row of a layer, only where no row has to do
with another.

Units are replicates here: ``f = F.linear(x, w)`` has a column for each of many units, which the
likelihoods look at one by one, so that one call gives as many independent gradients.
"""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO
from pyro_rb.diagnostics.stats.bias import BiasError
from tests.infer.rao_blackwell.models import Problem, fixed, parameter, positive
from tests.support.cases import Case
from tests.support.common import assert_unbiased

pytestmark = pytest.mark.slow

NUM_ROWS, NUM_INPUTS, NUM_UNITS = 8, 3, 16000
Y = fixed(NUM_ROWS, seed=2)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def observe(f, name="y", plate="rows", noise=0.5):
    """Numbers of shape ``[rows, *rest, units]``, of which the rows are in a plate."""
    y = Y.to(f)[: f.shape[0]].reshape((-1,) + (1,) * (f.dim() - 1)).expand(f.shape)
    with pyro.plate(plate, len(f)):
        pyro.sample(name, dist.Normal(f, noise).to_event(f.dim() - 1), obs=y)


def fold(h, size=2):
    """``[rows, units]`` to ``[rows / size, size, units]``."""
    return h.reshape(-1, size, h.shape[-1])


def contrastive(h):
    scores = (h.unsqueeze(1) * h).log_softmax(1)  # [rows, rows, units]
    with pyro.plate("rows", len(h)):
        pyro.factor("contrast", scores.diagonal().sum(0))


def attention(h):
    weights = (h.unsqueeze(1) * h).softmax(1)
    observe(torch.einsum("ijr,jr->ir", weights, h))


def penalty(h):
    observe(h.tanh())
    pyro.factor("penalty", -3.0 * h.mean(0).square().sum())


def two_plates(h):
    observe(h)
    observe(fold(h).sum(1), "z", "groups")


def group_normalized(h):
    f = fold(h, 4)
    observe((f - f.mean(1, keepdim=True)).reshape(h.shape))


COUPLED = {
    "batch_norm": lambda h: observe(F.batch_norm(h, None, None, training=True)),
    "batch_norm_behind": lambda h: observe(F.batch_norm(h.relu(), None, None, training=True), noise=0.3),
    "groups_are_normalized": group_normalized,
    "contrastive": contrastive,
    "attention": attention,
    "softmax_over_rows": lambda h: observe(NUM_ROWS * h.softmax(0)),
    "sequences_folded_in_rows": lambda h: observe(fold(h).cumsum(1)),
    "time_steps_first": lambda h: observe(h.reshape(2, -1, h.shape[-1]).cumsum(0).movedim(0, 1)),
    "pairs_folded_in_rows": lambda h: observe((fold(h)[:, 0] - fold(h)[:, 1]).abs()),
    "ensemble": lambda h: observe(h.reshape(2, -1, h.shape[-1]).tanh().mean(0)),
    "factor_over_rows": penalty,
    "two_plates": two_plates,
    "neighbours": lambda h: observe(h + h.roll(1, 0).tanh()),
    "largest_row": lambda h: observe(h.amax(0, keepdim=True)),
    "sometimes": lambda h: observe(h + 3.0 * (h.mean(0) - 0.5).relu()),
    # No derivative tells of these.
    "detached_mean": lambda h: observe(h - h.mean(0).detach()),
    "gate_by_mean": lambda h: observe(h * (h.mean(0) > 0)),
    "gate_by_rank": lambda h: observe(h * (h.argsort(0).argsort(0) > 5)),
}
APART = {
    "identity": observe,
    "tanh": lambda h: observe(h.tanh()),
    "event": lambda h: observe(h.unsqueeze(1).expand(-1, 2, -1) * torch.tensor([[1.0], [2.0]])),
    "two_sites": lambda h: (observe(h), observe(h.tanh(), "z", "again")),
    "flipped": lambda h: observe(h.flip(0)),
    "half": lambda h: observe(h[: NUM_ROWS // 2]),
    "shown_twice": lambda h: observe(h[[0, 0, 1, 1, 2, 3, 4, 5]]),
}


def layer(likelihood):
    """A function of the number of units."""
    x = fixed(NUM_ROWS, NUM_INPUTS, seed=1)

    def make(num):
        def model(num):
            w = pyro.sample("w", dist.Normal(torch.zeros(num, NUM_INPUTS), 1.0).to_event(2))
            likelihood(F.linear(x, w))

        def guide(num):
            loc = parameter(num, "loc", 0.5 * fixed(NUM_INPUTS, seed=3))
            scale = positive(num, "scale", 0.7 * torch.ones(NUM_INPUTS))
            pyro.sample("w", dist.Normal(loc, scale).to_event(2))

        return Case(model, guide, (num,))

    return Problem(make, 1, num=NUM_UNITS)


def check(problem, elbo, num_burn_in=0):
    rows = problem.draw(elbo, num_burn_in)
    expected = problem.draw(Trace_ELBO())
    assert_unbiased(rows, independent=expected, detect=0.5, projections=20)


def treatment(elbo):
    return next(row.treatment for row in elbo.report() if row.site == "w")


@pytest.mark.parametrize("num_burn_in", [0, 3], ids=["first", "fourth"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_rows_share_their_noise(name, num_burn_in):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    check(layer(COUPLED[name]), elbo, num_burn_in)
    assert "local" not in treatment(elbo)


@pytest.mark.parametrize("name", COUPLED)
def test_own_noise_would_be_wrong(name):
    """And the test above would see it."""
    with pytest.raises(BiasError):
        check(layer(COUPLED[name]), R2G2_ELBO(pre_activations="local", max_plate_nesting=1))


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_apart(name):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    check(layer(APART[name]), elbo, num_burn_in=3)
    if name not in ("flipped", "half", "shown_twice"):  # whose rows are not those of the plate
        assert treatment(elbo).startswith("local")


@pytest.mark.parametrize("mode", ["shared", None])
def test_nothing_is_local_unless_asked_for(mode):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1, pre_activations=mode)
    check(layer(observe), elbo)
    assert "local" not in treatment(elbo)


# -- What changes on the way -----------------------------------------------------------------


def test_training_mode_changes():
    """BatchNorm couples rows in training only."""
    norm = nn.BatchNorm1d(NUM_UNITS, affine=False, momentum=0.0)
    problem, elbo = layer(lambda h: observe(norm(h))), RaoBlackwell_ELBO(max_plate_nesting=1)
    for _ in range(2):
        norm.eval()
        check(problem, elbo, num_burn_in=3)
        assert treatment(elbo).startswith("local")
        norm.train()
        check(problem, elbo)
        assert "local" not in treatment(elbo)


def test_number_of_rows_changes():
    """A likelihood that couples rows where there are many only."""
    elbo, data = RaoBlackwell_ELBO(max_plate_nesting=1), {}

    def make(num):
        def model(num):
            w = pyro.sample("w", dist.Normal(torch.zeros(num, NUM_INPUTS), 1.0).to_event(2))
            h = F.linear(data["x"], w)
            observe(h if len(h) < 6 else h - h.mean(0))

        return Case(model, layer(observe).make(num).guide, (num,))

    problem = Problem(make, 1, num=NUM_UNITS)
    for num_rows, is_local in ((4, True), (8, False), (5, True)):
        data["x"] = fixed(num_rows, NUM_INPUTS, seed=num_rows)
        check(problem, elbo, num_burn_in=2)
        assert treatment(elbo).startswith("local") is is_local


def test_coupling_begins_later():
    """It is looked at now and then, though nothing seems to change."""
    strength = torch.zeros(())
    problem = replace(layer(lambda h: observe(h - strength * h.mean(0))), num=20)
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    problem.draw(elbo, num_burn_in=3)
    assert treatment(elbo).startswith("local")
    strength.fill_(1.0)
    problem.draw(elbo, num_burn_in=300)
    assert "local" not in treatment(elbo)


# -- Networks ----------------------------------------------------------------------------------


def network(likelihood, norm=None):
    """Two layers of 6 units and 1; ``likelihood(logits, x, y)`` is in the model."""
    x, y = fixed(NUM_ROWS, 4, seed=5), (fixed(NUM_ROWS, seed=6) > 0).double()
    shapes = {"w1": (6, 4), "b1": (6,), "w2": (1, 6)}

    def model():
        w1, b1, w2 = (
            pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
            for name, shape in shapes.items()
        )
        h = F.linear(x, w1, b1)
        likelihood(F.linear(torch.tanh(h if norm is None else norm(h)), w2).squeeze(-1), y)

    def guide():
        for seed, (name, shape) in enumerate(shapes.items()):
            loc = pyro.param(f"{name}_loc", 0.5 * fixed(*shape, seed=seed))
            scale = pyro.param(f"{name}_scale", torch.full(shape, 0.3), constraint=dist.constraints.positive)
            pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))

    return Case(model, guide)


def observed(f, y):
    with pyro.plate("rows", len(f)):
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


def scaled_and_masked(f, y):
    with poutine.scale(scale=torch.rand(len(y))), poutine.mask(mask=y > 0):
        observed(f, y)


def row_factors(f, y):
    with pyro.plate("rows", len(f)):
        pyro.factor("y", -(f - y).square())


@pytest.mark.parametrize(
    "case",
    [
        lambda: network(observed),
        lambda: network(scaled_and_masked),
        lambda: network(row_factors),
        lambda: network(observed, norm=nn.LayerNorm(6)),
        lambda: network(observed, norm=nn.Dropout(0.3)),
        lambda: network(observed, norm=nn.BatchNorm1d(6).eval()),
    ],
    ids=["plain", "scale and mask", "factors", "LayerNorm", "dropout", "BatchNorm in evaluation"],
)
def test_plain_networks_are_local(case):
    case, elbo = case(), RaoBlackwell_ELBO(max_plate_nesting=1)
    for _ in range(4):
        elbo.loss_and_grads(case.model, case.guide)
    assert {row.treatment.split()[0] for row in elbo.report()} == {"local"}, str(elbo.report())


def test_layer_behind_batch_norm_is_local():
    case, elbo = network(observed, norm=nn.BatchNorm1d(6)), RaoBlackwell_ELBO(max_plate_nesting=1)
    for _ in range(4):
        elbo.loss_and_grads(case.model, case.guide)
    rows = {row.site: row.treatment for row in elbo.report()}
    assert rows["w2"].startswith("local") and "local" not in rows["w1"] + rows["b1"]
