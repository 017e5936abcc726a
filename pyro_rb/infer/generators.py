# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The states of generators of random numbers, to be taken up again."""

from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state


def get_generators() -> Any:
    """The states of all generators of random numbers that Pyro and PyTorch use."""
    return get_rng_state(), _get_cuda()


def set_generators(states: Any) -> None:
    """
    Sets what :func:`get_generators` returned.

    >>> states = get_generators()
    >>> x = torch.rand(3)
    >>> set_generators(states)
    >>> torch.equal(torch.rand(3), x)
    True
    """
    state, cuda = states
    set_rng_state(state)
    _set_cuda(cuda)


def get_torch_generators() -> Any:
    """The states of PyTorch's generators only, which takes a few microseconds."""
    return torch.get_rng_state(), _get_cuda()


def set_torch_generators(states: Any) -> None:
    """
    Sets what :func:`get_torch_generators` returned.

    >>> states = get_torch_generators()
    >>> x = torch.rand(3)
    >>> set_torch_generators(states)
    >>> torch.equal(torch.rand(3), x)
    True
    """
    state, cuda = states
    torch.set_rng_state(state)
    _set_cuda(cuda)


def _get_cuda() -> Any:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def _set_cuda(states: Any) -> None:
    if states is not None:
        torch.cuda.set_rng_state_all(states)
