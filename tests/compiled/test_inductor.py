# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Compiled by Inductor, steps have the draws of the eager loss, and its results but for rounding.
One small model, as compiling takes seconds.
"""

import shutil

import pyro
import pytest
import torch
from pyro.infer import SVI

import pyro_rb
from pyro_rb import CompiledSVI, STLTrace_ELBO
from tests.compiled import models

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_steps_are_those_of_svi():
    def run(kind, loss, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = models.minibatch()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, **options)
        losses = [svi.step(*args(0)) for _ in range(70)]
        store = {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}
        return losses, store, torch.get_rng_state(), svi

    expected = run(SVI, STLTrace_ELBO())
    loss = pyro_rb.compile(STLTrace_ELBO(), background=False)
    actual = run(CompiledSVI, loss)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(actual[2], expected[2])
    assert loss.report()[-1].treatment == "compiled"
    assert actual[3]._steps and not actual[3]._why_loop


def test_without_a_compiler(monkeypatch):
    """The graph is replayed."""

    def fail(*args):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("pyro_rb.compiled.background.compile_graph", fail)
    model, guide, args = models.conjugate()
    loss = pyro_rb.compile(STLTrace_ELBO(control_variate_scale=1.0), background=False)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    with pytest.warns(UserWarning, match="replayed: Inductor failed: .*no C\\+\\+ compiler") as caught:
        svi.run(10, *args(0), progress_bar=False)
    assert len(caught) == 1
    assert loss.report()[-1].treatment == "replayed"
