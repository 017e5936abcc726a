# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
from pyro.distributions import Delta, Distribution
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops.score_identity import (
    base_dists,
    flat_transforms,
    log_prob_has_memory,
    support_can_move,
    support_moves,
)

# Either the default or one that only forwards to the distribution inside.
_PLAIN_SCORE_PARTS = (
    Distribution.score_parts,
    ExpandedDistribution.score_parts,
    MaskedDistribution.score_parts,
    None,
)


class _Gate:
    """Knows no tensor, lest graphs live in cycles."""

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

    A draw is tapped where the mean of its score is zero and where a tap can be put
    in; :attr:`reasons` says why or why not, for each latent site. Requirements on a
    tapped site: it is drawn from its own ``fn`` (neither observed nor replayed);
    ``fn.has_rsample``; the draw requires grad; no :class:`~pyro.distributions.Delta`
    inside; the default ``score_parts``; a support that does not depend on a
    parameter; a ``log_prob`` that does not remember its draw.

    Values are tapped on their way out: the messenger must be OUTSIDE of
    :func:`pyro.poutine.trace` and of all handlers that are to see the tapped value::

        with TapMessenger() as tap:
            trace = pyro.poutine.trace(guide).get_trace()
            tap.settle(trace)

    :param dict known: what earlier taps found out about the sites, to be shared by
        the taps of one estimator. Defaults to nothing.

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

    def __init__(self, known: Optional[Dict[Tuple, Tuple]] = None) -> None:
        super().__init__()
        self._gates: Dict[str, _Gate] = {}
        #: Latent sites that were tapped, with the value that went on.
        self.values: Dict[str, torch.Tensor] = {}
        #: All latent sites, with what there is to say of the treatment.
        self.reasons: Dict[str, str] = {}
        self._known = {} if known is None else known
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
        for gate in self._gates.values():
            gate.is_open = False

    def open(self) -> None:
        """Opens the gate."""
        for gate in self._gates.values():
            gate.is_open = True

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

    def settle(self, trace: Any) -> None:
        """
        Lets go of sites whose value in the trace of the guide is not the one that was tapped.

        :param Trace trace: of the guide, made under this messenger.
        """
        for name in trace.stochastic_nodes:
            self.reasons.setdefault(name, "a handler around the loss hides it")
        for name, value in list(self.values.items()):
            if name not in trace or trace.nodes[name]["value"] is not value:
                # Their gates stay open, as what replaced a value may be made of it.
                del self.values[name], self._gates[name]
                self.reasons[name] = "a handler has replaced its value"

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
        if value is self.values.get(name):  # if installed more than once
            return
        if msg["infer"].get("_do_not_trace") or site_is_subsample(msg):
            return
        if name in self._supplied:
            reason = "its value was supplied, not drawn"
        elif not fn.has_rsample:
            reason = "not reparameterised, keeps its score function"
        elif not (isinstance(value, torch.Tensor) and value.requires_grad):
            reason = "depends on no parameter"
        else:
            layers = list(base_dists(fn))
            key = (name, *map(type, layers), *map(type, flat_transforms(fn)))
            if key not in self._known:
                self._known[key] = _inspect(fn, layers, value)
            can_be_tapped, support_can_move, reason = self._known[key]
            if support_can_move and support_moves(fn):
                reason = "its support depends on a parameter"
            elif can_be_tapped:
                self._gates[name] = gate = _Gate()
                msg["value"] = self.values[name] = _tap(value, gate)
        self.reasons[name] = reason


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
