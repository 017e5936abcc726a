# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The derivative of the log density of a flow by its draw, from the forward pass [1].

A draw ``y`` of a layer ``T`` at ``x`` has the log density of ``x`` less ``log|det J|``, with ``J = dy/dx``. With ``b``
the derivative of the former by ``x``, the derivative ``a`` of the log density by ``y`` at fixed parameters solves

.. math:: J^\\top a = b - \\partial \\log|\\det J| / \\partial x

Nothing is inverted but ``J``, whose structure is known for the usual layers.

[1] Lorenz Vaitl, Kim A. Nicoli, Shinichi Nakajima, Pan Kessel (2022), "Gradients should stay on path: better
estimators of the reverse- and forward KL divergence for normalizing flows". https://arxiv.org/abs/2207.08219
"""

import math
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.distributions import Distribution, Normal, Transform
from torch.nn.functional import linear

from pyro_rb.ops.family import is_exactly, strip_independent
from pyro_rb.ops.score_identity import known_name

#: Layers whose inverse takes a step for each dim.
_SLOW = {"AffineAutoregressive", "SplineAutoregressive"}
#: Layers that can be inverted at their own draws only, as these are remembered.
_REMEMBERED = set(
    "BlockAutoregressive ConditionedPlanar ConditionedRadial NeuralAutoregressive Planar Radial".split()
)
#: The largest Jacobian, by dims, that is computed as a matrix.
MAX_DENSE = 128
#: The largest autoregressive one, where a single draw has fewer rows than iterations would take time for.
_SMALL = 64
#: Of the copies of a draw that it is computed from in one go, their elements at most.
_CHUNK = 2**20


class Layer(NamedTuple):
    transform: Any
    x: torch.Tensor  # batch_shape + event_shape, detached
    y: torch.Tensor  # batch_shape + event_shape, detached


def has_no_inverse(transform: Transform) -> bool:
    """
    Whether a layer can be inverted at its last draw only.

    >>> has_no_inverse(torch.distributions.ExpTransform())
    False
    """
    return known_name(transform) in _REMEMBERED


def is_forward_only(transform: Transform) -> bool:
    """
    Whether the inverse at a value that is given is slow, or there is none.

    >>> is_forward_only(torch.distributions.ExpTransform())
    False
    """
    return known_name(transform) in _SLOW | _REMEMBERED


def find_obstacle(layer: Layer) -> Optional[str]:
    """
    Why a layer cannot be solved, if so.

    >>> find_obstacle(Layer(torch.distributions.ExpTransform(), torch.zeros(200), torch.ones(200)))
    """
    transform, dim = layer.transform, layer.x.shape[-1] if layer.x.dim() else 1
    if dim <= MAX_DENSE or not is_forward_only(transform) or _find_structure(transform):
        return None
    return f"the Jacobian of {known_name(transform)} has {dim} rows, more than {MAX_DENSE}"


def differentiate(base: Distribution, layers: Sequence[Layer]) -> Tuple[torch.Tensor, List[str]]:
    """
    :param base: the distribution of the first ``x``.
    :param layers: each with the draw of the one before it.
    :return: the derivative of the log density by the last ``y``, of its shape; and how each of the layers
        without a fast inverse was solved.

    >>> layer = Layer(torch.distributions.ExpTransform(), torch.tensor(0.0), torch.tensor(1.0))
    >>> differentiate(Normal(0.0, 1.0), [layer])
    (tensor(-1.), [])
    """
    notes: List[str] = []
    with torch.no_grad():
        a = _differentiate_base(base, layers[0].x)
        for layer in layers:
            if not is_forward_only(layer.transform):
                a = _through_inverse(layer, a)
                continue
            structure = _find_structure(layer.transform)
            a, note = structure(layer, a) if structure else _dense(layer, a)
            notes.append(note)
    return a, notes


def _differentiate_base(base: Distribution, x: torch.Tensor) -> torch.Tensor:
    normal = strip_independent(base)
    if is_exactly(normal, Normal):
        return (normal.loc - x) / normal.scale.square()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_prob = base.log_prob(x)
        return torch.autograd.grad(log_prob, x, torch.ones_like(log_prob))[0]


def _find_structure(transform: Any) -> Any:
    name = known_name(transform)
    if name in ("Planar", "ConditionedPlanar"):
        return _planar
    if name == "AffineAutoregressive" and _find_network(transform) is not None:
        return _affine_autoregressive
    return None


@contextmanager
def _undisturbed(transform: Any) -> Iterator[None]:
    """Within, transforms may remember other draws than their last ones."""
    transforms = [t for t in (transform, getattr(transform, "_inv", None)) if isinstance(t, Transform)]
    modules = [m for t in transforms if isinstance(t, torch.nn.Module) for m in t.modules()]
    states = [(vars(t), dict(vars(t))) for t in [*transforms, *modules]]
    try:
        yield
    finally:
        for state, before in states:
            state.update(before)


def _through_inverse(layer: Layer, b: torch.Tensor) -> torch.Tensor:
    transform = layer.transform
    with torch.enable_grad(), _undisturbed(transform):
        y = layer.y.detach().requires_grad_()
        x = transform.inv(y)
        log_det = transform.log_abs_det_jacobian(x, y)
        outputs, grads = [x], [b]
        if log_det.requires_grad:
            outputs.append(log_det)
            grads.append(-torch.ones_like(log_det))
        return torch.autograd.grad(outputs, y, grads)[0]


def _dense(layer: Layer, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    """The rows of the Jacobian from copies of the draw, and one copy for its determinant."""
    x, dim = layer.x, layer.x.shape[-1]
    eye = torch.eye(dim + 1, dim, dtype=x.dtype, device=x.device)
    eye = eye.reshape((dim + 1,) + (1,) * (x.dim() - 1) + (dim,))
    is_last = (torch.arange(dim + 1, device=x.device) == dim).to(x.dtype)
    size = max(1, _CHUNK // max(1, x.numel()))
    rows = []
    for some, last in zip(eye.split(size), is_last.split(size)):
        with torch.enable_grad(), _undisturbed(layer.transform):
            copies = x.expand((len(some),) + x.shape).clone().requires_grad_()
            y = layer.transform(copies)
            log_det = layer.transform.log_abs_det_jacobian(copies, y)
            last = last.reshape((-1,) + (1,) * (log_det.dim() - 1)).expand_as(log_det)
            rows.append(torch.autograd.grad([y, log_det], copies, [some.expand_as(y), last])[0])
    *jacobian, of_log_det = torch.cat(rows)
    transposed = torch.stack(jacobian, -1)  # [*batch, x, y]
    # Without a look at the result, at which an accelerator would wait.
    a = torch.linalg.solve_ex(transposed, (b - of_log_det).unsqueeze(-1)).result.squeeze(-1)
    return a, f"a Jacobian of {dim} rows"


def _planar(layer: Layer, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    """``J = I + u h' w^T`` with ``h = tanh(w x + bias)``: all corrections are along ``w``."""
    transform, x = layer.transform, layer.x
    params = transform._params
    bias, u, w = params() if callable(params) else params
    u = transform.u_hat(u, w)
    h = torch.tanh((w * x).sum(-1, keepdim=True) + bias)
    slope = 1.0 - h.square()
    rest, along = (u * b).sum(-1, keepdim=True), (u * w).sum(-1, keepdim=True)
    det = 1.0 + slope * along
    # By Sherman and Morrison, with the derivative of log(det) along w.
    return b - w * slope * (rest - 2.0 * along * h / det) / det, "rank one"


def _find_network(transform: Any) -> Optional[Tuple[Any, Optional[torch.Tensor]]]:
    """The masked network of an autoregressive layer, and its context."""
    network, context = transform.arn, None
    if known_name(getattr(network, "func", None)) == "ConditionalAutoRegressiveNN":
        if network.args or [*network.keywords] != ["context"]:
            return None
        network, context = network.func, network.keywords["context"]
    elif known_name(network) != "AutoRegressiveNN":
        return None
    return (network, context) if network.output_multiplier == 2 else None


def _affine_autoregressive(layer: Layer, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    """
    ``J = diag(scale) + N`` with a nilpotent ``N``, so that the iteration by ``(b - N^T a) / scale`` ends after
    as many steps as there are dims, and at rounding long before. A small ``N`` is computed.
    """
    transform, x = layer.transform, layer.x
    network = _Network(*_find_network(transform), x)  # type: ignore
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
        if x.numel() <= _SMALL:
            rest = b - network.pull_back(constants)
            return _substitute(network.pull_back(matrices), scale, rest, transform.arn.permutation), "substitution"
        of_input = partial(_add_products, constants, [m.t() for m in matrices])
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-13
    shrink = -scale.reciprocal()
    start = a = b / scale
    for step in range(1, x.shape[-1] + 1):
        last = a
        a = torch.addcmul(start, network.pull_back(of_input(a)), shrink)
        # Fewer steps are never enough. Each look at a number makes an accelerator wait.
        if step > 2 and (x.device.type == "cpu" or step % 8 == 0):
            change, size = [torch.linalg.vector_norm(v, math.inf, -1) for v in (a - last, a)]
            if (change <= tolerance * size).all():
                break
    return a, f"{step} steps"


def _substitute(
    rows: torch.Tensor, diagonal: torch.Tensor, b: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Solves with the transpose of a matrix that is triangular in some order of its rows and columns."""
    rows = rows[order][:, order]
    rows.diagonal().copy_(diagonal[order])
    a = torch.empty_like(b)
    a[order] = torch.linalg.solve_triangular(rows.t(), b[order].unsqueeze(-1), upper=True).squeeze(-1)
    return a


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
