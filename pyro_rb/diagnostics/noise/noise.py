# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""How many draws does a precise gradient take? :func:`measure_noise` tells."""

import math
from dataclasses import dataclass
from typing import Any, Callable, List, Mapping, Optional, Tuple, Union

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_rb.diagnostics.run.arguments import Arguments, check_counts
from pyro_rb.diagnostics.run.losses import copy_loss
from pyro_rb.diagnostics.run.messages import counted
from pyro_rb.diagnostics.run.problem import prepared
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.moments import RunningMoments

NUM_BLOCKS = 20


@dataclass(frozen=True)
class NoiseEstimate:
    """
    Signal and noise of a gradient and of its loss, at one state of the parameters. Prints as
    a few sentences.

    :param int num_samples: Number of draws, one call of the loss each.
    :param int num_particles: Number of particles of the loss.
    :param float signal: Squared euclidean norm of the mean gradient, without the bias that noise
        would add to it. So it may be negative where there is hardly any signal.
    :param float signal_error: Its standard error.
    :param float variance: Variance of one gradient, summed over coordinates.
    :param float loss: Mean of the loss.
    :param float loss_sd: Standard deviation of one loss.
    """

    num_samples: int
    num_particles: int
    signal: float
    signal_error: float
    variance: float
    loss: float
    loss_sd: float

    @property
    def noise_scale(self) -> float:
        """
        ``variance / signal``: the number of draws at which a mean gradient is as much noise
        as signal. With fewer draws, twice as many save about half of the steps; with many more,
        they save next to none (the simple noise scale of McCandlish, Kaplan, Amodei (2018),
        https://arxiv.org/abs/1812.06162). Infinite without signal.
        """
        return _ratio(self.variance, self.signal)

    def required_draws(self, rel_error: float) -> float:
        """
        The number of gradients to average so that the error of their mean, a vector, is
        ``rel_error`` times as long as the gradient (root mean square). They may be particles of one
        step, or steps at parameters that hardly move.

        :param float rel_error: Such as 0.1.
        :returns: An integer; infinite where the draws show no signal.
        :rtype: float
        :raises ValueError: If ``rel_error`` is not positive.
        """
        return self._draws(rel_error, self.signal)

    def bounds(self, rel_error: float) -> Tuple[float, float]:
        """
        Between which values :meth:`required_draws` lies, if ``signal`` is off by up to two
        standard errors.
        """
        width = 2 * self.signal_error
        return self._draws(rel_error, self.signal + width), self._draws(rel_error, self.signal - width)

    def required_particles(self, rel_error: float) -> float:
        """
        The ``num_particles`` that the loss would need: :meth:`required_draws` times the number that
        it has. This is for losses that average their particles, as ``Trace_ELBO`` does. With
        ``RenyiELBO`` and ``DReG_ELBO`` more particles make another objective; average draws there.
        The noise that a subsample adds does not fall with vectorized particles.
        """
        return self.required_draws(rel_error) * self.num_particles

    def required_loss_draws(self, error: float) -> float:
        """
        The number of losses to average for a standard error of ``error`` nats.

        :raises ValueError: If ``error`` is not positive.
        """
        if not error > 0:
            raise ValueError(f"error: expected a number > 0, got {error}")
        return max(1, math.ceil((self.loss_sd / error) ** 2))

    def __str__(self) -> str:
        low, high = (_number(bound) for bound in self.bounds(0.1))
        lines = [
            f"loss {self.loss:.6g} nats, with a standard deviation of {self.loss_sd:.3g} "
            f"({self.num_samples} draws of {counted(self.num_particles, 'particle')} each)",
            f"draws for a relative error of 10% of the gradient: {_number(self.required_draws(0.1))} "
            f"(between {low} and {high})",
        ]
        if self.signal < 2 * self.signal_error:
            lines.append(
                "no gradient can be told from zero: the parameters are near an optimum, or "
                "there are too few draws"
            )
        return "\n".join(lines)

    def _draws(self, rel_error: float, signal: float) -> float:
        if not rel_error > 0:
            raise ValueError(f"rel_error: expected a number > 0, got {rel_error}")
        draws = _ratio(self.variance, signal) / rel_error**2
        return max(1, math.ceil(draws)) if math.isfinite(draws) else draws


def measure_noise(
    loss: Union[str, ELBO],
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    num_samples: int = 400,
    num_burn_in: int = 0,
    seed: int = 0,
    parameters: Optional[Mapping[str, Tensor]] = None,
    progress: bool = False,
) -> NoiseEstimate:
    """
    Measures how noisy a loss and its gradient are, at the parameters as they are, to say how
    many particles, or steps of averaging, a given relative error takes.

    Everything is left as it was found; the loss is copied.

    :param loss: An ELBO instance, or a name for
        :func:`~pyro_rb.diagnostics.run.losses.make_loss`.
    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide.
    :param args: Positional arguments of model and guide; or a function that returns them, which is
        called before each draw, for a new minibatch from the seeded generators.
    :param dict kwargs: Keyword arguments of model and guide.
    :param int num_samples: Number of draws, at least 40.
    :param int num_burn_in: Number of draws that are made first and thrown away.
    :param int seed: Seed, between 0 and 2**32 - 1.
    :param dict parameters: Unconstrained tensors by name. Default: all.
    :param bool progress: Whether to show a progress bar.
    :returns: A :class:`NoiseEstimate`.
    :raises ValueError: If there is no parameter, a number of draws is out of range, or a gradient or loss is not
        finite.

    Near an optimum the gradient vanishes but its noise does not, so no number of particles gives a
    small relative error: lower the learning rate instead. Heavy tails make all numbers here too
    small.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     loc = pyro.param("loc", torch.tensor(3.0))
    ...     pyro.sample("z", dist.Normal(loc, 1.))
    >>> noise = measure_noise("Trace_ELBO", model, guide)
    >>> 8 < noise.required_particles(rel_error=0.1) < 15   # the gradient is 3 +/- 1
    True
    """
    check_counts(num_samples, num_burn_in, 2 * NUM_BLOCKS)
    loss = copy_loss(loss, "loss")
    blocks = [RunningMoments() for _ in range(NUM_BLOCKS)]
    losses = RunningMoments()
    with prepared(model, guide, args, kwargs, seed, parameters, must_match=False) as problem:
        sampler = problem.sampler(loss)
        coordinates = Coordinates(sampler.names, sampler.tensors)
        scale = coordinates.weights.sqrt()
        for i, (value, gradients) in enumerate(sampler.draws(seed, num_samples, num_burn_in, progress)):
            blocks[i % NUM_BLOCKS].update(coordinates.vector(gradients) * scale)
            losses.update(torch.tensor(value, dtype=torch.double, device="cpu"))
    total = RunningMoments()
    for block in blocks:
        total.merge(block)
    if not (total.mean.isfinite().all() and losses.mean.isfinite()):
        raise ValueError("a gradient or a loss is not finite. GradientGuard says where that begins")
    signal, error = _squared_mean([block.mean for block in blocks])
    return NoiseEstimate(
        num_samples=num_samples,
        num_particles=getattr(loss, "num_particles", 1),
        signal=signal,
        signal_error=error,
        variance=total.variance.sum().item(),
        loss=losses.mean.item(),
        loss_sd=losses.variance.sqrt().item(),
    )


def _squared_mean(means: List[Tensor]) -> Tuple[float, float]:
    """
    An unbiased estimate of the squared norm of the expectation of independent vectors: the
    mean product of two different ones. And its standard error by the jackknife.
    """
    stacked = torch.stack(means)
    products = stacked @ stacked.T
    products.fill_diagonal_(0.0)
    count = len(means)
    total = products.sum()
    without = (total - 2 * products.sum(1)) / ((count - 1) * (count - 2))
    error = ((without - without.mean()).square().sum() * (count - 1) / count).sqrt()
    return (total / (count * (count - 1))).item(), error.item()


def _ratio(variance: float, signal: float) -> float:
    if variance == 0:
        return 0.0
    return variance / signal if signal > 0 else math.inf


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "infinitely many"
