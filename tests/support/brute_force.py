# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The exact loss of a guide with discrete sites, over all of their joint values."""

import itertools
import math
from typing import Any, Dict, Iterator

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from tests.support.cases import Case


def _values(site: Any) -> Iterator[torch.Tensor]:
    fn, shape = site["fn"], site["value"].shape
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    support = fn.enumerate_support(expand=False)
    support = support.reshape(support.shape[:1] + fn.event_shape)
    size = math.prod(shape[: len(shape) - len(fn.event_shape)])
    for index in itertools.product(range(len(support)), repeat=size):
        yield support[torch.tensor(index, dtype=torch.long)].reshape(shape)


def exact_loss(case: Case) -> torch.Tensor:
    """
    Minus the ELBO, by running model and guide at each joint value. Neither may draw
    anything else, nor may the shapes of sites depend on values.
    """
    trace = prune_subsample_sites(poutine.trace(case.guide).get_trace(*case.args))
    latents = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    elbo: Any = 0.0
    for values in itertools.product(*(list(_values(site)) for site in latents.values())):
        data = dict(zip(latents, values))
        guide, model = (
            poutine.trace(poutine.condition(f, data=data)).get_trace(*case.args)
            for f in (case.guide, case.model)
        )
        cost = model.log_prob_sum() - guide.log_prob_sum()
        guide.compute_log_prob()
        log_q = sum(guide.nodes[name]["unscaled_log_prob"].sum() for name in latents)
        elbo = elbo + log_q.exp() * cost
    return -elbo


def exact_gradient(case: Case) -> Dict[str, torch.Tensor]:
    parameters = case.parameters()
    grads = torch.autograd.grad(exact_loss(case), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads)
    }
