# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""ELBOs with a standard error, log weights, and bounds of several draws."""

import math

import pyro
import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights

from pyro_rb.infer import RVRSGuide

#: Draws evaluated at a time.
CHUNK = 2000


def log_weights(model, guide, num_samples, max_plate_nesting=1):
    """``log p - log q`` of draws of a guide of Pyro, ``[num_samples]``."""
    chunks = []
    with torch.no_grad():
        for _ in range(math.ceil(num_samples / CHUNK)):
            x, _, _ = vectorized_importance_weights(
                model,
                guide,
                num_samples=min(CHUNK, num_samples),
                max_plate_nesting=max_plate_nesting,
            )
            chunks.append(x)
    return torch.cat(chunks).double()


def elbo(model, guide, num_samples, max_plate_nesting=1):
    """
    :param guide: an RVRSGuide, or a guide of Pyro.
    :return: the ELBO, and its standard error.
    """
    if isinstance(guide, RVRSGuide):
        return guide.elbo(num_samples)
    return mean_of_draws(log_weights(model, guide, num_samples, max_plate_nesting))


def importance_bound(log_weights, dim=0):
    """The bound of as many draws as there are log weights along ``dim``: the log of their mean."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def mean_of_draws(x):
    """The mean of draws, and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


@torch.no_grad()
def log_joint(model, values, max_plate_nesting=1):
    """
    Log density of the model at many values of its latents, ``[num]``.

    :param dict values: each ``[num, *ones, *event]``, with a one for each plate dim.
    """
    num = len(next(iter(values.values())))
    with pyro.plate("values", num, dim=-1 - max_plate_nesting):
        trace = poutine.trace(poutine.condition(model, values)).get_trace()
    trace.compute_log_prob()
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return sum(s["log_prob"].expand((num,) + s["log_prob"].shape[1:]).reshape(num, -1).sum(-1) for s in sites)
