# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops.chain import inject, to_partial


@pytest.fixture
def chain():
    """x0 -> x1 -> x2, and x0 -> x2, with a factor ``p[i]`` of their own."""
    torch.set_default_dtype(torch.float64)
    p = torch.tensor([[2.0], [3.0], [5.0]], requires_grad=True)
    x0 = p[0] * torch.tensor([1.0, 10.0])
    x1 = p[1] * x0
    x2 = p[2] * x1 + 7.0 * x0
    return p, [x0, x1, x2]


def test_to_partial_is_the_inverse_of_backpropagation(chain):
    _, xs = chain
    for grads in ([torch.randn(2) for _ in xs], [torch.ones(2), torch.zeros(2), torch.ones(2)]):
        totals = torch.autograd.grad(xs, xs, grads, retain_graph=True)
        for found, expected in zip(to_partial(xs, totals), grads):
            torch.testing.assert_close(found, expected)
        partials = to_partial(xs, grads)
        for found, expected in zip(torch.autograd.grad(xs, xs, partials, retain_graph=True), grads):
            torch.testing.assert_close(found, expected)


def test_injected_gradients_take_the_place_of_others(chain):
    p, xs = chain
    x0, x1, _ = xs
    grads = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])]
    with inject(xs, grads) as received:
        (found,) = torch.autograd.grad(xs, p, grads, retain_graph=True)
    direct = [grads[0] @ torch.tensor([1.0, 10.0]), grads[1] @ x0, grads[2] @ x1]
    torch.testing.assert_close(found[:, 0], torch.stack(direct))
    torch.testing.assert_close(received[2], grads[2])
    torch.testing.assert_close(received[1], grads[1] + 5.0 * grads[2])
    torch.testing.assert_close(received[0], grads[0] + 3.0 * grads[1] + 7.0 * grads[2])


def test_hooks_are_removed(chain):
    p, xs = chain
    with pytest.raises(ZeroDivisionError):
        with inject(xs, [torch.zeros(2)] * 3):
            raise ZeroDivisionError
    (found,) = torch.autograd.grad(xs[0].sum(), p)
    assert found[0] == 11.0
