# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Statistical asserts on gradient samples, on top of :mod:`pyro_rb.diagnostics.stats`.

Samples are a tensor of shape ``[N, *shape]``, or a dict of such tensors by parameter, as
:func:`pyro_rb.diagnostics.sample_gradients` returns them.
"""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Dict, List, Mapping, Optional, Union

import torch
from torch import Tensor

from pyro_rb.diagnostics import stats

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
    ``detect * scale`` in some coordinate would not have been seen in 95 of 100 cases.

    :param float detect: The smallest bias that must be seen, as a share of ``scale``. None
        switches the check of power off.
    :param float scale: What ``detect`` is a share of. Default: the euclidean norm of
        ``expected``, or of the mean of the comparison samples.
    :param int projections: If positive, tests this many random projections of the
        gradient in place of its coordinates. For concentrated discrete guides, where
        coordinates of never-drawn categories have no sample variance.
    """
    given = [reference for reference in (expected, paired, independent) if reference is not None]
    if len(given) != 1:
        raise TypeError("give exactly one of expected, paired, independent")
    ours, reference = _as_dict(samples), _as_dict(given[0])
    if set(ours) != set(reference):
        raise AssertionError(
            f"samples of {sorted(ours)} cannot be compared with {sorted(reference)}"
        )
    names = list(ours)
    if projections:
        ours = _project(ours, names, projections, exact=False)
        reference = _project(reference, names, projections, exact=expected is not None)
        names = list(ours)

    if expected is not None:
        tests = {n: stats.one_sample_test(ours[n], reference[n]) for n in names}
        means = reference
    else:
        compare = stats.paired_test if paired is not None else stats.independent_test
        tests = {n: compare(ours[n], reference[n]) for n in names}
        means = {n: reference[n].double().mean(0) for n in names}

    # Terms of one size may cancel in one parameter, and leave their rounding there.
    rounding = max(test.rounding for test in tests.values())
    tests = {name: replace(test, rounding=rounding) for name, test in tests.items()}
    num_tests = sum(test.difference.numel() for test in tests.values())
    for name, test in tests.items():
        assert test.difference.isfinite().all(), f"the mean of {name} is not finite"
        threshold = test.threshold(failure_rate, num_tests)
        if not test.max_abs_z <= threshold:
            worst = int(test.z.abs().argmax())
            raise AssertionError(
                f"biased in {name}[{worst}]: z = {test.z.flatten()[worst]:.1f} "
                f"(threshold {threshold:.1f}), difference "
                f"{test.difference.flatten()[worst]:.4g} +/- "
                f"{test.standard_error.flatten()[worst]:.2g}, N = {test.num_samples}"
            )

    if detect is None:
        return
    if scale is None:
        scale = math.sqrt(sum(m.double().square().sum().item() for m in means.values()))
        if not scale > 0:
            raise AssertionError(
                "the expected gradient is zero, so that detect has no scale: "
                "give scale=..., or detect=None"
            )
    for name, test in tests.items():
        seen = test.detectable_bias(test.threshold(failure_rate, num_tests)).max().item()
        if seen > detect * scale:
            needed = math.ceil(test.num_samples * (seen / (detect * scale)) ** 2)
            raise AssertionError(
                f"too little power in {name}: a bias below {seen:.3g} would have gone "
                f"unseen, asked for was {detect} x {scale:.3g} = {detect * scale:.3g}; "
                f"raise N from {test.num_samples} to about {needed}"
            )


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


def _project(
    values: Dict[str, Tensor], names: List[str], projections: int, exact: bool
) -> Dict[str, Tensor]:
    rows = [values[n].double() for n in names]
    rows = [row.reshape(1, -1) if exact else row.reshape(len(row), -1) for row in rows]
    projected = stats.random_projections(torch.cat(rows, dim=1), projections)
    return {"projections": projected[0] if exact else projected}
