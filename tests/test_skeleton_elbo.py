# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The skeleton for a new estimator passes the contract, and its one change can be seen."""

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from skeleton_elbo import LeaveOneOut_ELBO, guide, model

from pyro_rb.diagnostics import gradient_moments
from tests.support.elbo_contract import ELBOContract

pytestmark = pytest.mark.slow


class TestLeaveOneOutELBO(ELBOContract):
    # A loss of the package takes them all.
    cases = ("discrete_first", "mix", "auto_normal")

    def make_elbo(self, **kwargs: Any) -> LeaveOneOut_ELBO:
        return LeaveOneOut_ELBO(**kwargs)


@pytest.mark.parametrize("vectorize", [False, True])
def test_less_variance(vectorize):
    x = torch.randn(50) + 1.0
    particles = {"num_particles": 4, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    with_baseline, without = (
        gradient_moments(cls(**particles), model, guide, (x,), num_samples=100)["logits"].variance.sum()
        for cls in (LeaveOneOut_ELBO, Trace_ELBO)
    )
    assert with_baseline < 0.5 * without


def test_one_particle_is_trace_elbo():
    x = torch.randn(50)
    grads = []
    for loss in (LeaveOneOut_ELBO(), Trace_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss.loss_and_grads(model, guide, x)
        grads.append(pyro.param("logits").grad)
    assert torch.equal(*grads)
