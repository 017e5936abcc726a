# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import random

import numpy as np
import pyro
import pytest
import torch

from pyro_rb.infer import generators
from pyro_rb.infer.generators import (
    get_generators,
    get_torch_generators,
    seed_generators,
    set_generators,
    set_torch_generators,
)


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("has_accelerator", [False, True])
def test_seed_is_that_of_pyro(seed, has_accelerator, monkeypatch):
    if has_accelerator:
        monkeypatch.setattr(generators, "_has_accelerator", lambda: True)
    pyro.set_rng_seed(seed)
    expected = draw()
    draw()
    seed_generators(seed)
    assert draw() == expected


def test_states_are_taken_up_again():
    states = get_generators()
    expected = draw()
    set_generators(states)
    assert draw() == expected
    states = get_torch_generators()
    x = torch.rand(3)
    set_torch_generators(states)
    assert torch.equal(torch.rand(3), x)
