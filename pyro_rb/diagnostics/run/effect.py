# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which coordinates of the parameters matter: :func:`find_effect`."""

from typing import Any, List

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_rb.diagnostics.run.problem import Problem
from pyro_rb.diagnostics.run.sites import run_traces
from pyro_rb.infer.generators import seed_generators

NUM_DRAWS = 4


def find_effect(problem: Problem, seed: int = 0) -> List[Tensor]:
    """
    For each parameter, which of its coordinates have an effect on the model's density, or on the
    probability of a site without a reparameterized draw, in any of a few draws. Where draws differ in what they
    look at, by minibatches, subsamples or discrete values, only parameters count as being without effect that no
    draw leads to: a few draws say nothing of rows that they did not see.

    Others only move the entropy of latent variables on which nothing depends, such as those that
    Pyro adds for observations that are masked: their noise is no hindrance to anything.

    :returns: Booleans of the shape of each parameter. All are true where there is no effect at all,
        or where it cannot be told.
    """
    tensors = list(problem.parameters.values())
    found = [torch.zeros_like(tensor, dtype=torch.bool) for tensor in tensors]
    differ = callable(problem.args) or problem.sites.has_subsample or bool(problem.sites.scored)
    for draw in range(NUM_DRAWS):
        seed_generators((seed + draw) % 2**32)
        try:
            with torch.enable_grad():
                total = _relevant_density(problem)
                # The graph may be shared with that of the losses.
                gradients = torch.autograd.grad(total, tensors, allow_unused=True, retain_graph=True)
        except (ValueError, RuntimeError, NotImplementedError):
            return [torch.ones_like(mask) for mask in found]
        for mask, gradient in zip(found, gradients):
            if gradient is not None:
                mask |= differ or gradient.to_dense() != 0  # also NaN
    return found if any(mask.any() for mask in found) else [torch.ones_like(mask) for mask in found]


def _relevant_density(problem: Problem) -> Tensor:
    guide_trace, model_trace = run_traces(problem.model, problem.guide, problem.args, problem.kwargs)
    total: Any = torch.zeros((), device=next(iter(problem.parameters.values())).device)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                if trace is model_trace or not getattr(site["fn"], "has_rsample", False):
                    total = total + site["log_prob_sum"]
    return total
