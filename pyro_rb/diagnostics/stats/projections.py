# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Random projections of gradients. A direction mixes all coordinates, so that events too rare
for a test of their own coordinate (categories that were never drawn) add to sums that are
near normal.
"""

import math
from typing import List, Mapping, Optional

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats.coordinates import Coordinates

EACH = 4  # of each parameter


def random_directions(size: int, count: int, generator: torch.Generator) -> Tensor:
    """
    Directions of length one.

    :returns: A tensor of shape ``[size, count]``, in float64 on the CPU, so that they are the
        same on each device.
    :rtype: ~torch.Tensor
    """
    directions = torch.randn(size, count, generator=generator, dtype=torch.double, device="cpu")
    return directions / directions.norm(dim=0)


def random_projections(samples: Tensor, num_projections: int, seed: int = 0) -> Tensor:
    """
    Projects each draw on random directions of length one. A direction mixes all
    coordinates, so that events too rare for a z-test of their own coordinate (categories
    that were never drawn) add to tests that are near normal.

    :param ~torch.Tensor samples: ``[N, *shape]``.
    :param int num_projections: Number of directions, the same for the same seed and size.
    :returns: A tensor of shape ``[N, num_projections]``.
    :rtype: ~torch.Tensor
    """
    flat = samples.detach().double().reshape(len(samples), -1)
    directions = random_directions(flat.shape[1], num_projections, torch.Generator().manual_seed(seed))
    return flat @ directions.to(flat.device)


def project(samples: Mapping[str, Tensor], num_projections: int) -> Tensor:
    """Random projections ``[N, num_projections]`` of all parameters side by side."""
    rows = [rows.double().reshape(len(rows), -1) for rows in samples.values()]
    return random_projections(torch.cat(rows, dim=1), num_projections)


class Projector:
    """
    A few random projections of each parameter's gradient. Parameters with no more
    coordinates than that are left as they are.

    :param Coordinates coordinates: What is followed of the gradients.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels: List[str] = []
        self.sizes = coordinates.counts
        self._directions: List[Optional[Tensor]] = []
        widths: List[float] = []
        for name, size in zip(coordinates.names, self.sizes):
            count = min(size, EACH)
            directions = None
            if size > EACH:
                directions = random_directions(size, count, generator).to(coordinates.device)
            self._directions.append(directions)
            self.labels += [name] * count
            widths += [math.sqrt(size) if size > EACH else 1.0] * count
        #: A bias has this many times its projection's size, typically.
        self.widths = torch.tensor(widths, dtype=torch.double, device="cpu")

    def __call__(self, vector: Tensor) -> Tensor:
        """``[Q]`` to ``[number of projections]``, on the CPU."""
        parts = [
            part if directions is None else part @ directions
            for part, directions in zip(vector.double().split(self.sizes), self._directions)
        ]
        return torch.cat(parts).cpu()
