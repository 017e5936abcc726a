# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Graphs that were sent to another process do what they did."""

import pickle

import pytest
import torch

from pyro_rb.compiled.portable import from_list, to_list, without_tensors
from pyro_rb.compiled.torch_private import trace


def send(fn, inputs):
    """The graph of a function, and what has become of it."""
    module = trace(fn, inputs)
    graph, constants = without_tensors(module)
    nodes = pickle.loads(pickle.dumps(to_list(graph)))
    sent = torch.fx.GraphModule({}, from_list(nodes))
    return module, lambda *args: sent(*args, *constants)


def numbers(x):
    return (x * torch.tensor(2.5) + torch.tensor([1.0, 2.0, 3.0]), torch.tensor(True) & (x > 0))


def draws(x):
    return (torch.randn(3) + x, torch.rand_like(x), torch.zeros(3).normal_())


def in_place(x):
    x.add_(1.0)
    return (x[1:].sum(0, keepdim=True), torch.stack([x, x]), x.max(0)[0])


def product_of_rows(x):
    a = torch.arange(6.0).reshape(2, 3) + x
    return (a @ x.unsqueeze(-1), x.unsqueeze(0) @ a.t(), a @ a.t())


@pytest.mark.parametrize("fn", [numbers, draws, in_place, product_of_rows])
def test_equal(fn):
    module, sent = send(fn, [torch.tensor([0.3, -1.0, 2.0])])
    results = []
    for run in (module, sent):
        torch.manual_seed(0)
        x = torch.tensor([1.0, 0.5, -2.0])
        results.append([*run(x), x])
    torch.testing.assert_close(*results)
    # Draws are made at each call.
    if fn is draws:
        assert not torch.equal(sent(x)[1], sent(x)[1])


def test_graph_holds_no_tensors():
    module = trace(numbers, [torch.zeros(3)])
    graph, constants = without_tensors(module)
    assert [list(x.shape) for x in constants] == [[3]]
    assert all(node.op != "get_attr" for node in graph.nodes)


def test_products_with_vectors_are_sums():
    module = trace(product_of_rows, [torch.zeros(3)])
    graph, _ = without_tensors(module)
    assert sum(node.target is torch.ops.aten.mm.default for node in graph.nodes) == 1


@pytest.mark.parametrize("size, is_long", [(2**12, False), (2**16, True)])
def test_long_sums_are_made_in_double_precision(size, is_long):
    """Inductor adds up in order, in which 65,536 numbers lose three digits."""
    torch.manual_seed(0)
    x = 1.0 + torch.rand(size)

    def fn(x):
        return x.sum(), x.reshape(2, -1).sum(1)

    graph, _ = without_tensors(trace(fn, [x]))
    sums = [node for node in graph.nodes if str(node.target).startswith("aten.sum")]
    assert [node.kwargs.get("dtype") for node in sums] == [torch.float64 if is_long else None] * 2
    found = send(fn, [x])[1](x)
    assert all(y.dtype == torch.float32 for y in found)
    torch.testing.assert_close(found[0].double(), x.double().sum(), rtol=1e-7, atol=0)
