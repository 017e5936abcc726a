# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators with less variance for stochastic variational inference in Pyro."""

from typing import Any

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
    "CompiledSVI",
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
    "compile",
    "measure_noise",
]


def __getattr__(name: str) -> Any:
    # What needs much of PyTorch is imported when it is asked for.
    if name in ("CompiledSVI", "compile"):
        import pyro_rb.compiled

        return getattr(pyro_rb.compiled, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
