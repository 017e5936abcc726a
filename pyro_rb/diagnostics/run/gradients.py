# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the gradient that a loss estimates: :func:`sample_gradients`, :func:`gradient_moments`."""

from typing import Any, Callable, Dict, Mapping, Optional

import torch
from torch import Tensor

from pyro_rb.diagnostics.run.arguments import Arguments, check_counts
from pyro_rb.diagnostics.run.problem import prepared
from pyro_rb.diagnostics.stats.moments import RunningMoments


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
    :func:`~pyro_rb.diagnostics.run.state.preserve_state`; a guide that initializes itself at
    its first call is initialized for the time of the measurement only.

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
    :param args: Positional arguments of model and guide; or a function that returns them, which is
        called before each draw, for a new minibatch from the seeded generators.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of draws ``N``.
    :param int num_burn_in: Number of draws that are made first and thrown away. Losses that
        learn from earlier gradients need them.
    :param int seed: Seed of the draws. Default: taken from torch's generator, which is then
        put back.
    :param dict parameters: Unconstrained tensors by name. Default: those that
        :func:`~pyro_rb.diagnostics.run.parameters.find_parameters` finds.
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
    check_counts(num_samples, num_burn_in, 1)
    with prepared(model, guide, args, kwargs, seed, parameters, must_match=False) as problem:
        draws = problem.sampler(loss).draws(problem.seed, num_samples, num_burn_in, progress)
        columns = zip(*(gradients for _, gradients in draws))
        return {name: torch.stack(column) for name, column in zip(problem.parameters, columns)}


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
    Like :func:`sample_gradients`, with the same arguments, but keeps only the mean and variance of
    each coordinate. Memory does not grow with ``num_samples``.

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
    check_counts(num_samples, num_burn_in, 1)
    with prepared(model, guide, args, kwargs, seed, parameters, must_match=False) as problem:
        moments = {name: RunningMoments() for name in problem.parameters}
        for _, gradients in problem.sampler(loss).draws(problem.seed, num_samples, num_burn_in, progress):
            for name, gradient in zip(moments, gradients):
                moments[name].update(gradient)
    return moments
