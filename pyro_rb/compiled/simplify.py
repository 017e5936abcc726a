# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Less operations with the same results, bit by bit.
"""

import operator
from typing import Any, Dict, Iterable, Iterator, Set

import torch
from torch.fx import Graph, GraphModule, Node

from pyro_rb.compiled.torch_private import (
    is_operation,
    owns_memory,
    shares_memory,
    written,
)

aten = torch.ops.aten
_SAME_MEMORY = {aten.detach.default, aten.alias.default}
_FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
#: Operations that do nothing with such a second argument.
_NEUTRAL = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}


def simplify(module: GraphModule) -> None:
    """
    Leaves out copies of what is not changed, operations that do nothing, and all but the
    first of operations that are the same. Makes each result a tensor of its own, which an
    optimizer may change in place.
    """
    graph = module.graph
    if all(node.op != "call_function" or _is_known(node) for node in graph.nodes):
        _share(graph)
    _keep_outputs_apart(graph)
    graph.eliminate_dead_code()
    module.recompile()


def _is_known(node: Node) -> bool:
    return is_operation(node.target) or node.target is operator.getitem


def _share(graph: Graph) -> None:
    roots: Dict[Node, Node] = {}
    changed = _find_changed(graph, roots)
    seen: Dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        target: Any = node.target
        touches = any(roots[x] in changed for x in [node, *node.all_input_nodes])
        if target in _SAME_MEMORY or (not touches and _does_nothing(node)):
            first: Any = node.args[0]
        elif touches or target in _FRESH or _is_random(node):
            continue
        else:
            try:
                first = seen.setdefault((target, _key(node.args), _key(node.kwargs)), node)
            except TypeError:  # not hashable
                continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _find_changed(graph: Graph, roots: Dict[Node, Node]) -> Set[Node]:
    """
    Tensors that are changed in place, but for new ones that are filled by random numbers.

    :param roots: is given, for each node, the one that made its memory.
    """
    changed = set()
    for node in graph.nodes:
        roots[node] = node
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            roots[node] = roots[node.args[0]]
            continue
        for value, is_shared in zip(node.args, shares_memory(node.target)):
            if is_shared:
                for x in _nodes([value]):
                    roots[node] = roots[x]
        for x in _nodes(written(node.target, node.args)):
            if not (_is_random(node) and x.target in _FRESH):
                changed.add(roots[x])
    return changed


def _nodes(values: Iterable[Any]) -> Iterator[Node]:
    """Of arguments, some of which may be lists."""
    for value in values:
        yield from (
            x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Node)
        )


def _does_nothing(node: Node) -> bool:
    target: Any = node.target
    if target is aten.lift_fresh_copy.default:
        return True
    meta = node.meta.get("tensor_meta")
    source = getattr(node.args[0] if node.args else None, "meta", {}).get("tensor_meta")
    if meta is None or source is None or not hasattr(meta, "dtype"):
        return False
    if not meta.dtype.is_floating_point or (meta.shape, meta.dtype) != (source.shape, source.dtype):
        return False
    if target is aten.expand.default:
        return True
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return isinstance(other, (int, float)) and other == _NEUTRAL.get(target)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def _key(value: Any) -> Any:
    """Hashable, and tells 1 from 1.0 and 0.0 from -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), repr(value)) if isinstance(value, (bool, int, float)) else value


def _keep_outputs_apart(graph: Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    seen = set()
    results = []
    for node in output.args[0]:
        if isinstance(node, Node):
            if node in seen or node.op != "call_function" or not owns_memory(node.target):
                with graph.inserting_before(output):
                    node = graph.call_function(aten.clone.default, (node,))
            seen.add(node)
        results.append(node)
    output.args = (tuple(results),)
