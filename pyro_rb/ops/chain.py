# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Derivatives by tensors of which some were computed from others.

Partial derivatives hold the other tensors fixed, total ones let them move. Both come as
one tensor for each input, of its shape.
"""

from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence

import torch

Tensors = Sequence[torch.Tensor]


@contextmanager
def inject(inputs: Tensors, grads: Tensors) -> Iterator[List[torch.Tensor]]:
    """
    Within, each input passes on a given gradient to what it was computed from, in the place
    of the one that arrives at it.

    :param inputs: tensors that require grad.
    :param grads: of the same shapes.
    :return: the gradients that arrived.

    >>> w = torch.ones((), requires_grad=True)
    >>> x = 3.0 * w
    >>> with inject([x], [torch.tensor(5.0)]) as received:
    ...     torch.autograd.grad(10.0 * x, w)
    (tensor(15.),)
    >>> received
    [tensor(10.)]
    """
    received = [torch.zeros_like(x) for x in inputs]

    def pass_on(index: int) -> Any:
        def hook(grad: torch.Tensor) -> torch.Tensor:
            received[index] = grad
            return grads[index]

        return hook

    handles = [x.register_hook(pass_on(index)) for index, x in enumerate(inputs)]
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


def to_partial(inputs: Tensors, totals: Tensors) -> List[torch.Tensor]:
    """
    :param inputs: tensors that require grad.
    :param totals: total derivatives by them.
    :return: the partial derivatives, from which backpropagation makes the total ones.

    >>> x = torch.ones((), requires_grad=True) * 3.0
    >>> y = 2.0 * x
    >>> to_partial([x, y], [torch.tensor(21.0), torch.tensor(10.0)])
    [tensor(1.), tensor(10.)]
    """
    with inject(inputs, totals) as received:
        zeros = [torch.zeros_like(x) for x in inputs]
        torch.autograd.grad(inputs, inputs, zeros, retain_graph=True)
    return [total - grad for total, grad in zip(totals, received)]
