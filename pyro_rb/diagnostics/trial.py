# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""One evaluation of a loss, to see whether it can run."""

import math
import warnings
from typing import Any, Callable, Optional, Tuple

from pyro.util import set_rng_seed

from pyro_rb.diagnostics.measure import one_line
from pyro_rb.diagnostics.state import preserve_state


def evaluate(
    loss: Any, callables: Tuple, sampler: Callable, unless: str = ""
) -> Optional[str]:
    """
    Evaluates a loss once, and leaves no trace.

    :param tuple callables: Model and guide.
    :param callable sampler: Makes a GradientSampler from a loss.
    :param str unless: Words of a warning that counts as an error.
    :returns: The error or that warning, in words; None if all is well.
    """
    with preserve_state(*callables), warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        set_rng_seed(0)
        one = sampler(loss)
        try:
            value = one.step()
        except Exception as error:
            return one_line(error)
        finally:
            one.clear()
    if not math.isfinite(value):
        return f"its value is {value}"
    found = [one_line(item.message) for item in log if unless in str(item.message)]
    return found[0] if unless and found else None


def is_treated(loss: Any, *treatments: str) -> bool:
    """Whether the loss reports one of the treatments at any site, after an evaluation."""
    return any(row.treatment.startswith(treatments) for row in loss.report())
