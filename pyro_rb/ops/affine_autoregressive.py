# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The linear system of an affine autoregressive layer, see :mod:`pyro_rb.ops.flow`.

Its Jacobian is ``J = diag(scale) + N`` with a nilpotent ``N``, so the iteration by ``(b - N^T a) / scale`` ends
after as many steps as there are dims, and reaches rounding long before. A small ``N`` is computed.
"""

from functools import partial
from typing import Any, List, Optional, Tuple

import torch
from torch.nn.functional import linear

from pyro_rb.ops.score_identity import known_name
from pyro_rb.ops.triangular import SMALL, iterate, substitute

_ELEMENTWISE = set("ELU GELU Identity LeakyReLU LogSigmoid ReLU SiLU Sigmoid Softplus Tanh".split())


def find_network(network: Any) -> Optional[Tuple[Any, Optional[torch.Tensor]]]:
    """
    :param network: the network of an affine autoregressive layer.
    :return: the network and its context, if its structure is known.

    >>> find_network(torch.nn.Linear(2, 2))
    """
    context = None
    if known_name(getattr(network, "func", None)) == "ConditionalAutoRegressiveNN":
        if network.args or [*network.keywords] != ["context"]:
            return None
        network, context = network.func, network.keywords["context"]
    elif known_name(network) != "AutoRegressiveNN":
        return None
    is_known = network.output_multiplier == 2 and known_name(network.f) in _ELEMENTWISE
    return (network, context) if is_known else None


def solve(transform: Any, x: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    """
    :param transform: an ``AffineAutoregressive`` of Pyro, whose network :func:`find_network` knows.
    :param x: its input, ``[*batch, dim]``.
    :param b: the derivative of the log density of ``x``, of its shape.
    :return: the derivative of the log density of the output by the output, and how it was found.

    >>> from pyro.distributions.transforms import affine_autoregressive
    >>> with torch.no_grad():
    ...     _, note = solve(affine_autoregressive(3), torch.zeros(5, 3), torch.ones(5, 3))
    >>> note
    '3 steps'
    """
    network = _Network(*find_network(transform.arn), x)  # type: ignore
    raw, by_mean = network.output(1), None
    if transform.stable:
        scale = torch.sigmoid(raw + transform.sigmoid_bias)
        by_mean = of_log_det = 1.0 - scale
        by_raw = scale * by_mean * (x - network.output(0))
    else:
        # The slope of the clamped scale is one everywhere, as it is to autograd.
        scale = raw.clamp(transform.log_scale_min_clip, transform.log_scale_max_clip).exp()
        by_raw, of_log_det = scale * x, torch.ones_like(scale)
    of_input: Any = partial(network.of_outputs, by_mean, by_raw, of_log_det)
    if x.dim() == 1:
        matrices, constants = network.fold(by_mean, by_raw, of_log_det)
        if x.numel() <= SMALL:
            rest = b - network.pull_back(constants)
            return substitute(network.pull_back(matrices), scale, rest, transform.arn.permutation), "substitution"
        of_input = partial(_add_products, constants, [m.t() for m in matrices])
    shrink = -scale.reciprocal()
    start = b / scale
    return iterate(lambda a: torch.addcmul(start, network.pull_back(of_input(a)), shrink), start, x.shape[-1])


def _add_products(
    constants: List[torch.Tensor], matrices: List[torch.Tensor], a: torch.Tensor
) -> List[torch.Tensor]:
    return [torch.addmv(constant, matrix, a) for constant, matrix in zip(constants, matrices)]


class _Network:
    """
    An autoregressive network at ``x``, for derivatives ``a`` by the draw, which come to its outputs as
    ``by_mean * a`` and ``by_raw * a + of_log_det``.
    """

    def __init__(self, network: Any, context: Optional[torch.Tensor], x: torch.Tensor) -> None:
        start = 0
        h = x
        if context is not None:
            start = context.shape[-1]
            h = torch.cat([context.expand(x.shape[:-1] + context.shape[-1:]), x], -1)
        weights = [layer.weight * layer.mask for layer in network.layers]
        self._slopes: List[torch.Tensor] = []
        #: What outputs are linear in: the last hidden units, and inputs that skip them.
        self._inputs = [h]
        for layer, weight in zip(network.layers, weights[:-1]):
            self._inputs[0], slope = _activate(network.f, linear(self._inputs[0], weight, layer.bias))
            self._slopes.append(slope)
        self._weights = [weights[0][:, start:], *weights[1:-1]]
        self._last = [weights[-1]]
        if network.skip_layer is not None:
            self._inputs.append(x)
            skip = network.skip_layer.weight * network.skip_layer.mask
            self._last.append(skip[:, start:])
        self._bias = network.layers[-1].bias
        if len(self._last) > 1 and start:
            self._bias = linear(h[..., :start], skip[:, :start], self._bias)

    def output(self, half: int) -> torch.Tensor:
        """
        :param half: 0 for the mean, 1 for the raw scale.
        """
        found = self._bias.chunk(2, -1)[half]
        for h, last in zip(self._inputs, self._last):
            found = linear(h, last.chunk(2)[half]) + found
        return found

    def of_outputs(self, by_mean: Any, by_raw: Any, of_log_det: Any, a: torch.Tensor) -> List[torch.Tensor]:
        """Derivatives by what outputs are linear in."""
        grad = torch.cat([a if by_mean is None else by_mean * a, torch.addcmul(of_log_det, by_raw, a)], -1)
        return [grad @ last for last in self._last]

    def fold(self, by_mean: Any, by_raw: Any, of_log_det: Any) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """What :meth:`of_outputs` multiplies the elements of ``a`` by, in rows, and adds."""
        halves = [last.chunk(2) for last in self._last]
        if by_mean is not None:
            halves = [(by_mean.unsqueeze(-1) * mean, raw) for mean, raw in halves]
        matrices = [torch.addcmul(mean, by_raw.unsqueeze(-1), raw) for mean, raw in halves]
        return matrices, [of_log_det @ raw for _, raw in halves]

    def pull_back(self, grads: List[torch.Tensor]) -> torch.Tensor:
        """From what :meth:`of_outputs` gives, derivatives by ``x``."""
        h = grads[0]
        for weight, slope in zip(self._weights[::-1], self._slopes[::-1]):
            h = (h * slope) @ weight
        return h + grads[1] if len(grads) > 1 else h


def _activate(f: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The value of an elementwise function, and its derivative."""
    if known_name(f) == "ReLU":
        y = x.relu()
        return y, y.sign()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]
