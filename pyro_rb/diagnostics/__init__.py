# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.diagnostics.bias import BiasError, LowPowerError
from pyro_rb.diagnostics.bias_check import BiasCheck
from pyro_rb.diagnostics.blame import BadNumber
from pyro_rb.diagnostics.choose import choose_losses
from pyro_rb.diagnostics.compare import ComparisonInterrupted, compare
from pyro_rb.diagnostics.gradients import gradient_moments, sample_gradients
from pyro_rb.diagnostics.guard import BadStep, GradientGuard, NonFiniteError
from pyro_rb.diagnostics.noise import NoiseEstimate, measure_noise
from pyro_rb.diagnostics.parameters import find_parameters
from pyro_rb.diagnostics.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.state import preserve_state
from pyro_rb.diagnostics.stopping import StopRule
from pyro_rb.diagnostics.unbiased import check_unbiased

__all__ = [
    "BadNumber",
    "BadStep",
    "BiasCheck",
    "BiasError",
    "Comparison",
    "ComparisonInterrupted",
    "GradientGuard",
    "LossResult",
    "LowPowerError",
    "NoiseEstimate",
    "NonFiniteError",
    "StateResult",
    "StopRule",
    "check_unbiased",
    "choose_losses",
    "compare",
    "find_parameters",
    "gradient_moments",
    "measure_noise",
    "preserve_state",
    "sample_gradients",
]
