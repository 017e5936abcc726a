# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_rb.diagnostics.stats.projections import random_projections


def test_random_projections_keep_length_one():
    eye = torch.eye(6)
    directions = random_projections(eye, 4)
    assert directions.shape == (6, 4)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(4, dtype=torch.double))
    assert torch.equal(directions, random_projections(eye, 4))
    assert not torch.equal(directions, random_projections(eye, 4, seed=1))


def test_the_generator_is_left_alone():
    state = torch.get_rng_state()
    random_projections(torch.arange(6.0).reshape(3, 2), 2)
    assert torch.equal(state, torch.get_rng_state())
