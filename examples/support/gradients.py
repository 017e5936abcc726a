# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of gradients, and ratios of their variances."""

import torch

from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.stats import summary as stats


def draw_gradients(loss, model, guide, args, num_samples, parts=("loc", "scale"), named=None, num_burn_in=2):
    """
    Draws of the gradient, ``[num_samples, number of values]``, by part: the parameters
    that have it in their names; by default among those of the guide.

    :param int num_burn_in: of steps. The first ones of R2G2_ELBO find out what may not be projected, and losses
        with a scale learn it.
    """
    named = named or dict(guide.named_parameters())
    draws = sample_gradients(
        loss, model, guide, args, num_samples=num_samples, num_burn_in=num_burn_in, seed=0, parameters=named
    )
    flat = {name: g.reshape(num_samples, -1) for name, g in draws.items()}
    return {part: torch.cat([g for name, g in flat.items() if part in name], -1) for part in parts}


def variance_ratio(above, below):
    """Of two sets of draws, and its standard error: how many draws below one above needs."""
    squares = [(g.double() - g.double().mean(0)).square().sum(-1) for g in (above, below)]
    return stats.ratio_of_means(*squares)
