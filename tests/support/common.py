# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Statistical asserts on gradient samples, on top of :mod:`pyro_rb.diagnostics.stats.summary`.

Samples are a tensor of shape ``[N, *shape]``, or a dict of such tensors by parameter, as
:func:`pyro_rb.diagnostics.sample_gradients` returns them.
"""

import math
from statistics import NormalDist
from typing import Dict, Mapping, Optional, Union

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.bias import compare_means

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
    logs = stats.bootstrap_variance_ratio(first, second, num_resamples).log()
    spread = logs.std().item() if ratio > 0 else 0.0
    margin = math.exp(-NormalDist().inv_cdf(failure_rate) * spread)
    measured = f"variance ratio {ratio:.4g}, bound {{:.4g}}, N = {len(first)} and {len(second)}"
    if below is not None:
        assert ratio * margin < below, f"not below {below}: " + measured.format(ratio * margin)
    if above is not None:
        assert ratio / margin > above, f"not above {above}: " + measured.format(ratio / margin)
    return ratio


def _as_dict(samples: Samples) -> Dict[str, Tensor]:
    return {"samples": samples} if isinstance(samples, Tensor) else dict(samples)


def _flat(samples: Samples) -> Tensor:
    """All coordinates side by side, ``[N, D]``."""
    values = _as_dict(samples)
    return torch.cat([values[name].double().reshape(len(values[name]), -1) for name in sorted(values)], dim=1)
