# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_rb.diagnostics.stats.progress import noise_share, root_sum_of_squares
from pyro_rb.diagnostics.stats.progress import steps_ratio as steps_ratio_blocks

BASE = torch.tensor([4.0, 100.0]).expand(6, 2)
SIGNAL = torch.tensor([0.2, 0.0])


def steps_ratio(*args):
    """With its standard error."""
    ratio, blocks = steps_ratio_blocks(*args)
    return ratio, root_sum_of_squares(blocks)


def test_each_coordinate_counts_the_same():
    """However large the variance of one parameter is."""
    blocks = torch.tensor([1.0, 100.0]).expand(6, 2)
    ratio, error = steps_ratio(blocks, BASE, torch.zeros(2), [3, 1])
    assert ratio == pytest.approx((3 * 0.25 + 1) / 4) and error == 0


def test_units_do_not_matter():
    units = torch.tensor([1e-6, 1e6])
    blocks, signal = torch.rand(6, 2), torch.rand(2)
    expected = steps_ratio(blocks, BASE, signal, [3, 1])
    assert steps_ratio(units * blocks, units * BASE, units * signal, [3, 1]) == pytest.approx(expected)


def test_noise_matters_less_where_there_is_signal():
    blocks = 10 * BASE
    assert steps_ratio(blocks, BASE, torch.zeros(2), [1, 1])[0] == pytest.approx(10.0)
    assert steps_ratio(blocks, BASE, 1e6 * BASE[0], [1, 1])[0] == pytest.approx(1.0, abs=1e-4)
    assert noise_share(BASE, torch.zeros(2), [1, 1]) == 1.0
    assert noise_share(BASE, 3 * BASE[0], [1, 1]) == pytest.approx(0.25)


def test_parameters_without_gradient_are_left_out():
    base = torch.tensor([4.0, 0.0]).expand(6, 2)
    assert steps_ratio(base / 2, base, torch.zeros(2), [1, 50]) == (0.5, 0.0)
    assert noise_share(base, torch.zeros(2), [1, 50]) == 1.0
    assert steps_ratio(0 * base, 0 * base, torch.zeros(2), [1, 50]) == (1.0, 0.0)
    assert noise_share(0 * base, torch.zeros(2), [1, 50]) == 0.0
    # Noise where the reference has none.
    ratio, error = steps_ratio(BASE, base, torch.zeros(2), [1, 50])
    assert ratio == math.inf and math.isnan(error)


def test_standard_error_is_that_of_repetition():
    def repeat():
        common = torch.rand(20, 2)
        blocks = 0.3 * common + 0.1 * torch.rand(20, 2)
        return steps_ratio(blocks, common, torch.tensor([0.2, 0.0]), [3, 1])

    ratios, errors = zip(*[repeat() for _ in range(400)])
    spread = torch.tensor(ratios).std().item()
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.15)


def test_one_block():
    assert math.isnan(steps_ratio(BASE[:1], BASE[:1], torch.zeros(2), [1, 1])[1])


def test_most_of_the_error_is_common_to_losses_with_the_same_draws():
    def repeat():
        common = torch.rand(20, 2)
        listed = [share * common.square() + 0.01 * torch.rand(20, 2) for share in (0.30, 0.33)]
        ratios = [steps_ratio_blocks(blocks, common, SIGNAL, [3, 1]) for blocks in listed]
        difference = root_sum_of_squares(x - y for x, y in zip(ratios[0][1], ratios[1][1]))
        return ratios[0][0] - ratios[1][0], difference, root_sum_of_squares(ratios[0][1])

    differences, errors, alone = zip(*[repeat() for _ in range(400)])
    spread = torch.tensor(differences).std().item()
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.15)
    assert sum(errors) < 0.5 * sum(alone)
