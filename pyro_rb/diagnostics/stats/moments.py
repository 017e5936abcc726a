# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Mean, variance and skewness of a stream of tensors: :class:`RunningMoments`."""

import math

import torch
from torch import Tensor


class RunningMoments:
    """
    Mean and variance of a stream of tensors of one shape, held in float64 and without
    storing the stream (Welford 1962).

    **Example**

    >>> import torch
    >>> moments = RunningMoments()
    >>> for x in ([1., 10.], [2., 10.], [3., 10.]):
    ...     _ = moments.update(torch.tensor(x))
    >>> moments.count, moments.mean.tolist(), moments.variance.tolist()
    (3, [2.0, 10.0], [1.0, 0.0])
    """

    def __init__(self) -> None:
        self.count = 0
        # Numbers of the CPU go with tensors of any device.
        self.mean = torch.zeros((), device="cpu")
        self._squares = torch.zeros((), device="cpu")  # sum of squared deviations from the mean

    @classmethod
    def of(cls, samples: Tensor) -> "RunningMoments":
        """
        :param ~torch.Tensor samples: All draws, ``[N, *shape]``.
        :raises ValueError: If there are fewer than two.
        """
        if samples.dim() == 0 or len(samples) < 2:
            raise ValueError(f"need at least 2 draws, got samples of shape {tuple(samples.shape)}")
        samples = samples.detach().double()
        result = cls()
        result.count, result.mean = len(samples), samples.mean(0)
        # A constant coordinate must have variance 0, not the rounding of its mean.
        constant = (samples == samples[0]).all(0)
        result.mean = torch.where(constant, samples[0], result.mean)
        result._squares = (samples - result.mean).square().sum(0)
        return result

    def update(self, value: Tensor) -> Tensor:
        """
        Adds one draw.

        :param ~torch.Tensor value: A tensor of the same shape at each call.
        :returns: By how much this draw has increased the sum of squared deviations from
            the mean, summed over coordinates; a scalar tensor.
        :rtype: ~torch.Tensor
        """
        if self.count == 0:
            self.mean = torch.zeros_like(value, dtype=torch.double, requires_grad=False)
            self._squares = torch.zeros_like(self.mean)
        self.count += 1
        # In place, since gradients of large models are large.
        deviation = value.detach() - self.mean
        self.mean.add_(deviation, alpha=1 / self.count)
        remainder = value.detach() - self.mean
        self._squares.addcmul_(deviation, remainder)
        return torch.dot(deviation.reshape(-1), remainder.reshape(-1))

    def merge(self, other: "RunningMoments") -> None:
        """
        Adds all draws of another accumulator (Chan, Golub and LeVeque 1979).

        :param RunningMoments other: Moments of tensors of the same shape.
        """
        if other.count == 0:
            return
        total = self.count + other.count
        deviation = other.mean - self.mean
        self._squares = self._squares + other._squares
        self._squares = self._squares + deviation**2 * (self.count * other.count / total)
        self.mean = self.mean + deviation * (other.count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The unbiased variance per coordinate; NaN with fewer than two draws."""
        return self._squares / (self.count - 1) if self.count > 1 else self.mean * math.nan

    @property
    def standard_error(self) -> Tensor:
        """The standard error of ``mean`` per coordinate."""
        return (self.variance / self.count).sqrt()

    @property
    def rms(self) -> Tensor:
        """The root-mean-square value per coordinate."""
        return (self.mean**2 + self._squares / max(self.count, 1)).sqrt()


class SkewedMoments(RunningMoments):
    """
    As :class:`RunningMoments`, and the skewness of the mean.

    **Example**

    >>> import torch
    >>> moments = SkewedMoments()
    >>> for x in ([1., 1.], [2., 1.], [3., 4.]):
    ...     _ = moments.update(torch.tensor(x))
    >>> [round(value, 3) for value in moments.skewness.tolist()]
    [0.0, 0.222]
    """

    def __init__(self) -> None:
        super().__init__()
        self._cubes = torch.zeros((), device="cpu")  # sum of cubed deviations from the mean

    def update(self, value: Tensor) -> Tensor:
        if self.count == 0:
            self._cubes = torch.zeros_like(value, dtype=torch.double, requires_grad=False)
        else:
            # Both from the moments before this draw (Terriberry 2007).
            deviation = value.detach() - self.mean
            part = deviation / (self.count + 1)
            self._cubes.addcmul_(part, self._squares, value=-3)
            self._cubes.addcmul_(part * part, deviation, value=self.count * (self.count - 1))
        return super().update(value)

    @classmethod
    def of(cls, samples: Tensor) -> "SkewedMoments":
        found = super().of(samples)
        assert isinstance(found, cls)
        found._cubes = (samples.detach().double() - found.mean).pow(3).sum(0)
        return found

    def merge(self, other: RunningMoments) -> None:
        raise NotImplementedError("SkewedMoments cannot be merged")

    @property
    def third_cumulant(self) -> Tensor:
        """Of the mean, per coordinate."""
        return self._cubes / self.count**3

    @property
    def skewness(self) -> Tensor:
        """Of the mean, per coordinate: that of one draw over the root of their number."""
        return skewness(self.third_cumulant, self.standard_error)


def skewness(third_cumulant: Tensor, standard_error: Tensor) -> Tensor:
    """Zero where there is no variance."""
    found = third_cumulant / standard_error**3
    return torch.where(found.isfinite(), found, torch.zeros_like(found))
