# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Less operations with the same results, bit by bit.
"""

from typing import Any, Dict

import torch

aten = torch.ops.aten
_COPIES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


def simplify(module: torch.fx.GraphModule) -> None:
    """
    Leaves out copies of what is not changed, and all but the first of operations that are the
    same, unless the graph changes tensors in place, other than by random numbers.
    """
    graph = module.graph
    if not any(map(_mutates, graph.nodes)):
        _share(graph)
    _keep_outputs_apart(graph)
    graph.eliminate_dead_code()
    module.recompile()


def _share(graph: torch.fx.Graph) -> None:
    seen: Dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target not in _FRESH and not _is_random(node):
            try:
                key = (node.target, _key(node.args), _key(node.kwargs))
                first = seen.setdefault(key, node)
            except TypeError:
                continue
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _is_random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def _mutates(node: Any) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target.__name__ != "getitem"
    if node.target is aten.native_batch_norm.default:
        return True
    if not node.target._schema.is_mutable:
        return False
    changed = node.args[0] if node.args else None
    return not (_is_random(node) and getattr(changed, "target", None) in _FRESH)


def _key(value: Any) -> Any:
    """Hashable, and tells 1 from 1.0 and 0.0 from -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), repr(value)) if isinstance(value, (bool, int, float)) else value


def _keep_outputs_apart(graph: torch.fx.Graph) -> None:
    """Each gradient is a tensor of its own, which the optimizer may change in place."""
    output = next(node for node in graph.nodes if node.op == "output")
    seen = set()
    results = []
    for node in output.args[0]:
        if isinstance(node, torch.fx.Node):
            if node in seen or node.op != "call_function" or not _owns_memory(node):
                with graph.inserting_before(output):
                    node = graph.call_function(aten.clone.default, (node,))
            seen.add(node)
        results.append(node)
    output.args = (tuple(results),)


def _owns_memory(node: Any) -> bool:
    returns = node.target._schema.returns if hasattr(node.target, "_schema") else []
    return bool(returns) and all(r.alias_info is None for r in returns)
