# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import numbers
import warnings
from typing import Any

ADAPTATIONS = ("Z_target", "fixed")

#: The default of epsilon, as a share of Z_target. About as large a share of the accepted
#: draws owes itself to epsilon alone, and costs up to a few nats times that share.
EPSILON = 1e-3


def check_count(name: str, value: Any, least: int) -> None:
    """
    :raises ValueError: unless ``value`` is an int of that size.

    >>> check_count("num_samples", 2, least=2)
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ValueError(f"Invalid {name}: {value!r}. Expected an int >= {least}.")


def check_options(
    T: Any,
    epsilon: Any,
    Z_target: Any,
    adaptation: Any,
    T_lr: Any,
    local_plate: Any,
    local_size: Any,
) -> float:
    """
    :return: epsilon, by default a thousandth of ``Z_target``.
    :raises ValueError: naming the argument of ``RVRSGuide`` that is out of range.
    """
    if epsilon is None:
        epsilon = EPSILON * Z_target if _is_number(Z_target) and 0 < Z_target < 1 else EPSILON
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        raise ValueError(
            f"Invalid epsilon: {epsilon!r}. Expected a float between 0 and 1, such as "
            "Z_target / 1000, the default."
        )
    if not (_is_number(Z_target) and epsilon < Z_target < 1):
        raise ValueError(
            f"Invalid Z_target: {Z_target!r}. Expected a float between epsilon={epsilon}, "
            "below which the mean acceptance cannot go, and 1."
        )
    if adaptation not in ADAPTATIONS:
        raise ValueError(
            f"Invalid adaptation: {adaptation!r}. Expected one of {ADAPTATIONS}."
        )
    if not (T is None or _is_number(T)):
        raise ValueError(f"Invalid T: {T!r}. Expected a finite float, or None.")
    if not (_is_number(T_lr) and T_lr > 0):
        raise ValueError(f"Invalid T_lr: {T_lr!r}. Expected a positive float.")
    if not (local_plate is None or isinstance(local_plate, str)):
        raise ValueError(
            f"Invalid local_plate: {local_plate!r}. Expected the name of a plate, or None."
        )
    if local_size is not None:
        check_count("local_size", local_size, 1)
        if local_plate is None:
            raise ValueError(
                f"Found local_size={local_size} without local_plate. Expected the name of "
                "the plate that has this size."
            )
    elif local_plate is not None and T is not None and adaptation != "fixed":
        raise ValueError(
            f"Found T={T} with local_plate={local_plate!r} and no local_size. Thresholds are "
            "then found at each call. Expected T=None, adaptation='fixed' to use this one "
            "for all items, or local_size to adapt one for each."
        )

    if T is None or adaptation != "fixed":
        _check_ratio(epsilon, Z_target)
    return float(epsilon)


def _check_ratio(epsilon: float, Z_target: float) -> None:
    share = epsilon / Z_target
    message = (
        f"Found Z_target={Z_target} and epsilon={epsilon}: {share:.0%} of the accepted draws "
        "would be accepted for epsilon alone, whatever the model says of them. A smaller "
        "Z_target would then not make the bound tighter. Expected epsilon far below Z_target, "
        "such as Z_target / 1000, the default."
    )
    if share > 1 / 3:
        raise ValueError(message)
    if share > 0.1:
        warnings.warn(message)


def _is_number(x: Any) -> bool:
    is_number = isinstance(x, numbers.Real) and not isinstance(x, bool)
    return is_number and math.isfinite(x)
