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
    Yields which of some tensors others were computed from, without looking behind them.

    :param roots: tensors of any shape, or numbers.
    :param targets: by graph node and output number, what to yield.
    :param seen: graph nodes that are not looked at, to which those are added that were.

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


def share_leaves(
    leaves_of: Mapping[Key, Sequence[torch.Tensor]],
) -> List[Tuple[List[Key], List[torch.Tensor]]]:
    """
    Joins keys that have a leaf in common, directly or through others.

    :param leaves_of: leaf tensors of each key.
    :return: pairs of keys and their leaves; the leaves of two pairs are disjoint.

    >>> a, b, c = torch.zeros(3).unbind()
    >>> groups = share_leaves({"x": [a], "y": [b], "z": [b, c]})
    >>> [keys for keys, _ in groups]
    [['x'], ['y', 'z']]
    """
    groups: List[Tuple[List[Key], Dict[int, torch.Tensor]]] = []
    for key, tensors in leaves_of.items():
        keys, members = [key], {id(tensor): tensor for tensor in tensors}
        apart = []
        for group in groups:
            if members.keys().isdisjoint(group[1]):
                apart.append(group)
            else:
                keys, members = group[0] + keys, {**group[1], **members}
        groups = apart + [(keys, members)]
    return [(keys, list(members.values())) for keys, members in groups]
