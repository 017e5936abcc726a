# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What :class:`~pyro_rb.diagnostics.guard.guard.GradientGuard` has to know of a call of a loss: which parameters it used,
and whether its numbers are finite.
"""

import math
from typing import Any, Callable, Dict, Iterable, List

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_rb.diagnostics.run.sites import unconstrained


class FunctionLoss:
    """A function as a loss, as SVI takes it."""

    def __init__(self, function: Callable) -> None:
        self.differentiable_loss = self.loss = function

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        value = self.loss(*args, **kwargs)
        if getattr(value, "requires_grad", False):
            value.backward()
        return value


class SeenParameters(Messenger):
    """The parameters that model and guide ask for."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Dict[str, Any] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        self._values[msg["name"]] = msg["value"]

    @property
    def tensors(self) -> Dict[str, Tensor]:
        """Unconstrained, by name."""
        return {name: unconstrained(value) for name, value in self._values.items()}


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """
    Whether all elements are finite. It is asked at each step, so it has to be quick.

    >>> import torch
    >>> are_finite([torch.ones(2), torch.tensor([1.0, float("inf")])])
    False
    """
    tensors = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    sums: Dict[torch.device, Tensor] = {}
    for tensor in tensors:
        total = tensor.detach().sum()
        sums[tensor.device] = sums[tensor.device] + total if tensor.device in sums else total
    # A sum of finite numbers may overflow: then each is looked at.
    if all(math.isfinite(total.item()) for total in sums.values()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def grads_of(parameters: Iterable[Tensor]) -> List[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def is_finite_loss(loss: Any) -> bool:
    parts = loss if isinstance(loss, tuple) else (loss,)  # ReweightedWakeSleep has two
    return all(math.isfinite(p.detach() if isinstance(p, Tensor) else p) for p in parts)
