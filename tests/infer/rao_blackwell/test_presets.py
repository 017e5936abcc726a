# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""With one kind of treatment only, the loss is the one that is named after it, at the same seed."""

import pytest
import torch

from pyro_rb import (
    R2G2_ELBO,
    RaoBlackwell_ELBO,
    RaoBlackwellTopK_ELBO,
    STLTrace_ELBO,
)
from tests.infer.r2g2.models import KINDS, net, regression
from tests.infer.topk import models as topk_models
from tests.support.elbo_contract import ENTRANCES, assert_same, evaluate
from tests.support.guides import GUIDES

pytestmark = pytest.mark.slow

# Guides with discrete or score-function sites, that run the model themselves, or whose draws a flow makes.
OTHERS = (
    "discrete_first",
    "discrete_last",
    "gamma_partly_reparameterized",
    "gamma_partly_reparameterized",
    "gamma_score_function",
    "normal_score_function",
    "AutoGaussian_funsor",
    "AutoGuideList_discrete",
    "AutoHierarchicalNormalMessenger",
    "AutoIAFNormal",
    "AutoNormalizingFlow_block",
    "AutoNormalizingFlow_planar",
    "AutoNormalMessenger",
    "AutoRegressiveMessenger",
)
CONTINUOUS = [name for name in GUIDES if name not in OTHERS]
DISCRETE = [*topk_models.ENUMERABLE, "subsampled_scaled_masked"]
SLOTS = (
    {"k": 1},
    {"k": 2, "num_samples": 2},
    {"k": 0, "num_samples": 2},
    {"baseline": None},
    {"budget": 2, "baseline": "reinforce+"},
)
PARTICLES = ({"num_particles": 2}, {"num_particles": 3, "vectorize_particles": True})


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def assert_identical(ours, theirs, case, num_steps=2):
    """Bit for bit, by both entrances in turn; over several steps for what is learned."""
    for seed in range(num_steps):
        actual, expected = (evaluate(elbo, case, ENTRANCES[seed % 2], seed) for elbo in (ours, theirs))
        assert actual[0] == expected[0]
        assert actual[1].keys() == expected[1].keys()
        for name, grad in expected[1].items():
            assert grad is None and actual[1][name] is None or torch.equal(actual[1][name], grad), name


@pytest.mark.parametrize("scale", [1.0, 0.3, "adaptive"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_sites_without_projection(name, scale):
    options = {"control_variate_scale": scale, "max_plate_nesting": 2}
    ours, theirs = RaoBlackwell_ELBO(pre_activations=None, **options), STLTrace_ELBO(**options)
    assert_identical(ours, theirs, GUIDES[name](), 6 if scale == "adaptive" else 2)


@pytest.mark.parametrize("particles", PARTICLES, ids=["looped", "vectorized"])
@pytest.mark.parametrize("name", ["hierarchical", "subsample_scale_mask", "AutoNormal"])
def test_continuous_sites_with_particles(name, particles):
    options = {"control_variate_scale": "adaptive", "max_plate_nesting": 2, **particles}
    ours, theirs = RaoBlackwell_ELBO(pre_activations=None, **options), STLTrace_ELBO(**options)
    assert_identical(ours, theirs, GUIDES[name](), 6)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_sites(name):
    case = topk_models.ALL[name]()
    for options in (*SLOTS, *PARTICLES):
        options = {"budget": 3, "max_plate_nesting": 2, **options}
        if "k" in options:
            del options["budget"]
        assert_identical(RaoBlackwell_ELBO(**options), RaoBlackwellTopK_ELBO(**options), case)


@pytest.mark.parametrize("make", [*(lambda kind=kind: regression(kind) for kind in KINDS), net], ids=[*KINDS, "net"])
@pytest.mark.parametrize("solver", ["auto", "cholesky", "qr"])
def test_projection_without_path_gradients(make, solver):
    """To rounding: the analytic terms may be added up in another order."""
    case, options = make(), {"pre_activations": "shared", "solver": solver, "max_plate_nesting": 1}
    ours, theirs = RaoBlackwell_ELBO(control_variate_scale=0.0, **options), R2G2_ELBO(**options)
    for seed in range(4):
        actual, expected = (evaluate(elbo, case, ENTRANCES[seed % 2], seed) for elbo in (ours, theirs))
        assert_same(actual, expected, rtol=1e-8, atol=1e-8)
    assert any("projected" in row.treatment for row in ours.report())
