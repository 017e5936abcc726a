# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A replayed step is the eager step, bit by bit: loss, parameters, random numbers."""

import pytest
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from pyro_rb import (
    R2G2_ELBO,
    DReG_ELBO,
    RaoBlackwell_ELBO,
    RaoBlackwellTopK_ELBO,
    STLTrace_ELBO,
)
from tests.compiled import models
from tests.compiled.training import assert_replayed

pytestmark = pytest.mark.slow

LOSSES = {
    "trace": Trace_ELBO,
    "looped": lambda: Trace_ELBO(num_particles=2),
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
    "enum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "graph": TraceGraph_ELBO,
    "renyi": lambda: RenyiELBO(num_particles=2),
    "stl": lambda: STLTrace_ELBO(control_variate_scale=1.0),
    "half": lambda: STLTrace_ELBO(control_variate_scale=0.5),
    "adaptive": STLTrace_ELBO,
    "topk": RaoBlackwellTopK_ELBO,
    "r2g2": R2G2_ELBO,
    "mixed": RaoBlackwell_ELBO,
    "dreg": lambda: DReG_ELBO(num_particles=2),
}
CASES = [
    *[("schools", name) for name in LOSSES],
    *[("conjugate", name) for name in ("trace", "mean field", "stl", "half", "vectorized")],
    *[("minibatch", name) for name in ("trace", "stl", "vectorized")],
    *[("mixture", name) for name in ("trace", "topk", "mixed", "graph")],
    *[("enumerated", name) for name in ("enum",)],
    *[("logistic", name) for name in ("trace", "r2g2", "mixed")],
    *[("module", name) for name in ("trace", "stl")],
    *[("autoencoder", name) for name in ("trace", "stl", "mean field")],
    *[("schools_joint", name) for name in ("trace", "stl")],
    ("schools_low_rank", "trace"),
    ("schools_map", "trace"),
]


@pytest.mark.parametrize("model, name", CASES)
def test_equal_bit_by_bit(model, name):
    # The scales of adaptive losses are learned eagerly at the first 50 steps.
    num_steps = 70 if name in ("adaptive", "mixed") else 13
    # In the logistic regression all is projected, and nothing is learned.
    learns = name in ("adaptive", "mixed") and model != "logistic"
    loss = assert_replayed(LOSSES[name], getattr(models, model), num_steps, 2 if learns else 1)
    assert loss.report()[-1].treatment == "replayed"
