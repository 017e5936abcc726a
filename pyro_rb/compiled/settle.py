# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
from typing import Any, Iterator, List, Sequence, Tuple

import torch

from pyro_rb.compiled.torch_private import outside_of_graph
from pyro_rb.infer.path_mixin import PathGradientMixin


class Learning:
    """
    Keeps what a loss learns out of a graph: scales go in as tensors, and what is learned of
    comes out.

    :param elbo: a loss.
    :param bool learns: whether it is to learn at the steps of the graph.
    """

    def __init__(self, elbo: Any, learns: bool) -> None:
        self._elbo = elbo if isinstance(elbo, PathGradientMixin) else None
        self.learns = learns
        self.scales: List[Tuple[Any, torch.Tensor]] = []
        #: Path gradients and scores, and the parameters of each group.
        self.outputs: List[torch.Tensor] = []
        self._groups: List[Sequence[torch.Tensor]] = []

    def settle(self, elbo: Any) -> Any:
        """A copy of the loss that learns nothing by itself."""
        return copy.copy(elbo) if self._elbo is None else self._elbo._settled(self)

    def give(self, moments: Any) -> torch.Tensor:
        for known, tensor in self.scales:
            if known is moments:
                return tensor
        with outside_of_graph():
            tensor = torch.tensor(moments.scale, dtype=torch.float64, device=moments.device)
        self.scales.append((moments, tensor))
        return tensor

    def note(self, parameters: Sequence[Any], path: Sequence[Any], score: Sequence[Any]) -> None:
        self._groups.append(parameters)
        self.outputs.extend([*path, *score])

    def take_scales(self) -> None:
        """Uses what the loss has learned so far."""
        for moments, tensor in self.scales:
            tensor.fill_(moments.scale)

    def is_due(self, num_steps: int) -> bool:
        """Whether the loss is to learn at one of the next steps."""
        return any(moments.steps_left < num_steps for moments, _ in self.scales)

    def count_steps(self, num_steps: int, outputs: Sequence[torch.Tensor] = ()) -> None:
        """
        Counts steps that the graph has made.

        :param outputs: of the graph, in the place of :attr:`outputs`.
        """
        if self._elbo is None:
            return
        self._elbo._count_steps(num_steps)
        for moments, _ in self.scales:
            moments.steps_left -= num_steps
        found: Iterator[torch.Tensor] = iter(outputs)
        for parameters in self._groups:
            path, score = ([next(found) for _ in parameters] for _ in range(2))
            self._elbo._adaptive.find(parameters).update(path, score)
