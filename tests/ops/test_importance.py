# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops.importance import normalize, stack, sum_to, unsqueeze_right


@pytest.mark.parametrize(
    "shape, dims, expected",
    [
        ((), set(), ()),
        ((), {-1}, ()),
        ((3,), set(), (1,)),
        ((3,), {-1}, (3,)),
        ((3,), {-2}, (1,)),
        ((2, 3, 4), {-3, -1}, (2, 1, 4)),
        ((2, 3, 4), {-1, -2, -3, -4}, (2, 3, 4)),
    ],
)
def test_sum_to(shape, dims, expected):
    tensor = torch.rand(shape)
    result = sum_to(tensor, dims)
    assert result.shape == expected
    torch.testing.assert_close(result.sum(), tensor.sum())


@pytest.mark.parametrize("dim", [0, 1, -3])
def test_normalize(dim):
    log_weights = torch.randn(4, 3, 2, dtype=torch.float64)
    log_mean, normalized = normalize(log_weights, dim)
    torch.testing.assert_close(log_mean, log_weights.exp().mean(dim).log())
    torch.testing.assert_close(normalized, log_weights.softmax(dim))


def test_normalize_far_from_1():
    log_mean, normalized = normalize(torch.tensor([-1e4, -1e4, float("-inf")]), 0)
    torch.testing.assert_close(log_mean, torch.tensor(2 / 3).log() - 1e4)
    torch.testing.assert_close(normalized, torch.tensor([0.5, 0.5, 0.0]))


def test_stack():
    stacked = stack([0.0, torch.ones(3), torch.ones(2, 1)])
    assert stacked.shape == (3, 2, 3)
    assert stacked.dtype == torch.ones(()).dtype and not stacked[0].any() and stacked[1:].all()


def test_unsqueeze_right():
    assert unsqueeze_right(torch.ones(2, 3), 0).shape == (2, 3)
    assert unsqueeze_right(torch.ones(()), 2).shape == (1, 1)
