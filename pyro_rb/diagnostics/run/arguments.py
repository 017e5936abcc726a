# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What model and guide are called with."""

import operator
from typing import Any, Callable, Sequence, Union

import torch
from torch import Tensor

from pyro_rb.infer.generators import get_generators, set_generators

#: Positional arguments of model and guide, or a function that returns those of a step.
Arguments = Union[Sequence, Callable[[], Sequence]]


def current_args(args: Arguments) -> Sequence:
    """
    The positional arguments of model and guide for one step: ``args`` or what it returns.

    :raises TypeError: If that is no tuple.

    **Example**

    >>> current_args(lambda: (1, 2))
    (1, 2)
    """
    given = args() if callable(args) else args
    if not isinstance(given, (tuple, list)):
        what = "args(): expected it to return" if callable(args) else "args: expected"
        raise TypeError(
            f"{what} a tuple of the arguments of model and guide, such as (data,), got "
            f"{type(given).__name__}; for minibatches give a function that draws one and returns it"
        )
    return given


def check_batches(args: Callable[[], Sequence]) -> None:
    """Minibatches must be those of the random numbers, so that losses can be compared."""
    states = get_generators()
    first = current_args(args)
    set_generators(states)
    again = current_args(args)
    set_generators(states)
    pairs = [pair for pair in zip(first, again) if isinstance(pair[0], Tensor)]
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            "args(): it returned other values when called again with the same random numbers. Draw "
            "the minibatch by the generators of torch, numpy or random, such as "
            "data[torch.randperm(len(data))[:32]], so that all losses see the same"
        )


def integer(name: str, value: Any) -> int:
    """
    An argument that has to be an integer, of Python, numpy or torch.

    :raises TypeError: If it is not.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def check_counts(num_samples: int, num_burn_in: int, least: int) -> None:
    """:raises ValueError: If a number of draws is out of range."""
    if num_samples < least or num_burn_in < 0:
        raise ValueError(
            f"expected num_samples >= {least} and num_burn_in >= 0, "
            f"got num_samples={num_samples} and num_burn_in={num_burn_in}"
        )
