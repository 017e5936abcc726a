# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Do two sets of gradient samples agree in the mean, in each coordinate of each parameter?
Pure statistics on dicts of tensors, on top of :mod:`~pyro_rb.diagnostics.stats.mean_test`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.diagnostics.stats.coordinates import coordinate_name
from pyro_rb.diagnostics.stats.mean_test import (
    MeanTest,
    independent_test,
    one_sample_test,
    paired_test,
)
from pyro_rb.diagnostics.stats.moments import RunningMoments
from pyro_rb.diagnostics.stats.projections import project

#: Name under which random projections stand in for the parameters.
PROJECTIONS = "projections"


class CheckError(AssertionError):
    """
    A test of bias that has failed.

    :param ~pyro_rb.diagnostics.check.bias_check.BiasCheck check: The numbers, in ``check``, if
        :func:`~pyro_rb.diagnostics.check.unbiased.check_unbiased` has raised it.
    """

    def __init__(self, message: str, check: Any = None) -> None:
        super().__init__(message)
        self.check = check


class BiasError(CheckError):
    """A mean gradient differs from its reference by more than chance."""


class LowPowerError(CheckError):
    """There are too few draws to see a bias of the size that was asked for."""


@dataclass(frozen=True)
class BiasTest:
    """
    The outcome of :func:`compare_means`.

    :param dict tests: A :class:`~pyro_rb.diagnostics.stats.mean_test.MeanTest` for each parameter, or
        one for all :data:`PROJECTIONS`.
    :param dict differences: The difference of the means, by parameter.
    :param float scale: The euclidean norm of the mean of the reference, over all parameters.
    :param float failure_rate: Probability of a false alarm in any of the tests.
    """

    tests: Dict[str, MeanTest]
    differences: Dict[str, Tensor]
    scale: float
    failure_rate: float

    @property
    def num_samples(self) -> int:
        """Number of draws."""
        return max(test.num_samples for test in self.tests.values())

    def threshold(self, name: str) -> float:
        """What the absolute z-scores of one parameter are compared with."""
        num_tests = sum(test.difference.numel() for test in self.tests.values())
        return self.tests[name].threshold(self.failure_rate, num_tests)

    @property
    def worst(self) -> Tuple[str, int]:
        """The parameter, and the place in it, whose z-score exceeds its threshold most."""
        return max(
            ((n, int(t.z.abs().argmax())) for n, t in self.tests.items() if t.z.numel()),
            key=lambda at: abs(self._at(at)) / self.threshold(at[0]),
        )

    def detectable_bias(self, either_sign: bool = True) -> Tuple[str, float]:
        """
        The parameter in which a bias is hardest to see, and the size, in units of the
        gradient, that one would have to have there to be seen in 95 of 100 cases.

        :param bool either_sign: See :meth:`~pyro_rb.diagnostics.stats.mean_test.MeanTest.detectable_bias`.
        """
        sizes = {
            name: test.detectable_bias(self.threshold(name), either_sign=either_sign).max().item()
            for name, test in self.tests.items()
            if test.z.numel()
        }
        name = max(sizes, key=lambda n: sizes[n])
        return name, sizes[name]

    def raise_if_biased(self) -> None:
        """
        :raises BiasError: naming parameter, coordinate, z-score and size of the bias, and
            the size that could have been seen.
        """
        for name, difference in self.differences.items():
            if not difference.isfinite().all():
                raise BiasError(f"the mean of {name} is not finite")
        name, index = at = self.worst
        if abs(self._at(at)) <= self.threshold(name):
            return
        test = self.tests[name]
        size = test.difference.flatten()[index].item()
        message = (
            f"biased in {coordinate_name(name, test.difference.shape, index)}: "
            f"z = {self._at(at):.1f} (threshold {self.threshold(name):.1f}), difference "
            f"{size:.4g} +/- {test.standard_error.flatten()[index]:.2g}"
            f", {self.share(size)}, N = {test.num_samples}"
        )
        if name == PROJECTIONS:
            message += f"; the means differ most in {self.largest_difference()}"
        raise BiasError(message)

    def raise_if_blind(
        self, detect: float, scale: Optional[float] = None, either_sign: bool = True
    ) -> None:
        """
        :param float detect: The smallest bias that must be seen, as a share of ``scale``.
        :param float scale: Default: that of the test.
        :param bool either_sign: As in :meth:`detectable_bias`.
        :raises LowPowerError: naming the parameter, and the number of draws that it takes.
        """
        scale = self.scale if scale is None else scale
        if not scale > 0:
            raise LowPowerError(
                "the expected gradient is zero, so that detect has no scale: "
                "give scale=..., or detect=None"
            )
        name, seen = self.detectable_bias(either_sign)
        if seen > detect * scale:
            num_samples = self.tests[name].num_samples
            needed = math.ceil(num_samples * (seen / (detect * scale)) ** 2)
            raise LowPowerError(
                f"too little power in {name}: a bias below {seen:.3g} would have gone "
                f"unseen, asked for was {detect} x {scale:.3g} = {detect * scale:.3g}; "
                f"raise N from {num_samples} to about {needed}"
            )

    def largest_difference(self) -> str:
        """The coordinate whose mean gradients lie furthest apart, and how far."""
        sizes = {n: d.abs().max().item() for n, d in self.differences.items() if d.numel()}
        name = max(sizes, key=lambda n: sizes[n])
        difference = self.differences[name]
        index = int(difference.abs().argmax())
        return f"{coordinate_name(name, difference.shape, index)}, by {difference.flatten()[index]:.4g}"

    def _at(self, at: Tuple[str, int]) -> float:
        return self.tests[at[0]].z.flatten()[at[1]].item()

    def share(self, difference: float) -> str:
        """Its size relative to that of the gradient, in words."""
        if not self.scale > 0:
            return "the gradient is zero"
        return f"{100 * abs(difference) / self.scale:.3g}% of the gradient's norm"


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
    Tests whether the mean of ``samples`` agrees with one of

    * ``expected``: exact values, each of the shape ``[*shape]`` of one draw;
    * ``paired``: draws ``[N, *shape]`` of the reference, row by row with the same random
      numbers;
    * ``independent``: draws ``[M, *shape]`` of the reference with other random numbers.

    :param dict samples: ``[N, *shape]`` by name of the parameter.
    :param float failure_rate: Probability of a false alarm in any coordinate (Bonferroni).
    :param int projections: If positive, tests this many random projections of the gradient
        in place of its coordinates. For concentrated discrete guides, where coordinates of
        never-drawn categories have no sample variance.
    :raises TypeError: Unless exactly one reference is given.
    :raises AssertionError: If it has other parameters.

    **Example**

    >>> import torch
    >>> noise = torch.linspace(-1, 1, 200).reshape(100, 2)
    >>> draws = {"loc": noise + torch.tensor([1.0, 2.0])}
    >>> test = compare_means(draws, {"loc": torch.tensor([1.0, 2.0])})
    >>> test.raise_if_biased()
    >>> print(f"a bias of {test.detectable_bias()[1]:.1f} would have been seen")
    a bias of 0.4 would have been seen
    """
    given = [reference for reference in (expected, paired, independent) if reference is not None]
    if len(given) != 1:
        raise TypeError("give exactly one of expected, paired, independent")
    if set(samples) != set(given[0]):
        raise AssertionError(
            f"samples of {sorted(samples)} cannot be compared with {sorted(given[0])}"
        )
    ours = Draws.of(samples, projections)
    if expected is not None:
        return ours.test_exact(expected, failure_rate)
    return ours.test_draws(Draws.of(given[0], projections), paired is not None, failure_rate)


class Draws:
    """
    Gradient samples as they are tested: all of them, or projections and means only, so that
    the gradients of a large model need not be held all at once.

    :param int num_projections: 0 to keep every coordinate.

    **Example**

    >>> import torch
    >>> draws = Draws.of({"loc": torch.zeros(3, 2)}, num_projections=0)
    >>> draws.add({"loc": torch.ones(1, 2)})
    >>> draws.rows["loc"].shape, draws.moments["loc"].mean
    (torch.Size([4, 2]), tensor([0.2500, 0.2500], dtype=torch.float64))
    """

    def __init__(self, num_projections: int) -> None:
        self.num_projections = num_projections
        self.moments: Dict[str, RunningMoments] = {}
        self._rows: Dict[str, List[Tensor]] = {}

    @classmethod
    def of(cls, samples: Mapping[str, Tensor], num_projections: int) -> "Draws":
        """:param dict samples: ``[N, *shape]`` by name, one chunk of all draws."""
        draws = cls(num_projections)
        draws.add(samples)
        return draws

    def add(self, samples: Mapping[str, Tensor]) -> None:
        """:param dict samples: ``[N, *shape]`` by name, one chunk of the draws."""
        for name, rows in samples.items():
            chunk = RunningMoments()
            chunk.count, chunk.mean = len(rows), rows.detach().double().mean(0)
            self.moments.setdefault(name, RunningMoments()).merge(chunk)
        kept = {PROJECTIONS: project(samples, self.num_projections)} if self.num_projections else samples
        for name, rows in kept.items():
            self._rows.setdefault(name, []).append(rows.detach())

    @property
    def rows(self) -> Dict[str, Tensor]:
        """What is tested: ``[N, *shape]`` by name, or projections ``[N, num_projections]``."""
        return {name: torch.cat(rows) for name, rows in self._rows.items()}

    def tail_share(self, paired: Optional["Draws"] = None) -> float:
        """
        The share of the 1% largest draws in the variance of what is tested, see
        :func:`~pyro_rb.diagnostics.stats.summary.tail_share`.
        """
        other = paired.rows if paired is not None else None
        total: Any = 0.0
        for name, rows in self.rows.items():
            values = rows.double() - (0.0 if other is None else other[name].double())
            total = total + (values - values.mean(0)).reshape(len(rows), -1).square().sum(1)
        return stats.tail_share(total)

    @property
    def means(self) -> Dict[str, Tensor]:
        """By parameter, also where projections are tested."""
        return {name: moments.mean for name, moments in self.moments.items()}

    def test_exact(self, expected: Mapping[str, Tensor], failure_rate: float) -> BiasTest:
        """Tests against exact values, ``[*shape]`` by name."""
        means = {name: expected[name].detach().double() for name in self.means}
        reference: Mapping[str, Tensor] = means
        if self.num_projections:
            rows = project({n: mean.unsqueeze(0) for n, mean in means.items()}, self.num_projections)
            reference = {PROJECTIONS: rows[0]}
        tests = {n: one_sample_test(rows, reference[n]) for n, rows in self.rows.items()}
        return self._result(tests, means, failure_rate)

    def test_draws(self, other: "Draws", is_paired: bool, failure_rate: float) -> BiasTest:
        """Tests against other draws, of which the rows belong to those here if paired."""
        compare = paired_test if is_paired else independent_test
        reference = other.rows
        tests = {n: compare(rows, reference[n]) for n, rows in self.rows.items()}
        return self._result(tests, other.means, failure_rate)

    def _result(
        self, tests: Dict[str, MeanTest], means: Mapping[str, Tensor], failure_rate: float
    ) -> BiasTest:
        # Terms of one size may cancel in one parameter, and leave their rounding there.
        rounding = max(test.rounding for test in tests.values())
        tests = {name: replace(test, rounding=rounding) for name, test in tests.items()}
        differences = {name: mean - means[name] for name, mean in self.means.items()}
        scale = math.sqrt(sum(mean.square().sum().item() for mean in means.values()))
        return BiasTest(tests, differences, scale, failure_rate)
