# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_rb.ops.graph import leaves, share_leaves


def identical(found, expected):
    return {id(tensor) for tensor in found} == {id(tensor) for tensor in expected}


def test_leaves_finds_each_leaf_once():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    root = (a * b + a.exp()).sum() + torch.ones(())
    found = list(leaves(root))
    assert len(found) == 2
    assert identical(found, [a, b])
    assert not identical(found, [a, c])


def test_leaves_does_not_look_behind_a_stop():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    hidden = a.exp()
    assert identical(leaves(hidden * b, stop={hidden.grad_fn}), [b])
    # Another way to the same leaf stays open.
    assert identical(leaves(hidden * b + a, stop={hidden.grad_fn}), [a, b])


def test_leaves_of_a_constant():
    assert list(leaves(torch.ones(()))) == []


def test_share_leaves_joins_through_others():
    a, b, c, d = torch.zeros(4).unbind()
    groups = share_leaves({1: [a], 2: [b], 3: [d], 4: [a, c], 5: [c, b]})
    assert [sorted(keys) for keys, _ in groups] == [[3], [1, 2, 4, 5]]
    assert identical(groups[0][1], [d])
    assert identical(groups[1][1], [a, b, c])


def test_share_leaves_without_leaves():
    assert share_leaves({"x": [], "y": []}) == [(["x"], []), (["y"], [])]
