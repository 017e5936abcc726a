# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the gradient that a loss estimates: :class:`GradientSampler`."""

import time
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch
from pyro.util import set_rng_seed
from torch import Tensor

from pyro_rb.diagnostics.run.arguments import Arguments, current_args
from pyro_rb.diagnostics.run.bar import bar


class GradientSampler:
    """
    Draws gradients of one loss. To be used inside of
    :func:`~pyro_rb.diagnostics.run.state.preserve_state`.

    :param dict parameters: As :func:`~pyro_rb.diagnostics.run.parameters.find_parameters`
        returns them.
    :param bool use_backward: Whether to call ``loss_and_grads`` and read ``.grad``, as SVI
        does; else ``differentiable_loss`` is differentiated.
    """

    def __init__(
        self,
        loss: Any,
        model: Callable,
        guide: Callable,
        args: Arguments,
        kwargs: Dict[str, Any],
        parameters: Mapping[str, Tensor],
        use_backward: bool,
    ) -> None:
        self.loss = loss
        self.names = list(parameters)
        self.tensors = list(parameters.values())
        self._callables = (model, guide)
        self._args = args
        self.kwargs = kwargs
        self._use_backward = use_backward
        self.clear()

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None
        self._gradients: Sequence[Optional[Tensor]] = ()

    @property
    def call(self) -> Tuple:
        """What the loss is called with: model, guide, and the arguments of this step."""
        return (*self._callables, *current_args(self._args))

    @torch.enable_grad()
    def step(self) -> float:
        """Computes one gradient and returns the loss. This is the part worth timing."""
        if self._use_backward:
            value = self.loss.loss_and_grads(*self.call, **self.kwargs)
        else:
            if not hasattr(self.loss, "differentiable_loss"):
                raise NotImplementedError(
                    f"{type(self.loss).__name__} has no differentiable_loss, which is needed as "
                    "model and guide have no pyro.param site: register their modules by "
                    "pyro.module()"
                )
            value = self.loss.differentiable_loss(*self.call, **self.kwargs)
            self._gradients = torch.autograd.grad(
                value, self.tensors, allow_unused=True, retain_graph=getattr(self.loss, "retain_graph", None)
            )
        if isinstance(value, tuple):  # ReweightedWakeSleep: the loss of the model first
            value = value[0]
        return float(value.detach() if isinstance(value, Tensor) else value)

    def draws(
        self, seed: int, num_samples: int, num_burn_in: int, progress: bool, title: Optional[str] = None
    ) -> Iterator[Tuple[float, List[Tensor]]]:
        """The loss and the gradients of each draw, after a burn-in."""
        burn_in, seeds = draw_seeds(seed, num_samples, num_burn_in)
        for number, draw_seed in enumerate(bar(progress, burn_in + seeds, title)):
            set_rng_seed(draw_seed)
            loss = self.step()
            gradients = self.collect()
            if number >= num_burn_in:
                yield loss, gradients

    def collect(self) -> List[Tensor]:
        """The gradients of the last step, in the order of the parameters."""
        gradients = self._gradients
        if self._use_backward:
            gradients = [tensor.grad for tensor in self.tensors]
        result = [
            torch.zeros_like(tensor) if gradient is None else gradient.detach().to_dense()
            for tensor, gradient in zip(self.tensors, gradients)
        ]
        self.clear()
        return result

    def train(self, optim: Callable) -> float:
        """
        One gradient step. Returns the loss before it.

        :param ~pyro.optim.optim.PyroOptim optim: The optimizer.
        """
        loss = self.step()
        for tensor, gradient in zip(self.tensors, self._gradients):
            tensor.grad = gradient
        optim(self.tensors)
        self.clear()
        return loss


def choose_clock(tensors: Iterable[Tensor]) -> Callable[[], float]:
    """
    What measures seconds of work on these tensors: CPU time, from which other processes take nothing, or the time that
    passes, as the CPU time of threads adds up, and a GPU has none.

    **Example**

    >>> clock = choose_clock([torch.zeros(2)])
    >>> start = clock()
    >>> clock() - start >= 0
    True
    """
    alone = torch.get_num_threads() == 1 and not any(tensor.is_cuda for tensor in tensors)
    return time.process_time if alone else time.perf_counter


def draw_seeds(seed: int, num_samples: int, num_burn_in: int = 0) -> Tuple[List[int], List[int]]:
    """
    Seeds of the burn-in and of the draws; the latter do not depend on the former.

    **Example**

    >>> burn_in, seeds = draw_seeds(0, num_samples=3, num_burn_in=2)
    >>> len(burn_in), len(seeds), draw_seeds(0, num_samples=3)[1] == seeds
    (2, 3, True)
    """
    generator = torch.Generator().manual_seed(seed)
    limit = 2**32  # numpy accepts no larger seed
    count = num_samples + num_burn_in
    seeds = torch.randint(limit, (count,), generator=generator, device="cpu").tolist()
    return seeds[num_samples:], seeds[:num_samples]
