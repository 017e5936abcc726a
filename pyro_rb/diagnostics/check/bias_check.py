# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What :func:`~pyro_rb.diagnostics.check.unbiased.check_unbiased` returns: :class:`BiasCheck`."""

from dataclasses import dataclass, field
from typing import Dict, List

import torch

from pyro_rb.diagnostics.stats.summary import HEAVY_TAIL


@dataclass(frozen=True)
class BiasCheck:
    """
    What :func:`~pyro_rb.diagnostics.check.unbiased.check_unbiased` has found when it found no bias.
    Prints as a sentence.

    :param str method: ``"paired"``, ``"independent"`` or ``"exact"``.
    :param int num_samples: Number of gradients of each loss.
    :param dict parameters: The shape of each parameter.
    :param int projections: Number of random projections that were tested in place of
        coordinates; 0 if coordinates were.
    :param float max_abs_z: The largest absolute z-score.
    :param str at: Where it was found.
    :param float threshold: What it would have had to exceed.
    :param float detectable_bias: A bias of this size, in units of the gradient, would have
        been seen with probability 0.95 in any coordinate (or along any projection).
    :param float detectable_share: The same as a share of the euclidean norm of the
        reference's mean gradient; infinite where that is zero.
    :param dict z_scores: The largest absolute z-score of each parameter, or the
        score of each projection.
    :param float tail_share: The share of the 1% largest draws in the variance that the test
        stands on; NaN with fewer than 100 draws. Of normal draws it is 0.08.
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
            f"no bias seen in {what}{size} parameter value{'s' * (size != 1)}, {self.num_samples} "
            f"{self.method} draws: largest |z| {self.max_abs_z:.1f} at {self.at} (threshold "
            f"{self.threshold:.1f}). A bias of {self.detectable_bias:.3g}, "
            f"{100 * self.detectable_share:.2g}% of the gradient's norm, would have been seen."
        )
        if self.heavy_tailed:
            text += (
                f" But the largest 1% of the draws make up {100 * self.tail_share:.0f}% of the "
                "variance: what is rarer still was not seen. Take more draws."
            )
        return text
