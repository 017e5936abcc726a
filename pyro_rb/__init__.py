# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators with less variance for stochastic variational inference in Pyro."""

from pyro_rb.diagnostics import Comparison, compare
from pyro_rb.infer import R2G2_ELBO, DReG_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DReG_ELBO",
    "R2G2_ELBO",
    "RaoBlackwellTopK_ELBO",
    "STLTrace_ELBO",
    "compare",
]
