# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Random projections of gradients. A direction mixes all coordinates, so that events too rare
for a test of their own coordinate (categories that were never drawn) add to sums that are
near normal.
"""

import math
from typing import List, Optional

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


class Projector:
    """
    A few random projections of each parameter's gradient. Parameters with no more
    coordinates than that are left as they are.

    :param Coordinates coordinates: What is followed of the gradients.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = coordinates.counts
        self._labels: List[str] = []
        self._directions: List[Optional[Tensor]] = []
        widths: List[float] = []
        for name, size in zip(coordinates.names, self.sizes):
            few = size <= EACH
            self._directions.append(None if few else random_directions(size, EACH, generator).to(coordinates.device))
            self._labels += [name] * min(size, EACH)
            widths += [1.0] * size if few else [math.sqrt(size)] * EACH
        #: A bias has this many times its projection's size, typically.
        self.widths = torch.tensor(widths, dtype=torch.double, device="cpu")

    @classmethod
    def of_all(cls, coordinates: Coordinates, count: int, seed: int = 0) -> "Projector":
        """Projections of the whole gradient, of all parameters side by side."""
        found = cls.__new__(cls)
        size = sum(coordinates.counts)
        generator = torch.Generator().manual_seed(seed)
        found.sizes = [size]
        found._directions = [random_directions(size, count, generator).to(coordinates.device)]
        found._labels = [f"projections[{number}]" for number in range(count)]
        found.widths = torch.ones(count, dtype=torch.double, device="cpu")
        return found

    def __len__(self) -> int:
        """The number of projections."""
        return len(self.widths)

    def label(self, number: int) -> str:
        """The parameter of a projection."""
        return self._labels[number]

    def __call__(self, vectors: Tensor) -> Tensor:
        """``[*, Q]`` to ``[*, number of projections]``, on the CPU."""
        parts = [
            part if directions is None else part @ directions
            for part, directions in zip(vectors.double().split(self.sizes, -1), self._directions)
        ]
        return torch.cat(parts, -1).cpu()
