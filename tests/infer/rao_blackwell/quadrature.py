# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The exact gradient of the ELBO of a small model, by a sum over all values of the discrete
guide sites and a quadrature rule for each of the others.

The index of a node is one more discrete site, that ``TraceEnum_ELBO`` sums over.
"""

import math
from typing import Any, Dict, Tuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from tests.support.cases import Case

LOG_RANGE = (-13.0, 5.0)  # of positive values that have no reparameterized draw


class Nodes(Messenger):
    """
    Puts the nodes of a rule in the place of a guide site's draw: of Gauss and Hermite for
    what is made of a scalar normal; the ``2 n`` that are exact for polynomials of the third
    degree for a normal vector; all values of a discrete vector; and an even grid of logarithms for
    other positive values.

    :param dict sizes: numbers of nodes of the sites; any for vectors.
    """

    def __init__(self, sizes: Dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.sizes or msg["is_observed"]:
            return
        fn = msg["fn"]
        points, log_weight = make_rule(fn, self.sizes[msg["name"]])
        # A mask takes the index out of the ELBO, and leaves its probability.
        with poutine.mask(mask=False):
            options = {"enumerate": "parallel", "is_auxiliary": True}
            index = pyro.sample(f"{msg['name']}_node", dist.Categorical(logits=log_weight), infer=options)
        msg["value"] = reparameterize(fn, points[index]) if fn.has_rsample else points[index]


def make_rule(fn: Any, size: int) -> Tuple[Tensor, Tensor]:
    """Points ``[size, *event]``, of the noise or of the value, and log weights ``[*batch, size]``."""
    (event,) = fn.event_shape or (0,)
    if fn.has_rsample and not event:
        points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(size))
        return points, weights.log()
    if fn.has_rsample:
        return math.sqrt(event) * torch.cat([torch.eye(event), -torch.eye(event)]), torch.zeros(2 * event)
    if event:
        support = fn.base_dist.enumerate_support(expand=False).flatten()
        points = torch.cartesian_prod(*[support] * event)
    else:
        points = torch.linspace(*LOG_RANGE, size).exp()
    values = points.reshape(points.shape[:1] + (1,) * len(fn.batch_shape) + fn.event_shape)
    log_weight = fn.log_prob(values).detach().movedim(0, -1)
    return points, log_weight if event else log_weight + points.log()


def reparameterize(fn: Any, noise: Tensor) -> Tensor:
    """The draw that a distribution makes of standard normal noise."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    transforms = getattr(fn, "transforms", [])
    base = fn.base_dist if transforms else fn
    value = base.loc + base.scale * noise
    for transform in transforms:
        value = transform(value)
    return value


def exact_loss(case: Case, nesting: int, sizes: Dict[str, int]) -> Tensor:
    """
    :param int nesting: number of dims for plates.
    :param dict sizes: as of :class:`Nodes`.
    """
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)
    # Score functions of nodes are weighed as those of draws would be.
    return elbo.differentiable_loss(case.model, Nodes(sizes)(config_enumerate(case.guide)), *case.args)
