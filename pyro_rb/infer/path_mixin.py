# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What losses with path gradients share."""

import math
import numbers
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch

from pyro_rb.infer.report import Report, Summary
from pyro_rb.infer.util import is_replayed
from pyro_rb.ops.control_variate import AdaptiveScale
from pyro_rb.ops.graph import share_leaves

Grads = Dict[torch.Tensor, torch.Tensor]


def check_scale(scale: Any) -> Union[float, str]:
    """
    :raises ValueError: unless ``scale`` is a finite number or ``"adaptive"``.
    """
    is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if is_number and math.isfinite(scale):
        return float(scale)
    if isinstance(scale, str) and scale == "adaptive":
        return scale
    raise ValueError(
        f"Invalid control_variate_scale: {scale!r}. Expected a finite float, such as "
        "1.0 (sticking the landing) or 0.0 (Trace_ELBO), or the string 'adaptive'."
    )


def grads(term: Any, parameters: Sequence[torch.Tensor]) -> Grads:
    """The gradient of a scalar by parameter, zero where it does not depend on one."""
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return {
        p: torch.zeros_like(p) if grad is None else grad
        for p, grad in zip(parameters, found)
    }


class PathGradientMixin:
    """
    Base class, to be named before the one of Pyro: taps the draws of the guide, has scales
    for their scores, and a report.
    """

    #: Says in the report how a site is treated that is left to Pyro.
    otherwise: str
    control_variate_scale: Union[float, str]

    def _init_scales(self, control_variate_scale: Any) -> None:
        self.control_variate_scale = check_scale(control_variate_scale)
        self._adaptive = AdaptiveScale()
        #: Of the last particle, for each site with a path gradient.
        self._scales: Dict[str, float] = {}
        self._latest: Optional[Summary] = None

    def report(self) -> Report:
        """
        :return: a row for each latent site of the guide, from the last particle that
            was run with gradients enabled: its name, the treatment, and the reason for
            it. Prints as a table.
        :raises RuntimeError: before the first such particle was run.
        """
        if self._latest is None:
            raise RuntimeError(
                "report() tells what was done at the last step, and there was none. "
                "Expected a step, or a loss, before it: call SVI.step() first."
            )
        return self._latest.report()

    def _obstacle(self) -> str:
        """Why no draw is to be tapped; empty if they are."""
        if not torch.is_grad_enabled():
            return "no gradient"
        if self.control_variate_scale == 0.0:
            return "control_variate_scale is 0"
        if is_replayed():
            return "a replay around the loss may supply its value"
        if torch.jit.is_tracing():
            # The partial derivatives of one draw would be baked in as constants.
            raise NotImplementedError(
                f"{type(self).__name__} was called inside of torch.jit.trace, which does "
                "not record the derivatives that it takes. Expected a call outside; to "
                "compile a loss, use JitTrace_ELBO or control_variate_scale=0.0."
            )
        return ""

    def _find_scales(
        self,
        log_q: Mapping[str, torch.Tensor],
        stop: Any = frozenset(),
        may_learn: bool = True,
    ) -> bool:
        """
        Sets the scale of each tapped site, and says whether to learn at this step.

        :param log_q: the log density of each tapped site, a scalar.
        :param stop: graph nodes behind which a site's parameters are not its own.
        :param may_learn: whether this counts as a step.
        """
        if isinstance(self.control_variate_scale, float):
            self._scales.update(dict.fromkeys(log_q, self.control_variate_scale))
            return False
        variates = {
            name: self._adaptive.find(term, stop) for name, term in log_q.items()
        }
        # Without a parameter there is no score, and any scale gives the same.
        self._scales.update(
            (name, 1.0 if variate is None else variate.scale)
            for name, variate in variates.items()
        )
        return may_learn and any(
            [variate.is_due() for variate in set(variates.values()) if variate]
        )

    def _learn(
        self,
        leaves_of: Mapping[str, List[torch.Tensor]],
        surrogate: torch.Tensor,
        compute_scores: Callable[[Sequence[torch.Tensor]], Grads],
    ) -> None:
        """
        :param leaves_of: the parameters of each tapped site.
        :param surrogate: its gradient is the path gradient plus ``1 - c`` times the score.
        :param compute_scores: gives the score, or what stands for it, by parameter.
        """
        groups = [pair for pair in share_leaves(leaves_of) if pair[1]]
        everything = [p for _, parameters in groups for p in parameters]
        if not everything:
            return
        scores = compute_scores(everything)
        totals = grads(surrogate, everything)
        for names, parameters in groups:
            rest = 1.0 - self._scales[names[0]]
            score = [scores[p] for p in parameters]
            path = [totals[p] - rest * scores[p] for p in parameters]
            self._adaptive.learn(parameters, path, score)
