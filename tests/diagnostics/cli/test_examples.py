# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.cli import examples as models
from pyro_rb.diagnostics.cli.examples import EXAMPLES

pytestmark = pytest.mark.slow


def test_data_are_the_published_ones():
    assert len(models.EIGHT_SCHOOLS_EFFECTS) == len(models.EIGHT_SCHOOLS_ERRORS) == 8
    # The pooled estimate is 7.7 (Gelman et al., Bayesian Data Analysis, section 5.5).
    effects, errors = map(torch.tensor, (models.EIGHT_SCHOOLS_EFFECTS, models.EIGHT_SCHOOLS_ERRORS))
    pooled = (effects / errors**2).sum() / (1 / errors**2).sum()
    assert pooled.item() == pytest.approx(7.7, abs=0.05)
    # The grand average of the 18 players is .265 (Efron and Morris 1975, table 1).
    average = sum(models.BASEBALL_HITS) / 18 / models.BASEBALL_AT_BATS
    assert average == pytest.approx(0.265, abs=5e-4)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_models_have_finite_density(example):
    trace = poutine.trace(example.model).get_trace(*example.make_args())
    assert trace.log_prob_sum().isfinite()
    assert [name for name in trace.observation_nodes] != []


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_training_fits(example):
    """The learning rate and number of steps bring the loss to its floor."""
    result = compare(
        example.model,
        AutoNormal(example.model),
        [],
        args=example.make_args(),
        num_samples=40,
        num_burn_in=0,
        train_steps=(0, example.train_steps, 5 * example.train_steps // 4),
        optim=pyro.optim.Adam({"lr": example.learning_rate}),
        progress=False,
    )
    first, fitted, further = (state.losses[0] for state in result.states)
    assert fitted.loss < first.loss - 10
    assert abs(fitted.loss - further.loss) < 0.5 + 4 * (fitted.loss_error + further.loss_error)
