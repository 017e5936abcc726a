# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The states of generators of random numbers, to be taken up again."""

import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_seed, set_rng_state


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


def seed_generators(seed: int) -> None:
    """
    Does what :func:`pyro.set_rng_seed` does. Without a GPU that takes half a millisecond, as PyTorch keeps the seed,
    with the stack, for one that may come; this takes some microseconds.

    >>> seed_generators(0)
    >>> x = torch.rand(3)
    >>> set_rng_seed(0)
    >>> torch.equal(torch.rand(3), x)
    True
    """
    if _has_accelerator():
        set_rng_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@lru_cache(maxsize=None)
def _has_accelerator() -> bool:
    return not hasattr(torch, "accelerator") or torch.accelerator.is_available()


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
