# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Is the gradient that a loss estimates unbiased? :func:`check_unbiased` tests it."""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Union

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_rb.diagnostics.run.arguments import Arguments, check_counts
from pyro_rb.diagnostics.run.losses import copy_loss, make_loss
from pyro_rb.diagnostics.run.messages import counted, percent
from pyro_rb.diagnostics.run.problem import prepared
from pyro_rb.diagnostics.run.sampler import GradientSampler
from pyro_rb.diagnostics.stats.bias import BiasTest, CheckError, Draws, find_bias
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.mean_test import largest, rounding_error
from pyro_rb.diagnostics.stats.projections import Projector
from pyro_rb.diagnostics.stats.summary import HEAVY_TAIL

METHODS = ("paired", "independent", "exact")
Reference = Union[str, ELBO, Mapping[str, Tensor]]


@dataclass(frozen=True)
class BiasCheck:
    """
    What :func:`check_unbiased` has found when it found no bias. Prints as a sentence.

    :param str method: ``"paired"``, ``"independent"`` or ``"exact"``.
    :param int num_samples: Number of gradients of each loss.
    :param dict parameters: The shape of each parameter.
    :param int projections: Number of random projections that were tested in place of
        coordinates; 0 if coordinates were.
    :param float max_abs_z: The largest absolute z-score.
    :param str at: The coordinate or projection where it was found.
    :param float threshold: What ``max_abs_z`` would have had to exceed for a bias.
    :param float detectable_bias: A bias of this size, in units of the gradient, would have
        been seen with probability 0.95 in any coordinate (or along any projection).
    :param float detectable_share: The same as a share of the euclidean norm of the
        reference's mean gradient; infinite where that is zero.
    :param dict z_scores: The largest absolute z-score of each parameter, or the
        score of each projection.
    :param float tail_share: The share of the 1% largest draws in the variance that the test
        stands on; NaN with fewer than 100 draws. For normal draws it is 0.08.
    """

    method: str
    num_samples: int
    parameters: Dict[str, List[int]]
    projections: int
    max_abs_z: float
    at: str
    threshold: float
    detectable_bias: float
    detectable_share: float
    tail_share: float
    z_scores: Dict[str, float] = field(default_factory=dict)

    @property
    def heavy_tailed(self) -> bool:
        """
        Whether rare draws dominate the variance. Then the test is blind to what even rarer
        draws contribute, and ``detectable_bias`` is too small.
        """
        return self.tail_share > HEAVY_TAIL

    def __str__(self) -> str:
        size = sum(torch.Size(shape).numel() for shape in self.parameters.values())
        what = f"{self.projections} random projections of " if self.projections else ""
        text = (
            f"no bias seen in {what}{counted(size, 'parameter value')}, {self.num_samples} "
            f"{self.method} draws: largest |z| {self.max_abs_z:.1f} at {self.at} (threshold "
            f"{self.threshold:.1f}). A bias of {self.detectable_bias:.3g}, "
            f"{percent(self.detectable_share)} of the gradient's norm, would have been seen."
        )
        if self.heavy_tailed:
            text += (
                f" But the largest 1% of the draws make up {percent(self.tail_share)} of the "
                "variance: what is rarer still was not seen. Take more draws."
            )
        return text


def check_unbiased(
    loss: Union[str, ELBO],
    model: Callable,
    guide: Callable,
    reference: Optional[Reference] = None,
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
    Tests whether the mean gradient of a loss is that of a reference, at the parameters as they are.
    Use it in a test suite, for an estimator or guide of your own.

    The param store, the random number generators and the modules are left as they were
    found; losses are copied, so what they learn is lost with the copy.

    :param loss: An ELBO instance, or a name for
        :func:`~pyro_rb.diagnostics.run.losses.make_loss`.
    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide whose sample sites match the model's.
    :param reference: A loss with the same objective (instance or name), or the exact gradient
        of the *unconstrained* parameters as a dict of tensors by name, as
        :func:`~pyro_rb.diagnostics.run.parameters.find_parameters` names them. Default:
        :class:`~pyro.infer.trace_elbo.Trace_ELBO`, or :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` where the
        model enumerates a site, or ``Trace_ELBO`` is biased.
    :param args: Positional arguments of model and guide; or a function that returns them, which is
        called before each draw, for a new minibatch from the seeded generators.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of gradients of each loss, at least 2.
    :param int num_burn_in: Number of gradients that are drawn first and thrown away. Losses
        that learn from earlier gradients need them.
    :param float failure_rate: Probability that an unbiased loss fails.
    :param str method: ``"paired"``: draw ``i`` of both losses sees the same random numbers.
        The differences of the pairs are tested; the more both losses have in common, the
        smaller the bias that is seen. This is valid whatever they have in common.
        ``"independent"``: the two losses see different random numbers. This is less sensitive as a
        rule. ``"exact"``: the reference is deterministic, such as
        :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` where all sites are enumerated; it is
        drawn twice, and both draws must agree. Default: ``"paired"``, and ``"exact"`` for a dict.
    :param float detect: If given, the test also fails when a bias of this size, as a share of
        the euclidean norm of the reference's mean gradient, would not have been seen.
    :param int projections: If positive, that many random projections of the gradient are
        tested in place of its coordinates. This is for coordinates that belong to a category which
        was hardly ever drawn: the draws do not show their variance. Default: 20 if a guide site is
        discrete, else 0.
    :param int seed: Seed, between 0 and 2**32 - 1.
    :param dict parameters: Unconstrained tensors by name. Default: all.
    :param bool progress: Whether to show a progress bar.
    :returns: A :class:`BiasCheck`.
    :raises ~pyro_rb.diagnostics.stats.bias.BiasError: An :class:`AssertionError` that names the
        parameter and coordinate, the z-score, the size of the bias, and the smallest bias
        that would have been seen.
    :raises ~pyro_rb.diagnostics.stats.bias.LowPowerError: An :class:`AssertionError`, if ``detect``
        was not reached; it says how many draws would reach it.
    :raises ValueError: If an argument is out of range, sites do not match, there is no
        parameter, a gradient is not finite, or an exact reference is not exact.

    **Heavy tails.** Symmetric heavy tails make the test miss more biases, not raise more false
    alarms. Skewness would raise false alarms, so z-scores are corrected for the skewness that the
    draws show. No test sees what was never drawn; ``heavy_tailed`` says when rare draws dominate. A
    guide so concentrated that only a single value is ever drawn cannot be judged.

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
    ours = copy_loss(loss, "loss")
    if reference is not None and not isinstance(reference, Mapping):
        reference = copy_loss(reference, "reference")
    with prepared(model, guide, args, kwargs, seed, parameters) as problem:
        if reference is None:
            reference = make_loss(problem.sites.reference)
        theirs = None if isinstance(reference, Mapping) else reference
        found = problem.parameters
        if projections is None:
            projections = 20 if problem.sites.discrete else 0

        coordinates = Coordinates(list(found), list(found.values()), most=math.inf)
        projector = Projector.of_all(coordinates, projections) if projections else None
        samplers = [problem.sampler(loss) for loss in (ours, theirs) if loss is not None]

        def draws(sampler: GradientSampler, seed: int, count: int) -> Iterator[Tensor]:
            return _draws(sampler, coordinates, seed, count, num_burn_in, progress)

        mine, others = Draws(coordinates, projector), Draws(coordinates, projector)
        exact = None
        if isinstance(reference, Mapping):
            exact = coordinates.vector(_given_gradient(reference, found))
        elif method == "exact":
            exact = _exact_gradient(coordinates, *draws(samplers[1], seed, 2))
        if method == "paired":
            for vector, other in zip(*(draws(sampler, seed, num_samples) for sampler in samplers)):
                mine.add(vector - other)
                others.add(other)
        else:
            for vector in draws(samplers[0], seed, num_samples):
                mine.add(vector)
            for vector in draws(samplers[1], (seed + 1) % 2**32, num_samples) if exact is None else ():
                others.add(vector)
        test = find_bias(mine, others if exact is None else exact, failure_rate, method == "paired")
    size = test.detectable_bias()[1]
    check = BiasCheck(
        method=method,
        num_samples=num_samples,
        parameters={name: list(tensor.shape) for name, tensor in found.items()},
        projections=projections,
        max_abs_z=test.test.max_abs_z,
        at=test.label(test.worst),
        threshold=test.threshold,
        detectable_bias=size,
        detectable_share=size / test.scale if test.scale > 0 else math.inf,
        tail_share=mine.tail_share(),
        z_scores=_z_scores(test, projections),
    )
    try:
        test.raise_if_biased()
        if detect is not None:
            test.raise_if_blind(detect)
    except CheckError as error:
        text = f"{error}. A bias of {size:.3g} ({test.share(size)}) would have been seen anywhere"
        raise type(error)(text, check) from None
    return check


def _z_scores(test: BiasTest, projections: int) -> Dict[str, float]:
    scores = test.test.z.abs()
    if projections:
        return {test.label(place): z for place, z in enumerate(scores.tolist())}
    parts = scores.split(test.coordinates.counts)
    return {name: largest(part) for name, part in zip(test.coordinates.names, parts)}


def _check_arguments(
    reference: Optional[Reference], num_samples: int, num_burn_in: int, method: Optional[str], projections: Any
) -> str:
    check_counts(num_samples, num_burn_in, 2)
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


def _draws(
    sampler: GradientSampler, coordinates: Coordinates, seed: int, count: int, num_burn_in: int, progress: bool
) -> Iterator[Tensor]:
    loss = type(sampler.loss).__name__
    for number, (_, gradients) in enumerate(sampler.draws(seed, count, num_burn_in, progress, loss)):
        for name, gradient in zip(sampler.names, gradients):
            if not gradient.isfinite().all():
                raise ValueError(
                    f"{loss}: the gradient of {name!r} is not finite in draw {number}; "
                    "GradientGuard says where that comes from"
                )
        yield coordinates.vector(gradients)


def _given_gradient(
    reference: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> List[Tensor]:
    if set(reference) != set(parameters):
        raise ValueError(
            f"reference has gradients of {sorted(reference)}, but the parameters are "
            f"{sorted(parameters)}"
        )
    result = []
    for name, tensor in parameters.items():
        result.append(torch.as_tensor(reference[name], device=tensor.device))
        if result[-1].shape != tensor.shape:
            raise ValueError(
                f"reference[{name!r}] has shape {tuple(result[-1].shape)}, but the parameter "
                f"has shape {tuple(tensor.shape)}"
            )
    return result


def _exact_gradient(coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
    for name, *parts in zip(coordinates.names, *(v.split(coordinates.counts) for v in (first, second))):
        difference = largest((parts[0] - parts[1]).abs())
        if difference > rounding_error(largest(parts[0].abs()), coordinates.dtype):
            raise ValueError(
                f"method 'exact': the reference's gradient of {name!r} is random: two draws "
                f"differ by {difference:.3g}. Use method='paired', or enumerate all sites"
            )
    return first
