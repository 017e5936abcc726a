# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators with less variance for stochastic variational inference in Pyro."""

from pyro_rb.diagnostics import (
    Comparison,
    GradientGuard,
    NonFiniteError,
    StopRule,
    check_unbiased,
    compare,
    compare_guides,
    measure_noise,
)
from pyro_rb.infer import (
    R2G2_ELBO,
    DReG_ELBO,
    RaoBlackwell_ELBO,
    RaoBlackwellTopK_ELBO,
    RejectionSamplingError,
    RVRSGuide,
    STLTrace_ELBO,
)

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DReG_ELBO",
    "GradientGuard",
    "NonFiniteError",
    "R2G2_ELBO",
    "RaoBlackwell_ELBO",
    "RaoBlackwellTopK_ELBO",
    "RejectionSamplingError",
    "RVRSGuide",
    "STLTrace_ELBO",
    "StopRule",
    "check_unbiased",
    "compare",
    "compare_guides",
    "measure_noise",
]
