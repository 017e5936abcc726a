# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which coordinates of a gradient are followed: :class:`Coordinates`."""

from typing import List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

#: Of larger gradients a random subset of about this size is followed.
MOST = 2**18


class Coordinates:
    """
    The coordinates of a gradient on which statistics are made. They are drawn at random, the
    same number of each parameter, where there are too many to follow all. So the memory for
    statistics is bounded, and sums over a parameter's coordinates are estimated without bias.

    :param list names: Of the parameters.
    :param list tensors: The parameters.
    :param list used: For each parameter, booleans of its shape: which coordinates are of interest.
        Default: all.
    :param float most: About how many to follow, maybe infinity. Default: :data:`MOST`.

    **Example**

    >>> import torch
    >>> coordinates = Coordinates(["a", "b"], [torch.zeros(1000), torch.zeros(2)], most=20)
    >>> vector = coordinates.vector([torch.ones(1000), torch.ones(2)])
    >>> vector.shape, coordinates.sums(vector)
    (torch.Size([12]), tensor([1000.,    2.], dtype=torch.float64))
    """

    def __init__(
        self,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        used: Optional[Sequence[Tensor]] = None,
        most: Optional[float] = None,
    ) -> None:
        self.names, self.shapes = list(names), [tensor.shape for tensor in tensors]
        generator = torch.Generator().manual_seed(0)
        each = max(1.0, (MOST if most is None else most) / max(1, len(tensors)))
        self._indices: List[Optional[Tensor]] = []
        #: How many coordinates of each parameter are of interest, and how many are followed.
        self.sizes: List[int] = []
        self.counts: List[int] = []
        for number, tensor in enumerate(tensors):
            index = None if used is None or used[number].all() else used[number].flatten().nonzero()[:, 0]
            size = tensor.numel() if index is None else len(index)
            if size > each:
                chosen = torch.randint(size, (int(each),), generator=generator, device="cpu").unique()
                index = chosen.to(tensor.device) if index is None else index[chosen.to(tensor.device)]
            self._indices.append(index)
            self.sizes.append(size)
            self.counts.append(size if index is None else len(index))
        self.device = tensors[0].device
        #: The least exact of all.
        self.dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
        factors = [size / max(count, 1) for size, count in zip(self.sizes, self.counts)]
        self._factors = torch.tensor(factors, dtype=torch.double, device=self.device)

    @property
    def is_subset(self) -> bool:
        """Whether some coordinates of interest are not followed."""
        return self.counts != self.sizes

    def vector(self, gradients: Sequence[Tensor]) -> Tensor:
        """What is followed, ``[number followed]``, of gradients in the order of the parameters."""
        parts = [
            (g.reshape(-1) if index is None else g.reshape(-1)[index]).to(self.device)
            for g, index in zip(gradients, self._indices)
        ]
        return torch.cat(parts)

    def sums(self, vector: Tensor) -> Tensor:
        """Sums over each parameter's coordinates of interest, ``[number of parameters]``, in float64."""
        return torch.stack([part.sum() for part in vector.double().split(self.counts)]) * self._factors

    @property
    def weights(self) -> Tensor:
        """How many coordinates each one that is followed stands for, ``[number followed]``."""
        return self._factors.repeat_interleave(torch.tensor(self.counts, device=self.device))

    def label(self, place: int) -> str:
        """The name of the coordinate at a place of the vector."""
        for name, shape, count, index in zip(self.names, self.shapes, self.counts, self._indices):
            if place < count:
                return coordinate_name(name, shape, place if index is None else int(index[place]))
            place -= count
        raise IndexError(place)


def coordinate_name(name: str, shape: Sequence[int], index: int) -> str:
    """
    The element of a parameter at a position of the flattened tensor.

    >>> coordinate_name("loc", (2, 3), 4)
    'loc[1, 1]'
    >>> coordinate_name("scale", (), 0)
    'scale'
    """
    if not len(shape):
        return name
    position: List[str] = [str(int(i)) for i in np.unravel_index(index, tuple(shape))]
    return f"{name}[{', '.join(position)}]"
