# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Is the gradient that a loss estimates unbiased? :func:`check_unbiased` tests it."""

import copy
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

import torch
from pyro.infer import ELBO
from pyro.util import set_rng_seed
from torch import Tensor

from pyro_rb.diagnostics.check.bias_check import BiasCheck
from pyro_rb.diagnostics.run.arguments import Arguments
from pyro_rb.diagnostics.run.bar import bar
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.run.problem import prepared
from pyro_rb.diagnostics.run.sampler import GradientSampler, draw_seeds
from pyro_rb.diagnostics.stats.bias import (
    PROJECTIONS,
    BiasTest,
    CheckError,
    Draws,
)
from pyro_rb.diagnostics.stats.coordinates import coordinate_name
from pyro_rb.diagnostics.stats.mean_test import rounding_error

METHODS = ("paired", "independent", "exact")
Reference = Union[str, ELBO, Mapping[str, Tensor]]

# Draws are projected this many at a time, so that the gradients of a large model need not
# be held all at once.
CHUNK = 64


def check_unbiased(
    loss: Union[str, ELBO],
    model: Callable,
    guide: Callable,
    reference: Reference = "Trace_ELBO",
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 1000,
    num_burn_in: int = 0,
    failure_rate: float = 1e-4,
    method: Optional[str] = None,
    detect: Optional[float] = None,
    projections: Optional[int] = None,
    seed: int = 0,
    parameters: Optional[Mapping[str, Tensor]] = None,
    progress: bool = False,
) -> BiasCheck:
    """
    Tests whether the mean gradient of a loss is that of a reference, at the parameters as
    they are. For an estimator or guide of your own, in a test suite.

    The param store, the random number generators and the modules are left as they were
    found; losses are copied, so what they learn is lost with the copy.

    :param loss: An ELBO instance, or a name for
        :func:`~pyro_rb.diagnostics.run.losses.make_loss`.
    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide whose sample sites match the model's.
    :param reference: A loss with the same objective (instance or name), or the exact gradient
        of the *unconstrained* parameters as a dict of tensors by name, as
        :func:`~pyro_rb.diagnostics.run.parameters.find_parameters` names them. Default:
        :class:`~pyro.infer.trace_elbo.Trace_ELBO`.
    :param args: Positional arguments of model and guide; or a function that returns them, which
        is called before each draw: a new minibatch, by the seeded generators.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of gradients of each loss, at least 2.
    :param int num_burn_in: Number of gradients that are drawn first and thrown away. Losses
        that learn from earlier gradients need them.
    :param float failure_rate: Probability that an unbiased loss fails.
    :param str method: ``"paired"``: draw ``i`` of both losses sees the same random numbers.
        The differences of the pairs are tested; the more both losses have in common, the
        smaller the bias that is seen. Valid whatever they have in common.
        ``"independent"``: other random numbers. Less sensitive as a rule.
        ``"exact"``: the reference is deterministic, such as
        :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` where all sites are enumerated; it
        is drawn twice, which must agree. Default: ``"paired"``, and ``"exact"`` for a dict.
    :param float detect: If given, the test also fails when a bias of this size, as a share of
        the euclidean norm of the reference's mean gradient, would not have been seen.
    :param int projections: If positive, that many random projections of the gradient are
        tested in place of its coordinates: a coordinate that belongs to a category which was
        hardly ever drawn has a variance that the draws do not show. Default: 20 if a guide
        site is discrete, else 0.
    :param int seed: Seed, between 0 and 2**32 - 1.
    :param dict parameters: Unconstrained tensors by name. Default: all.
    :param bool progress: Whether to show a progress bar.
    :returns: A :class:`~pyro_rb.diagnostics.check.bias_check.BiasCheck`.
    :raises ~pyro_rb.diagnostics.stats.bias.BiasError: An :class:`AssertionError` that names the
        parameter and coordinate, the z-score, the size of the bias, and the smallest bias
        that would have been seen.
    :raises ~pyro_rb.diagnostics.stats.bias.LowPowerError: An :class:`AssertionError`, if ``detect``
        was not reached; it says how many draws would.
    :raises ValueError: If an argument is out of range, sites do not match, there is no
        parameter, a gradient is not finite, or an exact reference is not exact.

    **Heavy tails.** Symmetric heavy tails make the test miss more, not fail more. Skewness
    makes it fail without cause; z-scores are corrected for the skewness that the draws show.
    No test sees what was never drawn: the result says by ``heavy_tailed`` when rare draws
    dominate. A guide so concentrated that a single value is ever drawn cannot be judged.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     loc = pyro.param("loc", torch.tensor(3.0))
    ...     pyro.sample("z", dist.Normal(loc, 1.))
    >>> class Doubled(Trace_ELBO):
    ...     def loss_and_grads(self, *args, **kwargs):
    ...         loss = 2 * self.differentiable_loss(*args, **kwargs)
    ...         loss.backward()
    ...         return loss.item()
    >>> check_unbiased("STLTrace_ELBO", model, guide, num_samples=100).at
    'loc'
    >>> try:
    ...     check_unbiased(Doubled(), model, guide, num_samples=100)
    ... except AssertionError as error:
    ...     print(str(error).split(":")[0])
    biased in loc
    """
    method = _check_arguments(reference, num_samples, num_burn_in, method, projections)
    ours = _copy(loss, "loss")
    theirs = None if isinstance(reference, Mapping) else _copy(reference, "reference")
    with prepared(model, guide, args, kwargs, seed, parameters) as problem:
        found = problem.parameters
        if projections is None:
            projections = 20 if problem.sites.discrete else 0

        def draw(loss: Any, seed: int, count: int, projections: int = 0) -> Draws:
            burn_in, seeds = draw_seeds(seed, count, num_burn_in)
            return _draw(problem.sampler(loss), burn_in, seeds, projections, progress)

        exact, others = None, None
        if isinstance(reference, Mapping):
            exact = _given_gradient(reference, found)
        elif method == "exact":
            exact = _exact_gradient(draw(theirs, seed, 2))
        mine = draw(ours, seed, num_samples, projections)
        if exact is not None:
            test = mine.test_exact(exact, failure_rate)
        else:
            is_paired = method == "paired"
            other = seed if is_paired else (seed + 1) % 2**32
            others = draw(theirs, other, num_samples, projections)
            test = mine.test_draws(others, is_paired, failure_rate)
    name, index = test.worst
    size = test.detectable_bias()[1]
    check = BiasCheck(
        method=method,
        num_samples=num_samples,
        parameters={name: list(tensor.shape) for name, tensor in found.items()},
        projections=projections,
        max_abs_z=test.tests[name].max_abs_z,
        at=coordinate_name(name, test.tests[name].difference.shape, index),
        threshold=test.threshold(name),
        detectable_bias=size,
        detectable_share=size / test.scale if test.scale > 0 else math.inf,
        tail_share=mine.tail_share(others if method == "paired" else None),
        z_scores=_z_scores(test),
    )
    try:
        test.raise_if_biased()
        if detect is not None:
            test.raise_if_blind(detect)
    except CheckError as error:
        text = f"{error}. A bias of {size:.3g} ({test.share(size)}) would have been seen anywhere"
        raise type(error)(text, check) from None
    return check


def _z_scores(test: BiasTest) -> Dict[str, float]:
    if PROJECTIONS in test.tests:
        scores = test.tests[PROJECTIONS].z.abs().tolist()
        return {coordinate_name(PROJECTIONS, (len(scores),), i): z for i, z in enumerate(scores)}
    return {name: one.max_abs_z for name, one in test.tests.items()}


def _check_arguments(
    reference: Reference, num_samples: int, num_burn_in: int, method: Optional[str], projections: Any
) -> str:
    if num_samples < 2 or num_burn_in < 0:
        raise ValueError(
            "expected num_samples >= 2 and num_burn_in >= 0, "
            f"got num_samples={num_samples} and num_burn_in={num_burn_in}"
        )
    if projections is not None and projections < 0:
        raise ValueError(f"projections: expected an integer >= 0 or None, got {projections}")
    is_given = isinstance(reference, Mapping)
    if method is None:
        return "exact" if is_given else "paired"
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if is_given and method != "exact":
        raise ValueError(
            f"method: {method!r} needs a loss as reference, and reference is a dict of exact "
            "gradients; leave method out"
        )
    return method


def _copy(loss: Union[str, ELBO], role: str) -> ELBO:
    if isinstance(loss, str):
        return make_loss(loss)
    if isinstance(loss, ELBO):
        return copy.deepcopy(loss)
    raise TypeError(
        f"{role}: expected an instance of pyro.infer.ELBO or the name of a loss, got {loss!r}"
    )


def _draw(
    sampler: GradientSampler, burn_in: List[int], seeds: List[int], projections: int, progress: bool
) -> Draws:
    draws, chunk = Draws(projections), []
    name = type(sampler.loss).__name__
    for i, seed in enumerate(bar(progress, burn_in + seeds, name)):
        set_rng_seed(seed)
        sampler.step()
        gradients = sampler.collect()
        if i < len(burn_in):
            continue
        for parameter, gradient in zip(sampler.names, gradients):
            if not gradient.isfinite().all():
                raise ValueError(
                    f"{name}: the gradient of {parameter!r} is not finite in draw "
                    f"{i - len(burn_in)}; GradientGuard says where that comes from"
                )
        chunk.append(gradients)
        if len(chunk) == CHUNK or i + 1 == len(burn_in) + len(seeds):
            columns = zip(sampler.names, zip(*chunk))
            draws.add({parameter: torch.stack(rows) for parameter, rows in columns})
            chunk = []
    return draws


def _given_gradient(
    reference: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    if set(reference) != set(parameters):
        raise ValueError(
            f"reference has gradients of {sorted(reference)}, but the parameters are "
            f"{sorted(parameters)}"
        )
    result = {}
    for name, tensor in parameters.items():
        result[name] = torch.as_tensor(reference[name], device=tensor.device)
        if result[name].shape != tensor.shape:
            raise ValueError(
                f"reference[{name!r}] has shape {tuple(result[name].shape)}, but the parameter "
                f"has shape {tuple(tensor.shape)}"
            )
    return result


def _exact_gradient(draws: Draws) -> Dict[str, Tensor]:
    for name, rows in draws.rows.items():
        if not rows.numel():
            continue
        difference = (rows[0] - rows[1]).abs()
        if difference.max() > rounding_error(rows.abs().max().item(), rows.dtype):
            raise ValueError(
                f"method 'exact': the reference's gradient of {name!r} is random: two draws "
                f"differ by {difference.max():.3g}. Use method='paired', or enumerate all sites"
            )
    return draws.means
