# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.projections import Projector

COORDINATES = Coordinates(["a", "b"], [torch.zeros(2, 2), torch.zeros(2)])


def test_projections_of_the_whole_gradient_keep_length_one():
    eye = torch.eye(6)
    directions = Projector.of_all(COORDINATES, 4)(eye)
    assert directions.shape == (6, 4)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(4, dtype=torch.double, device="cpu"))
    assert torch.equal(directions, Projector.of_all(COORDINATES, 4)(eye))
    assert not torch.equal(directions, Projector.of_all(COORDINATES, 4, seed=1)(eye))


def test_the_generator_is_left_alone():
    state = torch.get_rng_state()
    Projector.of_all(COORDINATES, 2)(torch.arange(6.0))
    assert torch.equal(state, torch.get_rng_state())
