# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops.quiet_grad import quiet_grad, without_hooks


@pytest.fixture
def x():
    return torch.tensor(2.0, requires_grad=True)


def test_hooks_of_a_leaf_do_not_fire(x):
    calls = []
    x.register_hook(lambda grad: calls.append("first"))
    x.register_hook(lambda grad: -grad)
    x.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    torch.autograd.graph.register_multi_grad_hook([x], lambda grads: calls.append("multi"))
    assert quiet_grad([x**2], [x]) == (torch.tensor(4.0),)
    assert calls == []
    (x**2).backward()
    assert calls == ["first", "multi", "accumulated"] and x.grad == -4.0


def test_hooks_in_between_do_not_fire(x):
    calls = []
    y = x**2
    y.register_hook(lambda grad: calls.append(grad.item()))
    y.retain_grad()
    assert quiet_grad([3 * y], [x], between=[y]) == (torch.tensor(12.0),)
    assert calls == [] and y.grad is None
    (3 * y).backward(retain_graph=True)
    assert calls == [3.0] and y.grad == 3.0
    quiet_grad([5 * y], [y, x], between=[y, y])
    assert calls == [3.0] and y.grad == 3.0


def test_hooks_come_back_after_an_error(x):
    calls = []
    handle = x.register_hook(lambda grad: calls.append("hook"))
    with pytest.raises(ZeroDivisionError), without_hooks([x]):
        1 / 0
    x.exp().backward()
    handle.remove()
    x.exp().backward()
    assert calls == ["hook"]


def test_graph_is_kept_and_inputs_may_be_unused(x):
    other, y = torch.ones((), requires_grad=True), x.exp()
    for _ in range(2):
        assert quiet_grad([y], [x, other], [torch.tensor(2.0)]) == (2 * x.exp(), None)
