# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The exact gradients that the other tests compare with."""

from contextlib import nullcontext
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing import fakes
from torch.distributions import kl_divergence

from tests.infer.rao_blackwell.models import PROBLEMS, gradient
from tests.infer.rao_blackwell.quadrature import exact_loss
from tests.infer.rao_blackwell.structures import STRUCTURES
from tests.support.cases import Case, positive
from tests.support.elbo_contract import assert_same
from tests.support.models import conj, two


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("make, sizes", [(conj, {"z": 4}), (two, {"z1": 5, "z2": 5})], ids=["conj", "two"])
def test_closed_forms(make, sizes):
    case = make()
    assert_same(gradient(lambda: exact_loss(case, 1, sizes), case), case.exact_gradient())


def test_gamma_without_reparameterization():
    def guide():
        pyro.sample("g", fakes.NonreparameterizedGamma(positive("a", 2.5), positive("rate", 1.5)))

    case = Case(lambda: pyro.sample("g", dist.Gamma(3.0, 2.0)), guide)

    def closed_form():
        return kl_divergence(dist.Gamma(pyro.param("a"), pyro.param("rate")), dist.Gamma(3.0, 2.0))

    case.exact_loss = closed_form
    assert_same(gradient(lambda: exact_loss(case, 0, {"g": 300}), case), case.exact_gradient(), atol=1e-7)


@pytest.mark.parametrize("num_values", [2, 3])
def test_discrete_vector_is_a_plate(num_values):
    """Sites that are summed as a whole, and each on its own."""

    def draw(logits, is_vector):
        fn = dist.Categorical(logits=logits) if num_values > 2 else dist.Bernoulli(logits=logits[:, 0])
        with nullcontext() if is_vector else pyro.plate("bits", 2):
            pyro.sample("b", fn.to_event(1) if is_vector else fn)

    def guide(is_vector):
        logits = pyro.param("logits", lambda: torch.randn(2, num_values))
        draw(logits, is_vector)

    grads = []
    for is_vector in (True, False):
        case = Case(lambda is_vector: draw(torch.zeros(2, num_values), is_vector), guide, (is_vector,))
        grads.append(gradient(lambda: exact_loss(case, 1, {"b": 0} if is_vector else {}), case))
    assert_same(*grads)


@pytest.mark.parametrize("name", [*PROBLEMS, *STRUCTURES])
def test_more_nodes_change_nothing(name):
    problem = {**PROBLEMS, **STRUCTURES}[name]
    finer = replace(problem, rules={site: int(1.5 * size) for site, size in problem.rules.items()})
    assert_same(finer.exact, problem.exact, atol=1e-6, rtol=1e-6)
