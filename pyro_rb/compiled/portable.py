# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Graphs that hold no tensors, and how to send them to another process.
"""

import operator
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate, map_arg

from pyro_rb.compiled.torch_private import is_operation

aten = torch.ops.aten
#: Number of multiplications of which a product of matrices is written as a sum.
LARGEST_PRODUCT = 2**14
#: Numbers of which a sum is made in single precision: Inductor adds them one by one, not pair by pair.
LARGEST_SUM = 2**12


def without_tensors(module: GraphModule) -> Tuple[Graph, List[torch.Tensor]]:
    """
    :return: a copy of a graph that holds no tensors, and those that are further inputs of it.
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    _expand_products(graph)
    _sum_in_double(graph)
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    constants: List[torch.Tensor] = []
    for node in list(graph.nodes):
        node.meta = {}
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target).detach()
        if value.dim() == 0 and not value.is_complex():
            with graph.inserting_before(node):
                options = {"dtype": value.dtype, "device": value.device}
                new = graph.call_function(torch.ops.aten.full.default, ([], value.item()), options)
        else:
            with graph.inserting_before(first):
                new = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return graph, constants


def _sum_in_double(graph: Graph) -> None:
    """Makes long sums as precise as those of PyTorch, such as that of the log densities of many weights."""
    for node in list(graph.nodes):
        if node.target not in (aten.sum.default, aten.sum.dim_IntList) or node.kwargs:
            continue
        terms, total = (x.meta.get("val") for x in (node.args[0], node))
        if not isinstance(terms, torch.Tensor) or terms.dtype != torch.float32:
            continue
        if terms.numel() > LARGEST_SUM * max(1, total.numel()):
            node.kwargs = {"dtype": torch.float64}
            with graph.inserting_after(node):
                new = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)


def _expand_products(graph: Graph) -> None:
    """
    Writes products of small matrices and vectors as sums, which Inductor makes one with what is
    around them; a call of the library takes longer than the arithmetic.
    """
    for node in list(graph.nodes):
        if node.target is not aten.mm.default:
            continue
        values = [x.meta.get("val") for x in node.args]
        if not all(isinstance(x, torch.Tensor) and _is_plain(x) for x in values):
            continue
        (num_rows, size), (_, num_columns) = (x.shape for x in values)
        if min(num_rows, num_columns) > 1 or num_rows * size * num_columns > LARGEST_PRODUCT:
            continue
        with graph.inserting_before(node):
            a, b = node.args
            if num_columns == 1:
                b = graph.call_function(aten.t.default, (b,))
                terms, dim = graph.call_function(aten.mul.Tensor, (a, b)), 1
            else:
                a = graph.call_function(aten.t.default, (a,))
                terms, dim = graph.call_function(aten.mul.Tensor, (a, b)), 0
            new = graph.call_function(aten.sum.dim_IntList, (terms, [dim], True))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_plain(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class _Node(NamedTuple):
    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any


class _Name:
    """Of a node, or of an operation. A leaf of nested arguments, which a tuple is not."""

    def __init__(self, name: str) -> None:
        self.name = name


def to_list(graph: Graph) -> List[_Node]:
    """
    What :func:`from_list` makes the graph of. Pickled, a graph would be its code, which is run
    to make a graph again; operations without inputs, such as draws, would be constants then.
    """

    def to_name(node: Any) -> Any:
        return _Name(node.name)

    nodes = []
    for node in graph.nodes:
        target: Any = node.target
        if is_operation(target):
            target = _Name(str(target))
        args, kwargs = (map_arg(x, to_name) for x in (node.args, node.kwargs))
        nodes.append(_Node(node.op, node.name, target, args, kwargs))
    return nodes


def from_list(nodes: List[_Node]) -> Graph:
    """
    >>> from torch.fx import symbolic_trace
    >>> graph = symbolic_trace(lambda x: x[0]).graph
    >>> [node.op for node in from_list(to_list(graph)).nodes]
    ['placeholder', 'call_function', 'output']
    """
    graph = Graph()
    known: Dict[str, Any] = {}

    def look_up(value: Any) -> Any:
        return known[value.name] if isinstance(value, _Name) else value

    for op, name, target, args, kwargs in nodes:
        if isinstance(target, _Name):
            target = operator.attrgetter(target.name)(torch.ops)
        args, kwargs = (map_aggregate(x, look_up) for x in (args, kwargs))
        known[name] = graph.create_node(op, target, args, kwargs, name)
    return graph
