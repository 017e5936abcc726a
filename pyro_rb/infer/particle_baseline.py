# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Leave-one-out baselines over particles, for sites of which each particle has one draw.

Their scores have to wait until the costs of all particles are known.
"""

from collections import defaultdict
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from pyro_rb.ops.topk_baseline import particle_baseline


class Draw(NamedTuple):
    """A site that was drawn once in a run. Tensors are laid out as its ``log_prob``."""

    name: str
    #: Weight times downstream cost, detached.
    grad: Tensor
    #: Weight, detached: not 1 where other sites are enumerated.
    weight: Tensor
    #: ``log q``, with its graph.
    score: Tensor
    #: The dim of vectorized particles. None if a run has one particle.
    dim: Optional[int]
    #: Whether an element is another one in the next particle.
    is_subsampled: bool


def compute_scores(draws: Iterable[Tuple[int, Draw]]) -> Any:
    """
    :param draws: with the number of the particle, which has several draws at a site where
        another site is enumerated in a loop.
    :return: a scalar whose value is 0 and whose gradient is the score part.
    """
    by_name: Dict[str, Dict[int, List[Draw]]] = defaultdict(lambda: defaultdict(list))
    for particle, draw in draws:
        by_name[draw.name][particle].append(draw)
    total: Any = 0.0
    for by_particle in by_name.values():
        particles = list(by_particle.values())
        for same, baseline in zip(particles, _baselines(particles)):
            for draw in same:
                coefficient = draw.grad - draw.weight * baseline
                score = coefficient * draw.score.masked_fill(coefficient == 0, 0.0)
                total = total + score.sum()
    return total - total.detach() if isinstance(total, Tensor) else total


def _baselines(particles: List[List[Draw]]) -> Iterable[Tensor]:
    """
    For each particle the mean cost of the others.

    The draws of a particle are added up before. They may share a draw, on which the weight
    of each depends, though not that of all.
    """
    first = particles[0][0]
    shapes = {draw.grad.shape for same in particles for draw in same}
    is_paired = len(shapes) == 1 and (first.dim is not None or not first.is_subsampled)

    def add_up(tensors: Iterable[Tensor]) -> Tensor:
        # Where elements have no counterparts, there is one mean for all.
        return sum(x if is_paired else _sum_others(x, first.dim) for x in tensors)  # type: ignore

    grads = [add_up(draw.grad for draw in same) for same in particles]
    weights = [add_up(draw.weight for draw in same) for same in particles]
    if first.dim is not None:
        return (particle_baseline(g, w, first.dim) for g, w in zip(grads, weights))
    return particle_baseline(torch.stack(grads), torch.stack(weights), 0)


def _sum_others(x: Tensor, dim: Optional[int]) -> Tensor:
    """The sum over all dims but one."""
    if dim is None:
        return x.sum()
    return x.movedim(dim, 0).flatten(1).sum(-1).reshape((-1,) + (1,) * (-1 - dim))
