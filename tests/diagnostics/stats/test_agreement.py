# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.stats.bias import Draws, judge
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.mean_test import z_threshold
from pyro_rb.diagnostics.stats.projections import Projector
from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.diagnostics.compare.test_candidates import positions

# Without training, which takes its time.
compare = functools.partial(compare, train_steps=0)

PARAMETERS = {"big": torch.zeros(30), "scalar": torch.zeros(()), "pair": torch.zeros(2)}
COORDINATES = Coordinates(list(PARAMETERS), list(PARAMETERS.values()))


def fill(draws, reference=None):
    """Projections of ``draws`` ``[N, 33]`` and of the reference's."""
    projector = Projector(COORDINATES)
    found = []
    for rows in (draws, torch.zeros_like(draws) if reference is None else reference):
        found.append(Draws(COORDINATES, projector))
        for row in rows:
            found[-1].add(row)
    return found


def test_projector():
    projector = Projector(COORDINATES)
    assert [projector.label(number) for number in range(len(projector))] == ["big"] * 4 + ["scalar"] + ["pair"] * 2
    assert projector.widths.tolist() == pytest.approx([30**0.5] * 4 + [1.0] * 3)
    vector = torch.arange(33.0)
    projected = projector(vector)
    assert projected[4:].tolist() == [30.0, 31.0, 32.0]  # few coordinates stay as they are
    torch.testing.assert_close(projector(2 * vector), 2 * projected)
    # Directions of length one.
    basis = torch.stack([projector(row) for row in torch.eye(33)])
    torch.testing.assert_close(basis[:30, :4].norm(dim=0), torch.ones(4, dtype=torch.double, device="cpu"))


def test_bias_is_found_and_named():
    draws = torch.randn(200, 33)
    mine, reference = fill(draws)
    assert judge(mine, reference, torch.zeros(33), 4.5, 1.0).z < 4.5
    mine, reference = fill(draws + torch.cat([torch.zeros(31), torch.tensor([0.8, 0.0])]))
    verdict = judge(mine, reference, torch.zeros(33), 4.5, 1.0)
    assert verdict.z > 4.5 and verdict.at == "pair"
    assert verdict.difference == pytest.approx(0.8, abs=0.25)
    mine, reference = fill(draws + 0.8 * (torch.arange(33) < 30))
    assert judge(mine, reference, torch.zeros(33), 4.5, 1.0).at == "big"


def test_false_alarms_are_rare():
    """Draws of a concentrated discrete site: most categories never occur."""
    probs = torch.softmax(torch.arange(33.0) * -0.5, -1)
    alarms = 0
    for seed in range(50):
        torch.manual_seed(seed)
        drawn = torch.multinomial(probs, 300, replacement=True)
        draws = torch.nn.functional.one_hot(drawn, 33).float()
        mine, reference = fill(draws)
        alarms += judge(mine, reference, probs, 4.5, 1.0).z > 4.5
    assert alarms == 0


@pytest.mark.parametrize("is_projected", [False, True])
def test_skewed_differences_are_no_bias(is_projected):
    """Of a scale, the score is the square of a normal variable: plain z-scores fail most often."""
    names, tensors = ["scale"], [torch.zeros(1000)]
    if is_projected:
        names, tensors = [f"scale{i}" for i in range(250)], [torch.zeros(4)] * 250
    coordinates = Coordinates(names, tensors)
    alarms = plain = 0
    threshold = z_threshold(1e-2, 1000, 60)
    for seed in range(40):
        torch.manual_seed(seed)
        draws = torch.randn(60, 1000).square() - 1
        zero = torch.zeros(1000)
        mine, reference = (
            Draws(coordinates, Projector(coordinates) if is_projected else None) for _ in range(2)
        )
        for row in draws:
            mine.add(row)
            reference.add(zero)
        alarms += judge(mine, reference, None, threshold, 1.0).z > threshold
        plain += (draws.mean(0) / draws.std(0)).abs().max() * 60**0.5 > threshold
    assert plain > 20 and alarms <= 4, (plain, alarms)


def test_rare_events_tell_nothing():
    """One in 2000 draws decides the mean; in 300 draws it did not occur."""
    draws = torch.zeros(300, 33)
    exact = torch.full((33,), 0.01)
    mine, reference = fill(draws)
    verdict = judge(mine, reference, exact, 4.5, 1.0)
    assert verdict.z == 0 and verdict.detectable == math.inf
    draws[7] = 3.0  # once
    mine, reference = fill(draws)
    assert judge(mine, reference, torch.zeros(33), 4.5, 1.0).detectable == math.inf


def test_exact_draws():
    exact = torch.randn(33)
    mine, reference = fill(exact.expand(20, 33))
    verdict = judge(mine, reference, exact.double(), 4.5, 1.0)
    assert verdict.z == 0 and verdict.detectable < 1e-3


def test_pairs():
    common = 10 * torch.randn(200, 33)
    shift = torch.randn(200, 33)
    mine, reference = fill(common + shift + 0.7, common)
    verdict = judge(mine, reference, None, 4.5, 1.0)
    assert verdict.z > 4.5  # seen although the common part is ten times as noisy
    mine, reference = fill(common + shift, common)
    assert judge(mine, reference, None, 4.5, 1.0).z < 4.5


class ShiftedTopK(RaoBlackwellTopK_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        pyro.param("logits").unconstrained().grad.add_(torch.linspace(-6.0, 6.0, 12))
        return loss


def test_comparison_with_the_exact_gradient():
    model, guide = positions(12)
    losses = {"top-k": RaoBlackwellTopK_ELBO(k=3), "enum": "TraceEnum_ELBO+config_enumerate", "bad": ShiftedTopK(k=3)}
    result = compare(model, guide, losses, num_samples=60, num_burn_in=0, progress=False)
    assert result.settings["reference_gradient"] == "the exact gradient, by enumeration"
    rows = {row.name: row for row in result.states[0].losses}
    assert rows["Trace_ELBO"].bias_z < rows["Trace_ELBO"].bias_threshold and not rows["Trace_ELBO"].biased
    assert not rows["top-k"].biased and rows["top-k"].detectable_bias < rows["Trace_ELBO"].detectable_bias
    assert rows["enum"].bias_z == 0 and rows["enum"].variance_ratio < 1e-6
    assert rows["bad"].biased and rows["bad"].bias_at == "logits"
    assert result.recommendation.loss != "bad"


def test_reference_that_disagrees_with_enumeration():
    class Wrong(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            loss = super().loss_and_grads(*args, **kwargs)
            pyro.param("logits").unconstrained().grad.add_(torch.linspace(-20.0, 20.0, 12))
            return loss

    model, guide = positions(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro.infer.WrongTrace_ELBO", Wrong, raising=False)
        result = compare(
            model, guide, ["Trace_ELBO"], reference="WrongTrace_ELBO", num_samples=60, num_burn_in=0, progress=False
        )
    assert result.notes[0].startswith("WrongTrace_ELBO disagrees with enumeration at step 0")
    assert result.settings["reference_gradient"] == "WrongTrace_ELBO, with the same random numbers"
    assert result.states[0].losses[1].biased  # what is right differs from it


def test_no_exact_gradient_with_subsampling():
    def model():
        with pyro.plate("data", 6, subsample_size=2) as i:
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(z.float(), 0.5), obs=torch.linspace(-1.0, 1.0, 6)[i])

    def guide():
        logits = pyro.param("logits", torch.zeros(6, 3))
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("z", dist.Categorical(logits=logits[i]))

    result = compare(model, guide, [], num_samples=20, num_burn_in=0, progress=False)
    assert result.settings["reference_gradient"] == "Trace_ELBO, with the same random numbers"
