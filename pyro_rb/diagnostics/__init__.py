# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro_rb.diagnostics.show  # noqa: F401
from pyro_rb.diagnostics.check.unbiased import BiasCheck, check_unbiased
from pyro_rb.diagnostics.compare.candidates import choose_losses
from pyro_rb.diagnostics.compare.compare import compare
from pyro_rb.diagnostics.compare.compiled import CompiledTime
from pyro_rb.diagnostics.compare.guides import (
    GuideComparison,
    GuideResult,
    compare_guides,
)
from pyro_rb.diagnostics.compare.race import Curve, Race
from pyro_rb.diagnostics.compare.recommend import Ranked, Recommendation
from pyro_rb.diagnostics.compare.report import (
    Comparison,
    ComparisonInterrupted,
    LossResult,
    StateResult,
    TrainingWindow,
)
from pyro_rb.diagnostics.guard.bad_number import BadNumber
from pyro_rb.diagnostics.guard.guard import BadStep, GradientGuard, NonFiniteError
from pyro_rb.diagnostics.noise.noise import NoiseEstimate, measure_noise
from pyro_rb.diagnostics.run.gradients import gradient_moments, sample_gradients
from pyro_rb.diagnostics.run.parameters import find_parameters
from pyro_rb.diagnostics.run.state import preserve_state
from pyro_rb.diagnostics.stats.bias import BiasError, LowPowerError
from pyro_rb.diagnostics.stats.stopping import StopRule

__all__ = [
    "BadNumber",
    "BadStep",
    "BiasCheck",
    "BiasError",
    "Comparison",
    "ComparisonInterrupted",
    "CompiledTime",
    "Curve",
    "GradientGuard",
    "GuideComparison",
    "GuideResult",
    "LossResult",
    "LowPowerError",
    "NoiseEstimate",
    "NonFiniteError",
    "Race",
    "Ranked",
    "Recommendation",
    "StateResult",
    "StopRule",
    "TrainingWindow",
    "check_unbiased",
    "choose_losses",
    "compare",
    "compare_guides",
    "find_parameters",
    "gradient_moments",
    "measure_noise",
    "preserve_state",
    "sample_gradients",
]
