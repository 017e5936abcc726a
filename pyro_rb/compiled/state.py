# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a run of model and guide moves, and how to put it back."""

from typing import Any, Sequence

import torch

from pyro_rb.infer.generators import get_generators, set_generators


class State:
    """
    Random number generators and buffers as they are now.

    :param buffers: tensors that a run may change in place.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = list(buffers)
        self._values = [b.detach().clone() for b in buffers]
        self._generators = get_generators()

    def restore(self) -> None:
        """Puts everything back. A tensor that has not changed is not written to."""
        set_generators(self._generators)
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._values):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    def random_python(self) -> Any:
        """Of Python and NumPy."""
        state = self._generators[0]
        numpy = state["numpy"]
        return state["random"], numpy[1].tobytes(), *numpy[2:]

    def compare(self) -> str:
        """What is not as it was; empty if nothing is."""
        other = State(self._buffers)
        for a, b in zip(self._values, other._values):
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True):
                return "a buffer was changed in another way"
        (state, cuda), (other_state, other_cuda) = self._generators, other._generators
        mine = [state["torch"], *(cuda or [])]
        theirs = [other_state["torch"], *(other_cuda or [])]
        if not all(map(torch.equal, mine, theirs)):
            return "another number of random numbers was drawn"
        return ""
