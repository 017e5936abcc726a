# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which pre-activations may be drawn row by row, since rows have no effect on one another?"""

import copy
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from pyro.poutine import Trace

from pyro_rb.infer.traces import sample_sites, shapes
from pyro_rb.ops.row_separation import find_dims, find_separable, keeps_rows
from pyro_rb.poutine.gaussian_site import Plain, join
from pyro_rb.poutine.local_draws import LocalDraws, LocalUse

Traces = Tuple[Trace, Trace]

COUPLED = "rows have an effect on one another"
#: After so many cases, each with functions or shapes of its own, no more are tried.
MAX_CASES = 64
#: So many times in one step.
MAX_RUNS = 12


class _Case:
    """What is known of the runs that call the same functions with tensors of the same shapes."""

    def __init__(self) -> None:
        self.shared: Mapping[Tuple, Plain] = {}
        self.num_runs = 0

    @property
    def is_due(self) -> bool:
        """Whether the next run is to be checked: the first, second, fourth, eighth, ..."""
        n = self.num_runs + 1
        return n & (n - 1) == 0 or n % 1000 == 0

    def refuse(self, uses: Sequence[LocalUse], reasons: Sequence[str]) -> None:
        """Has elements shared by all rows from now on."""
        shared = dict(self.shared)
        for use, reason in zip(uses, reasons):
            for key, elements in use.elements:
                known = shared.get(key, Plain(None, reason))
                shared[key] = Plain(join(known.elements, elements), known.reason)
        self.shared = shared
        self.num_runs = 0


class RowCheck:
    """
    Decides for :class:`~pyro_rb.infer.r2g2_elbo.R2G2_ELBO` where pre-activations are drawn row
    by row: where it is proven that each term of the ELBO depends on one row only, in two ways.

    * The gradient of a randomly weighted sum of terms by the noise of a row is the weight of
      that row times the gradient of the plain sum.
    * No term of the other rows changes if the noise of one half of the rows, or of the other,
      is made another. That sees what has no derivative as well.

    A case is known by the functions that were called, with their flags, and by shapes. It is
    checked at its first run, in which all layers are tried; and again at the second, fourth,
    eighth and so on, and at every 1000th. A layer that fails once is shared from then on, in this case.

    Example::

        >>> check = RowCheck()
        >>> check.draws().is_checked
        True
    """

    def __init__(self) -> None:
        self._cases: Dict[int, _Case] = {}
        self._case: Optional[_Case] = None  # that of the last run
        self._runs_of_step = 0
        self._is_settled = False

    def settled(self) -> "RowCheck":
        """One that does as was found out, and checks nothing."""
        settled = copy.copy(self)
        settled._is_settled = True
        return settled

    def draws(self) -> LocalDraws:
        """For the next run."""
        if self._is_settled:
            return LocalDraws({} if self._case is None else self._case.shared)
        self._runs_of_step += 1
        if self._runs_of_step > MAX_RUNS or len(self._cases) > MAX_CASES:
            return LocalDraws(reason="not the same functions from step to step")
        if self._case is None:
            return LocalDraws(keeps_record=True, is_checked=True)
        return LocalDraws(self._case.shared, True, self._case.is_due)

    def accepts(
        self,
        traces: Traces,
        local: Optional[LocalDraws],
        again: Callable[[LocalDraws], Optional[Traces]],
    ) -> bool:
        """
        Whether a run may stand. If not, it is to be made again, with new :meth:`draws` and the
        same random numbers.

        :param traces: of model and guide, with log densities.
        :param LocalDraws local: what was drawn in it.
        :param again: makes the run again, with the same random numbers, and other draws.
        """
        if local is None or local.record is None:
            self._runs_of_step = 0
            return True
        record = hash((local.record, shapes(*traces)))
        is_trial, self._case = self._case is None, self._cases.get(record)
        if self._case is None:
            if not is_trial:
                return False
            self._case = self._cases[record] = _Case()
        elif self._case.shared is not local.shared and (self._case.shared or local.shared):
            return False
        self._case.num_runs += 1
        if local.is_checked and local.uses:
            # Random numbers go on where they were: runs end with the same state.
            reasons = self._find_coupled(traces, local, again)
            if reasons:
                failed = [use for use, reason in zip(local.uses, reasons) if reason]
                self._case.refuse(failed, list(filter(None, reasons)))
                return False
        self._runs_of_step = 0
        return True

    def _find_coupled(
        self,
        traces: Traces,
        local: LocalDraws,
        again: Callable[[LocalDraws], Optional[Traces]],
    ) -> List[str]:
        """Why each layer is to be shared, empty where it is not; an empty list if none is."""
        terms = _terms(traces)
        noise = [use.noise for use in local.uses]
        reasons = [
            "" if is_separable else _why_coupled(terms, eps)
            for is_separable, eps in zip(find_separable(terms, noise), noise)
        ]
        if any(reasons):
            return reasons
        for rows in {len(eps) for eps in noise} - {1}:
            is_first = torch.randperm(rows, device=noise[0].device) < rows // 2
            for is_changed, shift in ((is_first, 2.0), (~is_first, -2.0)):
                other = LocalDraws(local.shared, True, False, {rows: shift * is_changed})
                try:
                    found = again(other)
                except Exception:  # of the model, which did not raise it before
                    found = None
                if (
                    found is None
                    or other.record != local.record
                    or not keeps_rows(terms, _terms(found), is_changed)
                ):
                    return [COUPLED if len(eps) == rows else "" for eps in noise]
        return []


def _why_coupled(terms: Sequence[torch.Tensor], noise: torch.Tensor) -> str:
    return COUPLED if find_dims(terms, len(noise)) else f"no plate of {len(noise)} rows"


def _terms(traces: Traces) -> List[torch.Tensor]:
    return [site["log_prob"] for trace in traces for _, site in sample_sites(trace)]
