# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Callable, Tuple

import torch


def iterate(
    step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, num_steps: int
) -> Tuple[torch.Tensor, str]:
    """
    The fixed point of an affine map whose linear part is nilpotent, for one vector or a batch, at rounding.

    :param step: the map.
    :param start: ``[*batch, dim]``.
    :param num_steps: after which the map is constant.
    :return: the fixed point, of the shape of ``start``, and how it was found.

    >>> iterate(lambda a: torch.stack([a[1], torch.tensor(3.0)]), torch.zeros(2), 2)
    (tensor([3., 3.]), '2 steps')
    """
    tolerance = 1e-6 if start.dtype == torch.float32 else 1e-13
    a, count = start, 0
    for count in range(1, num_steps + 1):
        last = a
        a = step(a)
        # Fewer steps are never enough. Each look at a number makes an accelerator wait.
        if count > 2 and (a.device.type == "cpu" or count % 8 == 0):
            change, size = [torch.linalg.vector_norm(v, math.inf, -1) for v in (a - last, a)]
            if (change <= tolerance * size).all():
                break
    return a, f"{count} step" + "s" * (count != 1)
