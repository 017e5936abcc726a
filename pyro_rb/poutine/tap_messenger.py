# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Set, Tuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops.score_identity import flat_transforms, score_obstacle


class _Gate:
    """Shared by the taps of one run. Knows no tensor, lest graphs live in cycles."""

    is_open = True


class _Tap(torch.autograd.Function):
    """The identity. Its gradient passes while the gate is open."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gate: _Gate) -> torch.Tensor:
        ctx.gate = gate
        # A view could not be checked for in-place edits; a copy counts its own.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (grad if ctx.gate.is_open else None), None


class _FuncTap(_Tap):
    """The same in the form that torch.func asks for, which costs three times as much."""

    @staticmethod
    def forward(value: torch.Tensor, gate: _Gate) -> torch.Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: torch.Tensor) -> None:
        _, ctx.gate = inputs


def _tap(value: torch.Tensor, gate: _Gate) -> torch.Tensor:
    try:
        return _Tap.apply(value, gate)
    except RuntimeError:  # inside of torch.func
        return _FuncTap.apply(value, gate)


class TapMessenger(Messenger):
    """
    Passes each reparameterised draw of a guide through an identity with a gate, the
    "tap", so that one graph gives both partial and total derivatives.

    While the gate is open (the default) gradients flow as without the tap. Within
    :meth:`closed` nothing flows through a tapped value into the parameters and draws
    that it was made of, so that :func:`torch.autograd.grad` gives derivatives at
    fixed draws.

    A draw is tapped where the mean of its score is known to be zero; :attr:`reasons`
    says why or why not, for each latent site. Requirements on a tapped site: it is
    drawn from its own ``fn`` (neither observed nor replayed); ``fn.has_rsample``; the
    draw requires grad; :func:`~pyro_rb.ops.score_identity.score_obstacle` finds none.

    The messenger must be OUTSIDE of :func:`pyro.poutine.trace`, as traces record
    values on their way out::

        with TapMessenger() as tap:
            trace = pyro.poutine.trace(guide).get_trace()

    Example::

        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> def guide():
        ...     return pyro.sample("z", Normal(loc, 1.0).to_event(1))
        >>> with TapMessenger() as tap:
        ...     trace = pyro.poutine.trace(guide).get_trace()
        >>> total = trace.nodes["z"]["value"].sum()
        >>> torch.autograd.grad(total, loc, retain_graph=True)
        (tensor([1., 1.]),)
        >>> with tap.closed():
        ...     torch.autograd.grad(total, loc, allow_unused=True)
        (None,)
    """

    def __init__(self) -> None:
        super().__init__()
        self._gate = _Gate()
        #: Latent sites that were tapped, with the value that went on.
        self.values: Dict[str, torch.Tensor] = {}
        #: All latent sites, with what there is to say of the treatment.
        self.reasons: Dict[str, str] = {}
        self._supplied: Set[str] = set()
        self._is_on = True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closes the gate for the duration of a ``with`` block."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def close(self) -> None:
        """Closes the gate, until :meth:`open`."""
        self._gate.is_open = False

    def open(self) -> None:
        """Opens the gate."""
        self._gate.is_open = True

    def bypass(self, fn: Callable) -> Callable:
        """
        Returns ``fn`` with the tap turned off while it runs: a model that runs
        inside of the tap keeps its values.
        """

        def untapped(*args: Any, **kwargs: Any) -> Any:
            self._is_on = False
            try:
                return fn(*args, **kwargs)
            finally:
                self._is_on = True

        return untapped

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

    def _pyro_sample(self, msg: Any) -> None:
        # Handlers inside have had their turn: a value set by now is no draw of fn.
        if self._is_on and msg["value"] is not None:
            self._supplied.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if not self._is_on or msg["is_observed"]:
            return
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if msg["infer"].get("_do_not_trace") or site_is_subsample(msg):
            return
        if name in self._supplied:
            reason = "its value was supplied, not drawn"
        elif not fn.has_rsample:
            reason = "not reparameterised, keeps its score function"
        elif not (isinstance(value, torch.Tensor) and value.requires_grad):
            reason = "depends on no parameter"
        else:
            # Looked at each time: parameters are frozen, modules change their mode.
            obstacle = score_obstacle(fn)
            reason = obstacle or "reparameterised draw" + _cost(fn)
            if obstacle is None:
                msg["value"] = self.values[name] = _tap(value, self._gate)
        self.reasons[name] = reason


def _cost(fn: Any) -> str:
    slow = any(getattr(t, "autoregressive", False) for t in flat_transforms(fn))
    return ", log_prob inverts an autoregressive flow slowly" if slow else ""
