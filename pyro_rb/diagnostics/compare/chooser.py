# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Tries which losses apply to a model and guide: :class:`Chooser`."""

import math
import warnings
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from pyro.infer import RenyiELBO

from pyro_rb.diagnostics.run.losses import (
    ENUMERATED,
    available_losses,
    has_elbo,
    make_loss,
    with_options,
)
from pyro_rb.diagnostics.run.memory import SizeLimit
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.problem import Problem
from pyro_rb.diagnostics.run.sites import beyond_particles, without_dependents
from pyro_rb.infer import DReG_ELBO
from pyro_rb.infer.generators import seed_generators

#: Enumeration and particles are tried up to this many numbers in one tensor.
MAX_ELEMENTS = 2**22
NUM_PARTICLES = 10
STL, LOCAL = "STLTrace_ELBO", "R2G2_ELBO:local"


class Candidate(NamedTuple):
    """
    :param str name: The loss.
    :param callable obstacle: Why it is not even tried, of a :class:`Chooser`; None if it is.
    :param callable flaw: Why it is not taken though it runs, of the chooser and the loss after one
        evaluation; None if it is.
    :param str unless: Words of a warning that counts as an error.
    :param str hint: What is said before an error.
    """

    name: str
    obstacle: Callable[["Chooser"], Optional[str]] = lambda _: None
    flaw: Callable[["Chooser", Any], Optional[str]] = lambda *_: None
    unless: str = ""
    hint: str = ""


class Choice(NamedTuple):
    """
    :param str reference: The loss that the others are compared to.
    :param list losses: Names of the losses to try, the simpler ones first.
    :param dict left_out: Why the other candidates are not tried, by name.
    """

    reference: str
    losses: List[str]
    left_out: Dict[str, str]


class Chooser:
    """Chooses for a prepared problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.sites = problem.sites
        self._tried: List[str] = []
        self._reference = ""
        self._left_out: Dict[str, str] = {}
        self._obstacle: Optional[Tuple[Optional[str]]] = None

    def choose(self, candidates: Sequence[Candidate], reference: Optional[str] = None) -> Choice:
        self._reference = reference = reference or self.sites.reference
        loss = make_loss(reference)
        known = available_losses()
        listed = [one for one in candidates if one.name.partition(":")[0] in {*known, ENUMERATED}]
        reason = None
        if isinstance(loss, RenyiELBO) and loss.alpha == 0:
            reason = "the ELBO, another objective"
            self._choose_importance_weighted(reference, loss)
        elif not self.sites.latent:
            reason = "the guide has no latent site"
        elif not has_elbo(reference):
            reason = f"another objective than {reference}"
        for one in listed:
            name = self._annotated(one.name)
            if reason is None:
                name = with_options(name, reference)
            if reason is not None or name != reference:
                found = reason or self._try(one._replace(name=name))
                if found:
                    self._left_out[name] = found
        return Choice(reference, self._tried, self._left_out)

    def _annotated(self, name: str) -> str:
        """A guide that says itself what to enumerate needs no wrapper."""
        sites = self.sites
        return "TraceEnum_ELBO" if name == ENUMERATED and 0 < len(sites.countable) == len(sites.annotated) else name

    def _try(self, one: Candidate) -> Optional[str]:
        """
        Takes a candidate if one evaluation of it succeeds.

        :returns: Why it is not taken; None if it is.
        """
        reason = one.obstacle(self)
        if reason is None:
            loss = make_loss(one.name)
            error = self._evaluate(loss, one.unless)
            reason = one.flaw(self, loss) if error is None else one.hint + error
        if reason is None:
            self._tried.append(one.name)
        return reason

    def sums_in_model(self) -> Optional[str]:
        summed = self.sites.summed
        return f"it does not sum out the model's {_listed(summed)}" if summed else None

    def no_mean_field(self) -> Optional[str]:
        scored, jacobians = self.sites.scored, self.sites.jacobians
        if scored and not self.sites.summed:
            return f"{_listed(scored)} {'is' if len(scored) == 1 else 'are'} not reparameterized"
        if jacobians and not self.sites.summed:
            return (
                "biased on this guide: Pyro's KL divergence of a Delta leaves out its "
                f"log_density, here the Jacobian of {_listed(jacobians)}"
            )
        return self.sums_in_model()

    def no_graph(self) -> Optional[str]:
        return self.sums_in_model() or (None if self.sites.scored else "all sites of the guide are reparameterized")

    def hidden_dependence(self, loss: Any) -> Optional[str]:
        hidden = self._sites_of(without_dependents, loss)
        if not hidden:
            return None
        return (
            f"it sees nothing that depends on {_listed(hidden)}, and is biased where that "
            "is so by control flow such as if, range() or .item()"
        )

    def _sites_of(self, find: Callable, loss: Any) -> List[str]:
        one = self._problem.sampler(loss)
        with self._problem.preserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return find(loss, *one.call, **one.kwargs)

    def no_discrete(self) -> Optional[str]:
        return None if self.sites.discrete else "the guide has no discrete site"

    def no_enumeration(self) -> Optional[str]:
        if self.sites.discrete and not self.sites.countable:
            return f"{_listed(self.sites.discrete)} cannot be enumerated"
        return self.no_discrete() or self._too_many()

    def no_path_gradient(self) -> Optional[str]:
        is_tried = any(name.startswith(STL) for name in [self._reference, *self._tried])
        return None if is_tried else next((r for n, r in self._left_out.items() if n.startswith(STL)), "")

    def no_particles(self) -> Optional[str]:
        """Of a large model the particles together may not fit in memory."""
        count = NUM_PARTICLES * self.sites.largest_latent
        too_many = f"its particles together would draw {count} numbers at one site; name it in losses to try it"
        return self.sums_in_model() or (too_many if count > MAX_ELEMENTS else None)

    def not_vectorized(self, loss: Any) -> Optional[str]:
        names = self._sites_of(beyond_particles, loss)
        if not names:
            return None
        return (
            f"the model is another with vectorized particles: {_listed(names)} has more dimensions than these and the "
            f"plates, and each row counts {loss.num_particles} times"
        )

    def nothing_projected(self, loss: Any) -> Optional[str]:
        if is_treated(loss, "projected", "local"):
            return None
        rows = [row for row in loss.report() if not row.treatment.startswith("as ")]
        reasons = dict.fromkeys(f"'{row.site}': {row.reason}" for row in rows)
        return f"it projects no site; {_shortened(list(reasons))}"

    def nothing_sampled(self, loss: Any) -> Optional[str]:
        if is_treated(loss, "top-k"):
            return None
        rows = [row for row in loss.report() if row.site in self.sites.discrete]
        reasons = [f"'{row.site}': {row.reason}" for row in rows if row.treatment != "exact"]
        if reasons:
            return f"it treats no site; {_shortened(reasons)}"
        return "there are too few values: all are summed"

    def nothing_local(self) -> Optional[str]:
        """Biased if rows are coupled, which no trace shows; so it is never taken unasked."""
        loss = make_loss(with_options(LOCAL, self._reference))
        if self.sums_in_model() or self._evaluate(loss) is not None or not is_treated(loss, "local"):
            return ""
        return "right only if no row has an effect on another; then name it in losses"

    def is_exact(self) -> bool:
        """Whether enumeration leaves nothing to chance, apart from subsampling."""
        sites = self.sites
        discrete_only = bool(sites.latent) and set(sites.latent) == set(sites.countable)
        return discrete_only and not sites.summed and self._too_many() is None

    def _choose_importance_weighted(self, reference: str, loss: RenyiELBO) -> None:
        name = f"DReG_ELBO:num_particles={loss.num_particles}"
        plates = self.sites.subsampled
        if plates and not isinstance(loss, DReG_ELBO):
            self._left_out[name] = (
                f"another objective: where {_listed(plates)} subsamples, RenyiELBO multiplies the log weights, "
                f"not the bound; take {name},control_variate_scale=0.0 as reference, which does not"
            )
            return
        for one in (name, f"{name},control_variate_scale=adaptive"):
            reason = None if one == reference else self._try(Candidate(one))
            if reason:
                self._left_out[one] = reason
                return

    def _too_many(self) -> Optional[str]:
        """Why enumeration of the guide is not to be risked, if it is not."""
        if self._obstacle is None:
            self._obstacle = (self._find_obstacle(),)
        return self._obstacle[0]

    def _find_obstacle(self) -> Optional[str]:
        # Pyro sums one site out after another, so that what counts is the largest tensor on the way.
        limit = max(MAX_ELEMENTS, 16 * self.sites.largest)
        error = self._evaluate(make_loss(with_options(ENUMERATED, self._reference)), limit=limit)
        return None if error is None else f"too many joint values, or not to be enumerated in parallel: {error}"

    def _evaluate(self, loss: Any, unless: str = "", limit: Optional[int] = None) -> Optional[str]:
        """
        Evaluates a loss once, and leaves no trace.

        :param str unless: Words of a warning that counts as an error.
        :param int limit: The number of elements that a tensor may have.
        :returns: The error or that warning, in words; None if all is well.
        """
        with self._problem.preserved(), warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            seed_generators(0)
            one = self._problem.sampler(loss)
            try:
                with nullcontext() if limit is None else SizeLimit(limit):
                    value = one.step()
            except Exception as error:
                return one_line(error)
            finally:
                one.clear()
        if not math.isfinite(value):
            return f"its value is {value}"
        found = [one_line(item.message) for item in log if unless in str(item.message)]
        return found[0] if unless and found else None


def is_treated(loss: Any, *treatments: str) -> bool:
    """Whether the loss reports one of the treatments at any site, after an evaluation."""
    return any(row.treatment.startswith(treatments) for row in loss.report())


def _listed(names: List[str]) -> str:
    return _shortened([repr(name) for name in names])


def _shortened(items: List[str]) -> str:
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
