# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The gradient of an importance-weighted bound, in parts.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from pyro_rb.ops.chain import inject, to_partial
from pyro_rb.ops.graph import leaf_nodes
from pyro_rb.ops.importance import unsqueeze_right, weighted_sum
from pyro_rb.ops.quiet_grad import without_hooks
from pyro_rb.poutine.densities import find_density_scale

#: By draw, how much of its score is reparameterized: the scale of the control variate.
Shares = Sequence[float]


class Draw(NamedTuple):
    """The tapped value of one site in one run, with its normalized weights."""

    site: str
    value: torch.Tensor  # batch_shape + event_shape
    log_q: torch.Tensor  # by item
    weight: torch.Tensor  # by item, detached
    broad_weight: torch.Tensor  # the same, can be broadcast to value
    #: By what log weights multiply the log density: a float, or a tensor that can be
    #: broadcast to value, or None if that is not known.
    scale: Any

    def factor(self, share: float) -> Any:
        """
        Of the derivative of the bound by ``value``, if a share of the score is
        reparameterized. Can be broadcast to ``value``.
        """
        if share == 0.0:
            return 1.0
        # Not 1 - share * scale * (1 - weight): small weights would lose their digits.
        return (1.0 - share * self.scale) + share * self.scale * self.broad_weight

    def drop_nan(self, grad: torch.Tensor) -> torch.Tensor:
        """Removes what is not a number where the weight is zero."""
        return torch.where((self.broad_weight == 0.0) & grad.isnan(), 0.0, grad)


class Surrogate:
    """
    What the gradient of the loss is made of: ``kept``, the weighted sum of all log densities
    but those of the tapped sites, with the sign of a loss, and the draws of these.

    :param bool has_zeros: whether a weight is zero.
    """

    def __init__(self, has_zeros: bool = False) -> None:
        self.kept: Any = 0.0
        self.draws: List[Draw] = []
        self.has_zeros = has_zeros

    def add(
        self,
        kept: Any,
        log_q: Dict[str, torch.Tensor],
        weight: torch.Tensor,
        scale: float,
        guide_trace: Any,
    ) -> None:
        """
        Adds one item of one run.

        :param kept: log densities by item, a tensor or a number.
        :param log_q: those of the tapped sites.
        :param weight: normalized, by item.
        :param scale: by which log weights were divided.
        """
        self.kept = self.kept - weighted_sum(weight, kept)
        for name, term in log_q.items():
            site, value = guide_trace.nodes[name], guide_trace.tap.path.values[name]
            # In a loop, a particle may lack dimensions of size 1 that others have.
            own = weight.reshape(term.shape)
            broad = unsqueeze_right(own, site["fn"].event_dim).to(value)
            factor = find_density_scale(site)
            if isinstance(factor, torch.Tensor):
                factor = factor.to(value)
            factor = None if factor is None else factor / scale
            self.draws.append(Draw(name, value, term, own, broad, factor))

    def backward(self, shares: Shares, retain_graph: Optional[bool]) -> bool:
        """
        Adds the gradient to the ``.grad`` of the leaves, by one pass through the model, down
        to the draws, and one through the guide.

        :param shares: by draw, the share of its score that is reparameterized.
        :return: False, with nothing done, without draws, and where model and guide have a
            leaf in common, whose hooks would see two parts of its gradient.
        """
        if not (self.draws and getattr(self.kept, "requires_grad", False)):
            return False
        values = [draw.value for draw in self.draws]
        of_model = leaf_nodes([self.kept], {value.grad_fn for value in values})
        of_guide = [*values, *[draw.log_q for draw in self.draws]]
        if of_model and not of_model.keys().isdisjoint(leaf_nodes(of_guide)):
            return False
        roots, weights = zip((self.kept, None), *self._log_q([1.0] * len(values)))
        inputs = values + list(of_model.values())
        torch.autograd.backward(roots, weights, retain_graph=True, inputs=inputs)
        grads = self._scale(shares, self._clean([value.grad for value in values]))
        roots, weights = zip(*zip(values, grads), *self._log_q([1.0 - c for c in shares]))
        with inject(values, grads):
            torch.autograd.backward(roots, weights, retain_graph)
        for value in values:
            value.grad = None
        return True

    def as_scalar(self, shares: Shares) -> torch.Tensor:
        """
        :param shares: by draw, the share of its score that is reparameterized.
        :return: a scalar whose gradient is that of the loss.
        """
        values = [draw.value for draw in self.draws]
        left = self._log_q([1.0 - c for c in shares])
        found = self._differentiate([(self.kept, None), *left])
        rest = self._differentiate(self._log_q(shares))
        self._totals = [a + b for a, b in zip(found, rest)]
        wanted = self._scale(shares, self._totals)
        missing = to_partial(values, [a - b for a, b in zip(wanted, found)])
        if self.has_zeros:
            for draw in self.draws:
                draw.value.register_hook(draw.drop_nan)
        terms = [weighted_sum(w, t) for t, w in [*left, *zip(values, missing)]]
        return self.kept + sum(terms)

    def differentiate_scores(
        self, parameters: Sequence[torch.Tensor]
    ) -> Sequence[Optional[torch.Tensor]]:
        """
        After :meth:`as_scalar`: derivatives of its gradient by one minus the shares.

        :param parameters: leaves.
        """
        values = [draw.value for draw in self.draws]
        ones = [0.0 if draw.scale is None else 1.0 for draw in self.draws]
        rest = self._scale(ones, self._totals)
        grads = [a - b for a, b in zip(self._totals, rest)]
        roots, weights = zip(*zip(values, grads), *self._log_q(ones))
        with without_hooks([*values, *parameters]), inject(values, grads):
            return torch.autograd.grad(
                roots, parameters, weights, retain_graph=True, allow_unused=True
            )

    def _log_q(self, factors: Shares) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """The log densities of the tapped sites that have a graph, with their weights."""
        return [
            (draw.log_q, factor * draw.weight)
            for draw, factor in zip(self.draws, factors)
            if factor != 0.0 and draw.log_q.requires_grad
        ]

    def _differentiate(self, terms: Sequence[Tuple[Any, Any]]) -> List[torch.Tensor]:
        """Total derivatives of a weighted sum by each draw."""
        values = [draw.value for draw in self.draws]
        terms = [term for term in terms if getattr(term[0], "requires_grad", False)]
        if not terms:
            return self._clean([None] * len(values))
        roots, weights = zip(*terms)
        return self._clean(
            torch.autograd.grad(
                roots, values, weights, retain_graph=True, allow_unused=True
            )
        )

    def _clean(self, grads: Sequence[Optional[torch.Tensor]]) -> List[torch.Tensor]:
        """Zeros in the place of None, and where weights are zero: those need not be finite."""
        return [
            torch.zeros_like(draw.value)
            if grad is None
            else (torch.where(draw.broad_weight == 0.0, 0.0, grad) if self.has_zeros else grad)
            for draw, grad in zip(self.draws, grads)
        ]

    def _scale(self, shares: Shares, totals: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        triples = zip(self.draws, shares, totals)
        return [draw.factor(c) * total for draw, c, total in triples]
