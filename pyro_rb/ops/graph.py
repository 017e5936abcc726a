# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which leaf tensors was a tensor computed from?"""

from typing import (
    AbstractSet,
    Dict,
    Hashable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
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
