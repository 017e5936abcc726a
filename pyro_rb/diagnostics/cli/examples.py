# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Two small models with the published data they are known for. ``python -m pyro_rb`` runs on
them when no model is given.
"""

from typing import Any, Callable, Dict, NamedTuple, Tuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational
# Statistics 6(4): effect of coaching on SAT scores in eight schools, and standard errors.
EIGHT_SCHOOLS_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
EIGHT_SCHOOLS_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

# Efron and Morris (1975), "Data analysis using Stein's estimator and its generalizations",
# Journal of the American Statistical Association 70(350): hits of 18 major league players
# in their first 45 at-bats of the season of 1970.
BASEBALL_HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)
BASEBALL_AT_BATS = 45


def eight_schools(effects: Tensor, errors: Tensor) -> None:
    """
    The non-centered hierarchical normal model of the eight schools.

    :param ~torch.Tensor effects: Estimated effects, ``[8]``, in points of the SAT.
    :param ~torch.Tensor errors: Their standard errors, ``[8]``.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0))
    with pyro.plate("schools", len(effects)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, errors), obs=effects)


def baseball(hits: Tensor, at_bats: int) -> None:
    """
    Batting averages, partially pooled on the log-odds scale (centered).

    :param ~torch.Tensor hits: Number of hits of each player, ``[18]``.
    :param int at_bats: Number of trials of each player.
    """
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("players", len(hits)):
        skill = pyro.sample("skill", dist.Normal(loc, scale))
        pyro.sample("hits", dist.Binomial(at_bats, logits=skill), obs=hits)


class Example(NamedTuple):
    """A model with data, to be compared on with AutoNormal."""

    title: str
    model: Callable
    make_args: Callable[[], Tuple[Any, ...]]
    learning_rate: float
    train_steps: int


EXAMPLES: Dict[str, Example] = {
    "eight_schools": Example(
        "Eight schools (Rubin 1981), hierarchical normal model, AutoNormal",
        eight_schools,
        lambda: (torch.tensor(EIGHT_SCHOOLS_EFFECTS), torch.tensor(EIGHT_SCHOOLS_ERRORS)),
        learning_rate=0.02,
        train_steps=1000,
    ),
    "baseball": Example(
        "Batting averages (Efron and Morris 1975), hierarchical logit model, AutoNormal",
        baseball,
        lambda: (torch.tensor(BASEBALL_HITS, dtype=torch.get_default_dtype()), BASEBALL_AT_BATS),
        learning_rate=0.02,
        train_steps=1000,
    ),
}
