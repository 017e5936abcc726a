# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
from typing import Any, List, Tuple

import torch

from pyro_rb.compiled.torch_private import outside_of_graph
from pyro_rb.infer.path_mixin import PathGradientMixin


def settle(elbo: Any) -> Tuple[Any, List[Tuple[Any, torch.Tensor]]]:
    """
    :param elbo: a loss.
    :return: a copy that learns nothing, with each scale of a score as a tensor; and a list
        that is going to have what was learned of each scale, and its tensor.
    """
    scales: List[Tuple[Any, torch.Tensor]] = []

    def give_scale(moments: Any) -> torch.Tensor:
        for known, tensor in scales:
            if known is moments:
                return tensor
        with outside_of_graph():
            tensor = torch.tensor(moments.scale, dtype=torch.float64)
        scales.append((moments, tensor))
        return tensor

    is_ours = isinstance(elbo, PathGradientMixin)
    return elbo._settled(give_scale) if is_ours else copy.copy(elbo), scales
