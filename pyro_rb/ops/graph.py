# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which leaf tensors was a tensor computed from?"""

from typing import (
    AbstractSet,
    Any,
    Dict,
    Hashable,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
)

import torch

Node = torch.autograd.graph.Node
Key = TypeVar("Key", bound=Hashable)


def leaves(
    root: torch.Tensor, stop: AbstractSet[Optional[Node]] = frozenset()
) -> Iterator[torch.Tensor]:
    """
    Yields the leaf tensors that ``root`` was computed from, each once.

    :param root: a tensor of any shape.
    :param stop: graph nodes that are not looked behind.

    >>> x, y = (torch.ones((), requires_grad=True) for _ in range(2))
    >>> z = x + 1
    >>> [leaf is y for leaf in leaves(z * y, stop={z.grad_fn})]
    [True]
    """
    seen = set(stop)
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        if parents:
            stack.extend([parent for parent, _ in parents])
        elif hasattr(node, "variable"):
            yield node.variable


def leaf_nodes(
    roots: Iterable[Any], stop: AbstractSet[Optional[Node]] = frozenset()
) -> Dict[Node, torch.Tensor]:
    """
    Returns the leaf tensors that some tensors were computed from, by graph node.

    :param roots: tensors of any shape, or numbers.
    :param stop: graph nodes that are not looked behind.

    >>> x, y = (torch.ones((), requires_grad=True) for _ in range(2))
    >>> [leaf is x for leaf in leaf_nodes([2.0 * x, 3.0 * x]).values()]
    [True]
    """
    found: Dict[Node, torch.Tensor] = {}
    seen = set(stop)
    stack = [root.grad_fn for root in roots if isinstance(root, torch.Tensor)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        if parents:
            stack += [parent for parent, _ in parents if parent not in seen]
        elif hasattr(node, "variable"):
            found[node] = node.variable
    return found


def iter_reached(
    roots: Iterable[Any], targets: Mapping[Tuple[Node, int], Key], seen: Set[Node]
) -> Iterator[Key]:
    """
    Yields which of the ``targets`` the ``roots`` were computed from, without looking behind those targets.

    :param roots: tensors of any shape, or numbers.
    :param targets: by graph node and output number, what to yield.
    :param seen: graph nodes that are not looked at. Those that were looked at are added.

    >>> x = torch.ones((), requires_grad=True)
    >>> y = x + 1
    >>> list(iter_reached([y * x], {(y.grad_fn, 0): "y"}, set()))
    ['y']
    """
    stack = [
        (root.grad_fn, root.output_nr) for root in roots if isinstance(root, torch.Tensor)
    ]
    while stack:
        node, output = stack.pop()
        if node is None:
            continue
        if (node, output) in targets:
            yield targets[node, output]
        elif node not in seen:
            seen.add(node)
            stack.extend(node.next_functions)


def node_of(tensor: torch.Tensor) -> Node:
    """
    The graph node that gradients of a tensor arrive at.

    >>> x = torch.ones((), requires_grad=True)
    >>> node_of(x).variable is x
    True
    """
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    with torch.enable_grad():
        view: Any = tensor.view_as(tensor)
    return view.grad_fn.next_functions[0][0]


def first_leaf(root: torch.Tensor, found: Dict[Any, Any]) -> Optional[torch.Tensor]:
    """
    Returns a leaf tensor that ``root`` was computed from, or None if there is none.

    :param root: a tensor of any shape.
    :param found: the results that are known, by graph node. New ones are added, so that searches
        that share it look at each node once.

    >>> x = torch.ones((), requires_grad=True)
    >>> first_leaf(2.0 * x, {}) is x
    True
    """
    users: Dict[Any, Any] = {}
    stack: List[Any] = [(root.grad_fn, None)]
    while stack:
        node, user = stack.pop()
        if node in found:
            leaf = found[node]
        else:
            parents = getattr(node, "next_functions", ())
            leaf = found[node] = None if parents else getattr(node, "variable", None)
            users[node] = user
            stack.extend([(parent, node) for parent, _ in parents])
        if leaf is not None:
            while user is not None:
                found[user], user = leaf, users[user]
            return leaf
    return None


def share_leaves(
    roots: Mapping[Key, Sequence[torch.Tensor]],
    stop: AbstractSet[Optional[Node]] = frozenset(),
) -> List[Tuple[List[Key], List[torch.Tensor]]]:
    """
    Joins keys whose tensors were computed from a leaf in common, directly or through others.

    :param roots: tensors of any shape, by key.
    :param stop: graph nodes that are not looked behind.
    :return: pairs of keys and their leaves; the leaves of two pairs are disjoint. Keys
        without a leaf are left out.

    >>> a, b, c = (torch.ones((), requires_grad=True) for _ in range(3))
    >>> groups = share_leaves({"x": [2 * a], "y": [2 * b], "z": [b * c]})
    >>> [keys for keys, _ in groups]
    [['x'], ['y', 'z']]
    """
    # Whatever is behind one node belongs together: a number for it, None for nothing.
    number_of: Dict[Any, Optional[int]] = {None: None, **dict.fromkeys(stop)}
    leaves_found: List[torch.Tensor] = []
    joined: List[int] = []  # a forest of these numbers, by union and find

    def join(nodes: Iterable[Any]) -> Optional[int]:
        first = None
        for number in [number_of[node] for node in nodes]:
            if number is None:
                continue
            while joined[number] != number:
                joined[number] = number = joined[joined[number]]
            if first is None:
                first = number
            joined[number] = first
        return first

    nodes_of = {key: [root.grad_fn for root in roots[key]] for key in roots}
    stack: List[Any] = [node for nodes in nodes_of.values() for node in nodes]
    stack.reverse()
    while stack:
        node = stack[-1]
        if node in number_of:
            stack.pop()
            continue
        parents = [parent for parent, _ in node.next_functions]
        ahead = [parent for parent in parents if parent not in number_of]
        if ahead:
            stack.extend(ahead)
        elif parents or not hasattr(node, "variable"):
            number_of[node] = join(parents)
        else:
            number_of[node] = len(joined)
            joined.append(len(joined))
            leaves_found.append(node.variable)
    for nodes in nodes_of.values():
        join(nodes)
    groups: Dict[Optional[int], Tuple[List[Key], List[torch.Tensor]]] = {}
    for key, nodes in nodes_of.items():
        groups.setdefault(join(nodes), ([], []))[0].append(key)
    groups.pop(None, None)
    for number, leaf in enumerate(leaves_found):
        while joined[number] != number:
            number = joined[number]
        groups[number][1].append(leaf)
    return list(groups.values())
