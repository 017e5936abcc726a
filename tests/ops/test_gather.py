# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops.gather import compact, gather_last


@pytest.mark.parametrize(
    "table, index",
    [
        ((5,), ()),
        ((5,), (3, 2)),
        ((2, 5), (2,)),
        ((2, 5), (3, 2)),
        ((2, 5), (3, 1)),
        ((4, 1, 5), (3, 1, 2)),
        ((1, 5), (1,)),
    ],
)
def test_gather_last(table, index):
    table = torch.randn(table, dtype=torch.double, requires_grad=True)
    index = torch.randint(5, index)
    shape = torch.broadcast_shapes(table.shape[:-1], index.shape)
    wide = table.expand(shape + (5,))
    expected = wide.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
    for view in (table, wide):
        actual = gather_last(view, index)
        assert torch.equal(actual, expected)
        weight = torch.randn(shape, dtype=torch.double)
        grads = [torch.autograd.grad((weight * x).sum(), table)[0] for x in (actual, expected)]
        torch.testing.assert_close(*grads)
        expected = wide.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)


def test_gradient_has_the_size_of_one_table():
    table = torch.randn(1000, requires_grad=True)
    index = torch.randint(1000, (50, 40))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        value = gather_last(table.expand(50, 40, 1000), index)
    node, nodes = value.grad_fn, []
    while node is not None:
        nodes.append(node)
        node = node.next_functions[0][0] if node.next_functions else None
    assert max(sizes, default=0) <= 2000
    gathers = [node for node in nodes if type(node).__name__ == "GatherBackward0"]
    assert [node._saved_self.shape for node in gathers] == [(1000,)]


@pytest.mark.parametrize("index", [5, -1, 7, -6])
@pytest.mark.parametrize("table", [torch.randn(5), torch.randn(5).expand(3, 5), torch.randn(3, 5)])
def test_an_index_out_of_range_is_an_error(table, index):
    for position in range(3):
        indices = torch.tensor([0, 1, 4])
        indices[position] = index
        with pytest.raises(RuntimeError, match="out of bounds"):
            gather_last(table, indices)


def test_compact_undoes_expand():
    x = torch.randn(4, 1, 3)
    assert compact(x.expand(2, 4, 5, 3)).shape == (1, 4, 1, 3)
    assert compact(x).shape == x.shape
    assert compact(torch.zeros(()).expand(2, 3)).shape == (1, 3)
