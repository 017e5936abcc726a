# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Statistical asserts on gradient samples, on top of :mod:`pyro_rb.diagnostics.stats.summary`.

Samples are a tensor of shape ``[N, *shape]``, or a dict of such tensors by parameter, as
:func:`pyro_rb.diagnostics.sample_gradients` returns them.
"""

import math
from statistics import NormalDist
from typing import Dict, Iterable, Mapping, Optional, Union

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.bias import BiasTest, Draws, find_bias
from pyro_rb.diagnostics.stats.coordinates import Coordinates
from pyro_rb.diagnostics.stats.moments import RunningMoments, SkewedMoments
from pyro_rb.diagnostics.stats.projections import Projector

Samples = Union[Tensor, Mapping[str, Tensor]]


def assert_unbiased(
    samples: Samples,
    expected: Optional[Samples] = None,
    *,
    paired: Optional[Samples] = None,
    independent: Optional[Samples] = None,
    failure_rate: float = 2e-5,
    detect: Optional[float] = 0.1,
    scale: Optional[float] = None,
    projections: int = 0,
) -> None:
    """
    Asserts that the mean of ``samples`` agrees with one of

    * ``expected``: exact values, of the shape of one draw;
    * ``paired``: draws of the reference, row by row with the same random numbers;
    * ``independent``: draws of the reference with other random numbers.

    It fails for a bias in any coordinate (z-test, Bonferroni: it fails by chance at the
    given ``failure_rate``), and it fails for want of power: when a bias of size
    ``detect * scale`` in some coordinate would not have been seen in 95 of 100 cases, for the
    sign that is easier to see where the draws are skewed.

    :param float detect: The smallest bias that must be seen, as a share of ``scale``. None
        switches the check of power off.
    :param float scale: What ``detect`` is a share of. Default: the euclidean norm of
        ``expected``, or of the mean of the comparison samples.
    :param int projections: If positive, tests this many random projections of the
        gradient in place of its coordinates. For concentrated discrete guides, where
        coordinates of never-drawn categories have no sample variance.
    """
    def as_dict(values: Optional[Samples]) -> Optional[Dict[str, Tensor]]:
        return None if values is None else _as_dict(values)

    test = compare_means(
        _as_dict(samples),
        as_dict(expected),
        paired=as_dict(paired),
        independent=as_dict(independent),
        failure_rate=failure_rate,
        projections=projections,
    )
    test.raise_if_biased()
    if detect is not None:
        test.raise_if_blind(detect, scale, either_sign=False)


def compare_means(
    samples: Mapping[str, Tensor],
    expected: Optional[Mapping[str, Tensor]] = None,
    *,
    paired: Optional[Mapping[str, Tensor]] = None,
    independent: Optional[Mapping[str, Tensor]] = None,
    failure_rate: float = 2e-5,
    projections: int = 0,
) -> BiasTest:
    """
    The test behind :func:`assert_unbiased`, for dicts of samples.

    :raises TypeError: Unless exactly one reference is given.
    :raises AssertionError: If it has other parameters.
    :raises ValueError: If it has other shapes.
    """
    given = [reference for reference in (expected, paired, independent) if reference is not None]
    if len(given) != 1:
        raise TypeError("give exactly one of expected, paired, independent")
    (reference,) = given
    if set(samples) != set(reference):
        raise AssertionError(f"samples of {sorted(samples)} cannot be compared with {sorted(reference)}")
    for name, rows in samples.items():
        shape, wanted = reference[name].shape, rows.shape if paired is not None else rows.shape[1:]
        if (shape if independent is None else shape[1:]) != wanted:
            raise ValueError(f"{name}: the reference has shape {tuple(shape)}, samples have {tuple(rows.shape)}")
    coordinates = Coordinates(list(samples), [rows[0] for rows in samples.values()], most=math.inf)
    projector = Projector.of_all(coordinates, projections) if projections else None

    def draws(values: Mapping[str, Tensor], less: Optional[Mapping[str, Tensor]] = None) -> Draws:
        found = Draws(coordinates, projector)
        rows = _flat(values, samples) - (_flat(less, samples) if less is not None else 0.0)
        found.moments = SkewedMoments.of(rows)
        found.projected = list(projector(rows)) if projector is not None else []
        return found

    if expected is not None:
        exact = coordinates.vector([expected[name].detach() for name in samples])
        return find_bias(draws(samples), exact, failure_rate)
    is_paired = paired is not None
    return find_bias(draws(samples, paired), draws(reference), failure_rate, is_paired)


def assert_variance_ratio(
    a: Samples,
    b: Samples,
    below: Optional[float] = None,
    above: Optional[float] = None,
    failure_rate: float = 1e-3,
    num_resamples: int = 500,
) -> float:
    """
    Asserts that the total variance of ``a``, over that of ``b``, is beyond doubt ``below``
    and/or ``above`` the given values: its bootstrap bound is.

    :param float failure_rate: One-sided error probability of the bound.
    :param int num_resamples: Number of bootstrap replicates.
    :returns: The measured ratio.
    """
    first, second = _flat(a), _flat(b)
    bottom = stats.total_variance(second)
    assert bottom > 0, "the second sample has no variance"
    ratio = stats.total_variance(first) / bottom
    if below is None and above is None:
        raise TypeError("give below=... or above=...")
    # The log ratio is nearer to normal, and has tails that 500 replicates do not reach.
    logs = bootstrap_variance_ratio(first, second, num_resamples).log()
    spread = logs.std().item() if ratio > 0 else 0.0
    margin = math.exp(-NormalDist().inv_cdf(failure_rate) * spread)
    measured = f"variance ratio {ratio:.4g}, bound {{:.4g}}, N = {len(first)} and {len(second)}"
    if below is not None:
        assert ratio * margin < below, f"not below {below}: " + measured.format(ratio * margin)
    if above is not None:
        assert ratio / margin > above, f"not above {above}: " + measured.format(ratio / margin)
    return ratio


def bootstrap_variance_ratio(a: Tensor, b: Tensor, num_resamples: int = 1000, seed: int = 0) -> Tensor:
    """
    Replicates of ``total_variance(a) / total_variance(b)``, ``[num_resamples]``, for two independent samples
    ``[N, *shape]`` and ``[M, *shape]``. The global generator is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    top = _bootstrap_variance(a, num_resamples, generator)
    bottom = _bootstrap_variance(b, num_resamples, generator)
    return top / bottom


def _bootstrap_variance(samples: Tensor, num_resamples: int, generator: torch.Generator) -> Tensor:
    moments = RunningMoments.of(samples)  # before the counts: it checks the shape
    centred = (samples.detach().double() - moments.mean).reshape(len(samples), -1)
    count = len(centred)
    drawn = torch.randint(count, (num_resamples, count), generator=generator, device="cpu")
    weights = torch.zeros(num_resamples, count, dtype=torch.double, device="cpu")
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    weights = weights.to(centred.device) / count
    second_moment = weights @ centred.square().sum(1)
    return (second_moment - (weights @ centred).square().sum(1)) * (count / (count - 1))


def _as_dict(samples: Samples) -> Dict[str, Tensor]:
    return {"samples": samples} if isinstance(samples, Tensor) else dict(samples)


def _flat(samples: Samples, order: Optional[Iterable[str]] = None) -> Tensor:
    """All coordinates side by side, ``[N, D]``."""
    values = _as_dict(samples)
    rows = [values[name].detach().double() for name in order or sorted(values)]
    return torch.cat([row.reshape(len(row), row[0].numel()) for row in rows], dim=1)
