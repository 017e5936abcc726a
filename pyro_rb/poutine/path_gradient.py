# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from pyro_rb.ops.score_identity import score_obstacle
from pyro_rb.poutine.draw_messenger import Declined, DrawMessenger, Strategy
from pyro_rb.poutine.path_flow import PathFlow


class Gate:
    """Knows no tensor, lest graphs live in cycles."""

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


def _is_transformed(value: torch.Tensor) -> bool:
    """Whether the code runs inside of torch.func, where nothing can be solved."""
    try:
        _Tap.apply(value, Gate())
    except RuntimeError:
        return True
    return False


class PathGradient(Strategy):
    """
    Passes each reparameterized draw of a guide through an identity with a gate, the
    "tap", so that one graph gives both partial and total derivatives.

    While the gate is open (the default) gradients flow as without the tap. Within
    :meth:`closed` nothing flows through a tapped value into the parameters and draws
    that it was made of, so that :func:`torch.autograd.grad` gives derivatives at
    fixed draws.

    A draw is tapped where the mean of its score is known to be zero: ``fn.has_rsample``,
    the draw requires grad, and :func:`~pyro_rb.ops.score_identity.score_obstacle` finds
    no obstacle. The log density of a flow is taken from the draw, see
    :class:`~pyro_rb.poutine.path_flow.PathFlow`.

    :param str obstacle: why nothing is to be tapped, if so.
    """

    def __init__(self, obstacle: str = "") -> None:
        #: Latent sites that were tapped, with the value that went on.
        self.values: Dict[str, torch.Tensor] = {}
        self.obstacle = obstacle
        # By the id of the value, with the value, lest an id be used again.
        self._taps: Dict[int, Tuple[torch.Tensor, Gate, Optional[PathFlow]]] = {}

    def begin(self) -> None:
        self.values = {}

    def draw(self, msg: Any, handler: DrawMessenger) -> str:
        fn = msg["fn"]
        if self.obstacle:
            raise Declined(self.obstacle)
        if not fn.has_rsample:
            raise Declined("not reparameterized, keeps its score function")
        flow = None
        if msg["value"] is None:
            flow = PathFlow.find(fn)
            if flow is None:
                msg["value"] = fn(*msg["args"], **msg["kwargs"])
            else:
                value: Any = flow.draw(*msg["args"], **msg["kwargs"])
                msg["value"] = value
                if flow.obstacle and score_obstacle(fn):
                    raise Declined(flow.obstacle)
                if flow.obstacle or _is_transformed(value):
                    flow = None
        reason = self.inspect(msg, flow)
        msg["value"] = self.tap(msg["name"], msg["value"], flow)
        return reason

    def inspect(self, msg: Any, flow: Optional[PathFlow] = None) -> Any:
        """
        :param flow: that drew it, if so.
        :return: what there is to say of a draw that can be tapped.
        :raises Declined: with the reason why it cannot.
        """
        fn, value = msg["fn"], msg["value"]
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            raise Declined("depends on no parameter")
        if getattr(msg["scale"], "requires_grad", False):
            # The mean of its derivative, times log q, is not zero.
            raise Declined("its scale depends on a parameter")
        if flow is not None:
            return flow.reason
        # Looked at each time: parameters are frozen, modules change their mode.
        obstacle = score_obstacle(fn)
        if obstacle is not None:
            raise Declined(obstacle)
        return "reparameterized draw"

    def tap(self, name: str, value: torch.Tensor, flow: Optional[PathFlow] = None) -> torch.Tensor:
        gate = Gate()
        self.values[name] = value = _tap(value, gate)
        if flow is not None:
            flow.pass_on(value)
        self._taps[id(value)] = value, gate, flow
        return value

    def flow_of(self, value: Any) -> Optional[PathFlow]:
        """The flow that drew a tapped value, if it gives the log density."""
        return self._taps[id(value)][2] if id(value) in self._taps else None

    def find_partial(self, terms: Sequence[torch.Tensor]) -> Optional[torch.Tensor]:
        """The derivative of some terms by the only draw, within :meth:`closed`, if it is known already."""
        if len(terms) == len(self.values) == 1:
            (value,) = self.values.values()
            flow = self.flow_of(value)
            if flow is not None and flow.plain_sum is terms[0]:
                return flow.derivative
        return None

    def settle(self, site: Any) -> bool:
        name, value = site["name"], site["value"]
        mine = self.values[name]
        if value is not mine:
            # Its gate stays open, as what replaced the value may be made of it.
            del self.values[name], self._taps[id(mine)]
            if id(value) not in self._taps:
                return False
            # The guide started from a partial trace, for a value of a site enumerated in a loop.
            self.values[name] = value
        flow = self.flow_of(value)
        if flow is not None:
            flow.put_density(site)
        return True

    @property
    def nodes(self) -> Set[Any]:
        """The graph nodes of the draws."""
        return {value.grad_fn for value in self.values.values()}

    @property
    def _flows(self) -> List[PathFlow]:
        return [flow for _, _, flow in self._taps.values() if flow is not None]

    def attach_flows(self) -> None:
        """Makes the log densities of flows depend on their draws, also outside of :meth:`closed`."""
        for flow in self._flows:
            flow.solve()
            flow.is_attached = True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closes the gate for the duration of a ``with`` block."""
        gates = [gate for _, gate, _ in self._taps.values()]
        # Outside, what they add up to is zero, or not even a number.
        flows = [flow for flow in self._flows if not flow.is_attached]
        self.attach_flows()
        for gate in gates:
            gate.is_open = False
        try:
            yield
        finally:
            for gate in gates:
                gate.is_open = True
            for flow in flows:
                flow.is_attached = False

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

    :param str obstacle: the reason, if nothing is to be tapped.

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

    def __init__(self, obstacle: str = "") -> None:
        self.path = PathGradient(obstacle)
        super().__init__([self.path])
