# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What :class:`~pyro_rb.diagnostics.guard.guard.GradientGuard` has to know of a call of a loss: how to
repeat it, and which parameters it used.
"""

from typing import Any, Callable, Dict, NamedTuple, Optional

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_rb.diagnostics.guard.bad_number import BadNumber, find_bad_number
from pyro_rb.diagnostics.run.parameters import unconstrained


class FunctionLoss:
    """A function as a loss, as SVI takes it."""

    def __init__(self, function: Callable) -> None:
        self.differentiable_loss = self.loss = function

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        value = self.loss(*args, **kwargs)
        if getattr(value, "requires_grad", False):
            value.backward()
        return value


class Call(NamedTuple):
    """What a step was, so that it can be repeated."""

    entrance: str
    model: Callable
    guide: Callable
    args: Any
    kwargs: Dict[str, Any]
    rng_state: Any

    def find(self, loss: Any) -> Optional[BadNumber]:
        return find_bad_number(loss, *self)


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
