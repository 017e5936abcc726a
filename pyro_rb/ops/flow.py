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

from contextlib import contextmanager
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.distributions import Distribution, Normal, Transform

from pyro_rb.ops import affine_autoregressive, zuko
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
#: Of the copies of a draw that it is computed from in one go, their elements at most.
_CHUNK = 2**20


class Layer(NamedTuple):
    transform: Any
    x: torch.Tensor  # batch_shape + event_shape, detached
    y: torch.Tensor  # batch_shape + event_shape, detached


def has_no_inverse(transform: Transform) -> bool:
    """
    Whether a layer can be inverted only at its last draw.

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
    return known_name(transform) in _SLOW | _REMEMBERED or zuko.is_layer(transform)


def apply(transform: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    The output of a layer at ``x``, and the logarithm of the determinant.

    >>> apply(torch.distributions.ExpTransform(), torch.tensor(0.0))
    (tensor(1.), tensor(0.))
    """
    if zuko.is_layer(transform):
        y, log_det = transform.call_and_ladj(x)  # by one pass of the network
        return y, log_det
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def find_obstacle(layer: Layer) -> Optional[str]:
    """
    Why a layer cannot be solved; None if it can.

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
    if zuko.is_layer(transform):
        return _zuko
    name = known_name(transform)
    if name in ("Planar", "ConditionedPlanar"):
        return _planar
    if name == "AffineAutoregressive" and affine_autoregressive.find_network(transform.arn):
        return _affine_autoregressive
    return None


def _affine_autoregressive(layer: Layer, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    return affine_autoregressive.solve(layer.transform, layer.x, b)


def _zuko(layer: Layer, b: torch.Tensor) -> Tuple[torch.Tensor, str]:
    return zuko.solve(layer.transform, layer.x.expand(layer.y.shape), b)


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
    x, dim = layer.x.expand(layer.y.shape), layer.x.shape[-1]
    eye = torch.eye(dim + 1, dim, dtype=x.dtype, device=x.device)
    eye = eye.reshape((dim + 1,) + (1,) * (x.dim() - 1) + (dim,))
    is_last = (torch.arange(dim + 1, device=x.device) == dim).to(x.dtype)
    size = max(1, _CHUNK // max(1, x.numel()))
    rows = []
    for some, last in zip(eye.split(size), is_last.split(size)):
        with torch.enable_grad(), _undisturbed(layer.transform):
            copies = x.expand((len(some),) + x.shape).clone().requires_grad_()
            y, log_det = apply(layer.transform, copies)
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
