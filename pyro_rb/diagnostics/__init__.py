# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.diagnostics.choose import choose_losses
from pyro_rb.diagnostics.compare import ComparisonInterrupted, compare
from pyro_rb.diagnostics.gradients import (
    gradient_moments,
    sample_gradients,
)
from pyro_rb.diagnostics.parameters import find_parameters
from pyro_rb.diagnostics.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.state import preserve_state

__all__ = [
    "Comparison",
    "ComparisonInterrupted",
    "LossResult",
    "StateResult",
    "choose_losses",
    "compare",
    "find_parameters",
    "gradient_moments",
    "preserve_state",
    "sample_gradients",
]
