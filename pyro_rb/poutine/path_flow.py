# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, List, Optional

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch.distributions import Independent, TransformedDistribution

from pyro_rb.ops.flow import Layer, apply, differentiate, find_obstacle, is_forward_only
from pyro_rb.ops.score_identity import flat_parts, flat_transforms, score_obstacle
from pyro_rb.ops.zuko import as_transformed
from pyro_rb.poutine.densities import put_log_prob


class _Reason:
    """What there is to say of a flow. Is completed when it is solved; holds no graph."""

    def __init__(self) -> None:
        self.notes: List[str] = []

    def __str__(self) -> str:
        notes = ", ".join(self.notes) or "not needed"
        return f"reparameterized draw, its flow solved by: {notes}"


class _Attach(torch.autograd.Function):
    """
    Its first argument, the log density of a draw by the way that it was made. While the flow is attached, its
    gradient is that of ``log_prob + <a, value - y>``, with the derivative ``a`` by the value at fixed parameters: zero
    more in all, but the partial derivatives by the value, and by parameters at a fixed value, are right.
    """

    @staticmethod
    def forward(
        ctx: Any, log_prob: torch.Tensor, value: torch.Tensor, y: torch.Tensor, flow: "PathFlow"
    ) -> torch.Tensor:
        ctx.flow = flow
        return log_prob.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a = ctx.flow.derivative
        if not ctx.flow.is_attached:
            return grad, None, None, None
        by_value = a * grad.reshape(grad.shape + (1,) * (a.dim() - grad.dim()))
        return grad, by_value, -by_value, None


class PathFlow:
    """
    A draw of a flow whose log density at a given value is slow, or not known, with the log density that comes
    with the draw.

    :param fn: a :class:`~torch.distributions.TransformedDistribution`, in which others may be nested.
    :param wrappers: what it is wrapped in, the outermost first.

    >>> from torch.distributions import Normal
    >>> from pyro.distributions.transforms import planar
    >>> flow = PathFlow(TransformedDistribution(Normal(torch.zeros(2), 1.0), [planar(2)]), [])
    >>> value = flow.draw().clone()
    >>> flow.pass_on(value)
    >>> flow.solve()
    >>> print(flow.reason)
    reparameterized draw, its flow solved by: rank one
    """

    def __init__(self, fn: Any, wrappers: List[Any]) -> None:
        self._wrappers = wrappers
        #: The transformed distributions, and what is between them, the innermost last.
        self._levels: List[Any] = []
        while isinstance(fn, (TransformedDistribution, Independent)):
            self._levels.append(fn)
            fn = fn.base_dist
        while not isinstance(self._levels[-1], TransformedDistribution):
            self._levels.pop()
        self._base = self._levels[-1].base_dist
        self._layers: List[Layer] = []
        #: Why it cannot be solved; empty before it is drawn.
        self.obstacle: Optional[str] = None
        self.reason = _Reason()
        #: Of the log density by the value, at fixed parameters. None before it is asked for.
        self.derivative: Optional[torch.Tensor] = None
        #: Whether the log density depends on the value, and not only on what that was made of.
        self.is_attached = False
        #: The sum of the log density in the trace, if neither scaled nor masked.
        self.plain_sum: Optional[torch.Tensor] = None

    @staticmethod
    def find(fn: Any) -> Optional["PathFlow"]:
        """None if there is no need for it, or no way."""
        if not any(is_forward_only(t) for t in flat_transforms(fn)) or score_obstacle(fn, at_draw=True):
            return None
        wrappers = []
        while isinstance(fn, (Independent, MaskedDistribution)):
            wrappers.append(fn)
            fn = fn.base_dist
        fn = as_transformed(fn)
        if not isinstance(fn, TransformedDistribution):
            return None
        flow = PathFlow(fn, wrappers)
        is_hidden = any(is_forward_only(t) for t in flat_transforms(flow._base))
        return None if is_hidden else flow

    def draw(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What ``fn.rsample`` gives, by the same random numbers."""
        self._y = self._base.rsample(*args, **kwargs)
        self._log_prob = self._base.log_prob(self._y)
        for level in reversed(self._levels):
            if isinstance(level, Independent):
                self._log_prob = sum_rightmost(self._log_prob, level.reinterpreted_batch_ndims)
            else:
                self._transform(level)
        self.obstacle = next(filter(None, map(find_obstacle, self._layers)), None)
        return self._y

    def _transform(self, fn: TransformedDistribution) -> None:
        parts = flat_parts(fn.transforms)
        event_dim = len(fn.event_shape) - sum(t.codomain.event_dim - t.domain.event_dim for t in parts)
        log_prob = sum_rightmost(self._log_prob, event_dim - len(fn.base_dist.event_shape))
        log_dets = []
        for transform in parts:
            x = self._y
            # At once, as a layer that comes twice remembers its last draw only.
            self._y, log_det = apply(transform, x)
            log_dets.append(sum_rightmost(log_det, event_dim - transform.domain.event_dim))
            event_dim += transform.codomain.event_dim - transform.domain.event_dim
            self._layers.append(Layer(transform, x.detach(), self._y.detach()))
        # In the order of TransformedDistribution.log_prob, to the last bit.
        total: Any = 0.0
        for log_det in reversed(log_dets):
            total = total - log_det
        self._log_prob = total + log_prob

    def pass_on(self, value: torch.Tensor) -> None:
        """
        :param value: the draw, or a copy that goes on in its place.
        """
        log_prob = _Attach.apply(self._log_prob, value, self._y, self)
        for wrapper in reversed(self._wrappers):
            if isinstance(wrapper, MaskedDistribution):
                log_prob = scale_and_mask(log_prob, mask=wrapper._mask)
            else:
                log_prob = sum_rightmost(log_prob, wrapper.reinterpreted_batch_ndims)
        #: Of the draw, ``batch_shape``.
        self.log_prob = log_prob
        del self._y, self._log_prob

    def solve(self) -> None:
        """Computes the derivative, once."""
        if self.derivative is None:
            self.derivative, self.reason.notes[:] = differentiate(self._base, self._layers)
            self._layers = []

    def put_density(self, site: Any) -> None:
        """Puts the log density into a site of a trace, scaled and masked."""
        put_log_prob(site, self.log_prob)
        is_plain = not any(isinstance(w, MaskedDistribution) for w in self._wrappers)
        if is_plain and site["log_prob"] is self.log_prob:
            self.plain_sum = site["log_prob_sum"]
