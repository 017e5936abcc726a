# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Flows, and their exact scores, which need no inverse either."""

from functools import partial

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.nn import AutoRegressiveNN
from torch.distributions import Independent

from pyro_rb.ops.score_identity import flat_parts, flat_transforms

# By dim, with the number of steps that a layer takes at most.
LAYERS = {
    "affine autoregressive": T.affine_autoregressive,
    "stable": partial(T.affine_autoregressive, stable=True),
    "deep": lambda d: T.affine_autoregressive(d, hidden_dims=[2 * d, 3 * d, 2 * d]),
    "skip": lambda d: T.AffineAutoregressive(
        AutoRegressiveNN(d, [2 * d], skip_connections=True, nonlinearity=torch.nn.Tanh())
    ),
    "clipped": lambda d: T.affine_autoregressive(d, log_scale_max_clip=0.05),
    "planar": T.planar,
    "radial": T.radial,
    "block": T.block_autoregressive,
    "block residual": partial(T.block_autoregressive, residual="gated", activation="ELU"),
    "neural": T.neural_autoregressive,
    "spline autoregressive": T.spline_autoregressive,
}
MIXED = {
    "permuted": lambda d: [T.affine_autoregressive(d), T.permute(d), T.affine_autoregressive(d)],
    "two of a kind": lambda d: [T.planar(d), T.planar(d)],
    "rotated": lambda d: [T.affine_autoregressive(d), T.householder(d, 2), T.radial(d)],
    "with coupling": lambda d: [T.affine_coupling(d), T.planar(d), T.spline_coupling(d)],
    "with elements": lambda d: [T.Spline(d), T.affine_autoregressive(d), T.SoftplusTransform()],
    "positive": lambda d: [T.planar(d), T.SigmoidTransform(cache_size=1)],
    "with an inverse": lambda d: [T.planar(d), T.affine_coupling(d).inv, T.radial(d)],
    "simplex": lambda d: [T.affine_autoregressive(d), T.StickBreakingTransform()],
    "composed": lambda d: T.ComposeTransformModule([T.planar(d), T.affine_autoregressive(d)]),
    "twice composed": lambda d: T.ComposeTransform([T.ComposeTransform([T.planar(d), T.permute(d)]), T.radial(d)]),
}
FLOWS = {**{name: lambda d, make=make: [make(d)] for name, make in LAYERS.items()}, **MIXED}


def stir(flow, scale=0.3, seed=0):
    """Moves parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    parts = flow if isinstance(flow, list) else [flow]
    for parameter in (p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu")
        parameter.data.add_(scale * noise.to(parameter.device))
    return flow


def modules_of(flow):
    return torch.nn.ModuleList(t for t in flat_parts(flow) if isinstance(t, torch.nn.Module))


def find_start(fn, value):
    """What a flow made a draw of. It must be the last one, untouched."""
    for t in reversed(flat_transforms(fn)):
        value = t.inv(value)
    return value.detach()


def exact_log_prob(fn, start, value):
    """
    The log density of a draw, with its derivatives by parameters and by the draw: the inverse
    is one step of Newton's method from where the draw came from, which is right to first order.

    :param fn: a flow.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return scale_and_mask(exact_log_prob(fn.base_dist, start, value), mask=fn._mask)
    if isinstance(fn, Independent):
        return sum_rightmost(exact_log_prob(fn.base_dist, start, value), fn.reinterpreted_batch_ndims)
    transforms, base = flat_transforms(fn), fn
    while flat_transforms(base):
        base = base.base_dist

    def forward(x):
        layers = []
        for t in transforms:
            y = t(x)
            layers.append((t, t.log_abs_det_jacobian(x, y)))
            x = y
        return x, layers

    batch = start.shape[: start.dim() - len(fn.event_shape)]
    with torch.enable_grad():
        x = start.clone().requires_grad_()
        y = forward(x)[0]
        # The last element of a simplex follows from the others.
        size = x.numel() // max(1, batch.numel())
        y = y.reshape(batch + (-1,))
        rows = [torch.autograd.grad(y[..., i].sum(), x, retain_graph=True)[0] for i in range(size)]
    jacobian = torch.stack([row.reshape(batch + (-1,)) for row in rows], -2)
    rest = (forward(start)[0] - value).reshape(batch + (-1,))[..., :size]
    x = start - torch.linalg.solve(jacobian, rest.unsqueeze(-1)).squeeze(-1).reshape(start.shape)
    log_prob = base.log_prob(x)
    log_prob = sum_rightmost(log_prob, log_prob.dim() - len(batch))
    for _, log_det in forward(x)[1]:
        log_prob = log_prob - sum_rightmost(log_det, log_det.dim() - len(batch))
    return log_prob


def exact_scores(guide, parameters, *args):
    """
    By site, the derivatives of its log density at fixed values, where it is a flow.

    :param guide: which is run with the random numbers at hand.
    """
    trace = poutine.trace(guide).get_trace(*args)
    starts = {
        name: find_start(site["fn"], site["value"])
        for name, site in trace.iter_stochastic_nodes()
        if flat_transforms(site["fn"])
    }
    values = trace.detach_() or trace
    again = poutine.trace(poutine.replay(guide, trace=values)).get_trace(*args)
    scores = {}
    for name, site in again.iter_stochastic_nodes():
        if not site["fn"].has_rsample or isinstance(site["fn"], dist.Delta):
            continue
        value = site["value"].detach()
        log_prob = exact_log_prob(site["fn"], starts[name], value) if name in starts else site["fn"].log_prob(value)
        log_prob = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
        scores[name] = torch.autograd.grad(log_prob, parameters, allow_unused=True, materialize_grads=True)
    return scores
