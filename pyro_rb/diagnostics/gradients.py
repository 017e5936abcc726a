# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Draws of the gradient that a loss estimates. With :mod:`~pyro_rb.diagnostics.parameters`
the one layer of the diagnostics that runs models and guides.
"""

from typing import (
    Any,
    Callable,
    Dict,
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
from tqdm import tqdm

from pyro_rb.diagnostics.moments import RunningMoments
from pyro_rb.diagnostics.parameters import (
    Arguments,
    check_parameters,
    current_args,
    parameters_of,
    run_traces,
)
from pyro_rb.diagnostics.state import preserve_state


def sample_gradients(
    loss: Any,
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 100,
    num_burn_in: int = 0,
    seed: Optional[int] = None,
    parameters: Optional[Mapping[str, Tensor]] = None,
    progress: bool = False,
) -> Dict[str, Tensor]:
    """
    Draws the gradient of a loss again and again, at the parameters as they are.

    The gradient is that of the loss (minus the ELBO), with respect to the *unconstrained*
    parameters: what ``SVI.step`` would hand to the optimizer. The param store, the random
    number generators and the modules are left as they were found, see
    :func:`~pyro_rb.diagnostics.state.preserve_state`; a guide that initialises itself at
    its first call is initialised for the time of the measurement only.

    The random numbers of draw ``i`` depend on ``seed`` and ``i`` alone. Two losses that
    are sampled with the same seed (or with none, one straight after the other) see the
    same random numbers, and are best compared by a paired test; for independent samples
    give different seeds.

    :param ~pyro.infer.elbo.ELBO loss: Any Pyro ELBO, for example
        :class:`~pyro.infer.trace_elbo.Trace_ELBO`. Without a ``pyro.param`` in model and
        guide (a plain :class:`torch.nn.Module` as guide), Pyro's ``loss_and_grads`` computes
        no gradient, and the loss must have a ``differentiable_loss``.
    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide.
    :param args: Positional arguments of model and guide; or a function that returns them, which
        is called before each draw: a new minibatch, by the seeded generators.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of draws ``N``.
    :param int num_burn_in: Number of draws that are made first and thrown away. Losses that
        learn from earlier gradients need them.
    :param int seed: Seed of the draws. Default: taken from torch's generator, which is then
        put back.
    :param dict parameters: Unconstrained tensors by name. Default: those that
        :func:`~pyro_rb.diagnostics.parameters.find_parameters` finds.
    :param bool progress: Whether to show a progress bar.
    :returns: By name of the parameter, a tensor of shape ``[N, *shape of the parameter]``.
        A parameter that the loss does not depend on has zeros.
    :rtype: dict
    :raises ValueError: If there is no parameter, or a number of draws is out of range.

    For large models, where ``N`` gradients do not fit in memory, see
    :func:`gradient_moments`.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     loc = pyro.param("loc", torch.tensor(0.5))
    ...     pyro.sample("z", dist.Normal(loc, 1.))
    >>> gradients = sample_gradients(Trace_ELBO(), model, guide, num_samples=200, seed=0)
    >>> gradients["loc"].shape
    torch.Size([200])
    """
    rows: Dict[str, List[Tensor]] = {}
    draws = _draws(
        loss, model, guide, args, kwargs, num_samples, num_burn_in, seed, parameters, progress
    )
    for gradients in draws:
        for name, gradient in gradients.items():
            rows.setdefault(name, []).append(gradient)
    return {name: torch.stack(row) for name, row in rows.items()}


def gradient_moments(
    loss: Any,
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 100,
    num_burn_in: int = 0,
    seed: Optional[int] = None,
    parameters: Optional[Mapping[str, Tensor]] = None,
    progress: bool = False,
) -> Dict[str, RunningMoments]:
    """
    Like :func:`sample_gradients`, with the same arguments, but keeps the mean and variance
    per coordinate only. Memory does not grow with ``num_samples``.

    :returns: By name of the parameter, moments whose ``mean`` and ``variance`` have the
        shape of the parameter.
    :rtype: dict

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.)), 1.))
    >>> moments = gradient_moments(Trace_ELBO(), model, guide, num_samples=400, seed=0)
    >>> 2.8 < moments["loc"].mean < 3.2, 0.7 < moments["loc"].variance < 1.3
    (tensor(True), tensor(True))
    """
    moments: Dict[str, RunningMoments] = {}
    draws = _draws(
        loss, model, guide, args, kwargs, num_samples, num_burn_in, seed, parameters, progress
    )
    for gradients in draws:
        for name, gradient in gradients.items():
            moments.setdefault(name, RunningMoments()).update(gradient)
    return moments


class GradientSampler:
    """
    Draws gradients of one loss. To be used inside of
    :func:`~pyro_rb.diagnostics.state.preserve_state`.

    :param dict parameters: As :func:`~pyro_rb.diagnostics.parameters.find_parameters`
        returns them.
    :param bool use_backward: Whether to call ``loss_and_grads`` and read ``.grad``, as SVI
        does; else ``differentiable_loss`` is differentiated.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.)), 1.))
    >>> from pyro_rb.diagnostics.parameters import find_parameters
    >>> parameters = find_parameters(model, guide)
    >>> sampler = GradientSampler(Trace_ELBO(), model, guide, (), {}, parameters, use_backward=True)
    >>> loss = sampler.step()
    >>> [gradient.shape for gradient in sampler.collect()]
    [torch.Size([])]
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
            self._gradients = torch.autograd.grad(value, self.tensors, allow_unused=True)
        if isinstance(value, tuple):  # ReweightedWakeSleep: the loss of the model first
            value = value[0]
        return float(value.detach() if isinstance(value, Tensor) else value)

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


def _draws(
    loss: Any,
    model: Callable,
    guide: Callable,
    args: Arguments,
    kwargs: Optional[Mapping[str, Any]],
    num_samples: int,
    num_burn_in: int,
    seed: Optional[int],
    parameters: Optional[Mapping[str, Tensor]],
    progress: bool,
) -> Iterator[Dict[str, Tensor]]:
    if num_samples < 1 or num_burn_in < 0:
        raise ValueError(
            "expected num_samples >= 1 and num_burn_in >= 0, "
            f"got num_samples={num_samples} and num_burn_in={num_burn_in}"
        )
    kwargs = dict(kwargs or {})
    with preserve_state(model, guide):
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        set_rng_seed(seed)
        traces = run_traces(model, guide, args, kwargs)
        found, any_site = parameters_of(traces, model, guide)
        parameters = found if parameters is None else parameters
        check_parameters(parameters)
        sampler = GradientSampler(loss, model, guide, args, kwargs, parameters, any_site)
        burn_in, draws = draw_seeds(seed, num_samples, num_burn_in)
        for i, draw_seed in enumerate(tqdm(burn_in + draws, disable=not progress)):
            set_rng_seed(draw_seed)
            sampler.step()
            gradients = sampler.collect()
            if i >= num_burn_in:
                yield dict(zip(sampler.names, gradients))
