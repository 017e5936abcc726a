# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from pyro.distributions import Delta, Distribution
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)

from pyro_rb.ops.score_identity import (
    base_dists,
    flat_transforms,
    log_prob_has_memory,
    support_can_move,
    support_moves,
)
from pyro_rb.poutine.draw_messenger import Declined, DrawMessenger, Strategy

# Either the default or one that only forwards to the distribution inside.
_PLAIN_SCORE_PARTS = (
    Distribution.score_parts,
    ExpandedDistribution.score_parts,
    MaskedDistribution.score_parts,
    None,
)


class Gate:
    """Shared by the taps of one run. Knows no tensor, lest graphs live in cycles."""

    is_open = True


class _Tap(torch.autograd.Function):
    """The identity. Its gradient passes while the gate is open."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gate: Gate) -> torch.Tensor:
        ctx.gate = gate
        # A view could not be checked for in-place edits; a copy counts its own.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (grad if ctx.gate.is_open else None), None


class _FuncTap(_Tap):
    """The same in the form that torch.func asks for, which costs three times as much."""

    @staticmethod
    def forward(value: torch.Tensor, gate: Gate) -> torch.Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: torch.Tensor) -> None:
        _, ctx.gate = inputs


def _tap(value: torch.Tensor, gate: Gate) -> torch.Tensor:
    try:
        return _Tap.apply(value, gate)
    except RuntimeError:  # inside of torch.func
        return _FuncTap.apply(value, gate)


class PathGradient(Strategy):
    """
    Passes each reparameterised draw of a guide through an identity with a gate, the
    "tap", so that one graph gives both partial and total derivatives.

    While the gate is open (the default) gradients flow as without the tap. Within
    :meth:`closed` nothing flows through a tapped value into the parameters and draws
    that it was made of, so that :func:`torch.autograd.grad` gives derivatives at
    fixed draws.

    A draw is tapped where the mean of its score is zero and where a tap can be put
    in. Requirements on a tapped site: ``fn.has_rsample``; the draw requires grad; no
    :class:`~pyro.distributions.Delta` inside; the default ``score_parts``; a support
    that does not depend on a parameter; a ``log_prob`` that does not remember its draw.

    :param dict known: what earlier runs found out about the sites. Defaults to nothing.
    :param str obstacle: why nothing is to be tapped, if so.
    """

    def __init__(self, known: Optional[Dict[Tuple, Tuple]] = None, obstacle: str = "") -> None:
        self.gate = Gate()
        #: Latent sites that were tapped, with the value that went on.
        self.values: Dict[str, torch.Tensor] = {}
        self._known = {} if known is None else known
        self.obstacle = obstacle
        self._tapped: Dict[int, torch.Tensor] = {}  # keeps them, lest an id be used again

    def begin(self) -> None:
        self.values = {}

    def draw(self, msg: Any, handler: DrawMessenger) -> str:
        name, fn = msg["name"], msg["fn"]
        if self.obstacle:
            raise Declined(self.obstacle)
        if not fn.has_rsample:
            raise Declined("not reparameterised, keeps its score function")
        if msg["value"] is None:
            msg["value"] = fn(*msg["args"], **msg["kwargs"])
        reason = self.inspect(name, fn, msg["value"])
        msg["value"] = self.tap(name, msg["value"])
        return reason

    def inspect(self, name: str, fn: Any, value: Any) -> str:
        """
        :return: what there is to say of a draw that can be tapped.
        :raises Declined: with the reason why it cannot.
        """
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            raise Declined("depends on no parameter")
        layers = list(base_dists(fn))
        key = (name, *map(type, layers), *map(type, flat_transforms(fn)))
        if key not in self._known:
            self._known[key] = _inspect(fn, layers, value)
        can_be_tapped, support_can_move, reason = self._known[key]
        if support_can_move and support_moves(fn):
            raise Declined("its support depends on a parameter")
        if not can_be_tapped:
            raise Declined(reason)
        return reason

    def tap(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.values[name] = value = _tap(value, self.gate)
        self._tapped[id(value)] = value
        return value

    def accept(self, msg: Any) -> bool:
        name, value = msg["name"], msg["value"]
        if value is not self.values[name]:
            del self.values[name]
            # The guide starts from a partial trace, for each value of an enumerated site.
            if self._tapped.get(id(value)) is not value:
                return False
            self.values[name] = value
        return True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closes the gate for the duration of a ``with`` block."""
        self.gate.is_open = False
        try:
            yield
        finally:
            self.gate.is_open = True

    def raise_if_edited(self) -> None:
        """
        :raises RuntimeError: naming the site, where a tapped value was changed in
            place since it was drawn: it is no draw of its distribution any more.
        """
        for name, value in self.values.items():
            if value._version > 0:
                raise RuntimeError(
                    f"The value of guide site '{name}' was changed in place after it "
                    "was drawn, so that it is no draw of its distribution any more. "
                    "Expected an unchanged value; replace an in-place operation such "
                    f"as `{name}.add_(1)` by `{name} = {name} + 1`."
                )


class TapMessenger(DrawMessenger):
    """
    A handler that takes path gradients where it can, see :class:`PathGradient`.

    :param dict known: what earlier runs found out about the sites. Defaults to nothing.
    :param str obstacle: why nothing is to be tapped, if so.

    Example::

        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> with TapMessenger() as tap:
        ...     total = pyro.sample("z", Normal(loc, 1.0).to_event(1)).sum()
        >>> torch.autograd.grad(total, loc, retain_graph=True)
        (tensor([1., 1.]),)
        >>> with tap.path.closed():
        ...     torch.autograd.grad(total, loc, allow_unused=True)
        (None,)
    """

    def __init__(self, known: Optional[Dict[Tuple, Tuple]] = None, obstacle: str = "") -> None:
        self.path = PathGradient(known, obstacle)
        super().__init__([self.path])


def _inspect(fn: Any, layers: List[Any], value: torch.Tensor) -> Tuple[bool, bool, str]:
    """
    What stays true of a site: whether it can be tapped, whether its support has to
    be looked at each time, and the reason for the report.
    """
    if any(isinstance(layer, Delta) for layer in layers):
        return False, False, "a Delta has no score identity"
    # Bare torch distributions have no score_parts: only Pyro's wrappers ask for them.
    methods = [getattr(type(layer), "score_parts", None) for layer in layers]
    if any(method not in _PLAIN_SCORE_PARTS for method in methods):
        return False, False, "its distribution has score_parts of its own"
    if log_prob_has_memory(fn, value):
        return False, False, "log_prob works only on the very tensor that was drawn"
    autoregressive = any(
        getattr(t, "autoregressive", False) for t in flat_transforms(fn)
    )
    cost = ", log_prob inverts an autoregressive flow slowly" if autoregressive else ""
    return True, support_can_move(fn), "reparameterised draw" + cost
