# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
One run of guide and model: which strategies draw the sites, and the traces that come out.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set

from pyro.poutine import Trace

from pyro_rb.infer.gaussian_kl import JointTerms, compute_log_prob, describe, note_uses
from pyro_rb.infer.markov_dims import MarkovDims
from pyro_rb.infer.report import Row, Summary
from pyro_rb.infer.traces import PARTICLES
from pyro_rb.infer.util import under
from pyro_rb.infer.weights import Baselines, has_own_baseline, is_single_draw
from pyro_rb.ops.family import GAUSSIANS, strip_independent
from pyro_rb.ops.topk import Slots
from pyro_rb.poutine import (
    DrawMessenger,
    PathGradient,
    Projection,
    TopK,
    TopKModelMessenger,
)
from pyro_rb.poutine.densities import compute_score_parts
from pyro_rb.poutine.draw_messenger import SUPPLIED


class Run:
    """
    The strategies of one particle, in the order in which a site is offered to them.

    :param topk: for discrete sites; None leaves them to Pyro.
    :param projection: for Gaussian sites; None leaves them to the next.
    :param path: for reparameterized sites; None leaves them to Pyro.
    :param int first_available_dim: for enumeration; None if nothing is enumerated.
    :param bool is_inner: whether values are drawn before handlers around the loss, as where
        sites are enumerated.
    :param bool is_paused: whether the projection is left out since it had no use lately.
    """

    def __init__(
        self,
        topk: Optional[TopK] = None,
        projection: Optional[Projection] = None,
        path: Optional[PathGradient] = None,
        first_available_dim: Optional[int] = None,
        is_inner: bool = False,
        is_paused: bool = False,
    ) -> None:
        self.topk, self.projection, self.path = topk, projection, path
        strategies: List[Any] = [s for s in (topk, projection, path) if s is not None]
        self.handler = DrawMessenger(strategies, first_available_dim)
        self._dims = MarkovDims()
        self.is_inner = is_inner
        self._is_paused = is_paused
        #: The scale of the score that is left out, for each site with a path gradient.
        self.scales: Dict[str, float] = {}
        self.may_learn = True
        #: Whether terms have weights of their own, which is known once densities are.
        self.has_weights = False
        self._not_analytic: Set[str] = set()
        #: Of projected sites with a path gradient.
        self.joint: JointTerms = {}

    @property
    def is_void(self) -> bool:
        """Whether it must be made again, with the same random numbers."""
        return self.projection is not None and bool(self.projection.violated)

    @property
    def path_sites(self) -> List[str]:
        """Sites whose score is left out, or a part of it."""
        if self.path is None:
            return []
        ours = {} if self.projection is None else self.projection.sites
        return [n for n in self.path.values if n not in ours or ours[n].projected is None]

    def hint(self) -> str:
        """What to say of an error that the slots of sites may have caused."""
        if self.topk is None or not self.topk.enumerated:
            return ""
        names = [site.name for site in self.topk.enumerated]
        plates = {plate for site in self.topk.enumerated for plate in site.plates}
        particles = (
            " With vectorize_particles=True the particles have a dim as well; False removes it."
            if PARTICLES in plates
            else ""
        )
        return (
            f"The values of the guide sites {names} have one more dim on the left, "
            "for the values that are looked at. If the model or guide cannot do with "
            f"it, as where a site inside of plates {sorted(plates - {PARTICLES})} is used outside, set "
            "infer={'topk': 0} at the site, which then has a single draw and the full cost. "
            "Else index by pyro.ops.indexing.Vindex, and avoid .item() and if." + particles
        )

    def guide(self, fn: Callable) -> Callable:
        """Wraps the guide."""
        # Slots must be in place before partial traces are, for sites that are enumerated in a loop.
        fn = fn if self.topk is None else self._dims(fn)
        fn = self.handler(fn) if self.is_inner else under(self.handler, fn)
        return fn if self.projection is None else self.projection.watch(fn, is_guide=True)

    def model(self, fn: Callable) -> Callable:
        """Wraps the model."""
        if self.topk is not None:
            fn = TopKModelMessenger(self.topk)(MarkovDims(self._dims)(fn))
        return fn if self.projection is None else self.projection.watch(fn)

    def compute_densities(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Computes log densities and score parts, which the traces have not so far."""
        self.handler.settle(guide_trace)
        if self.projection is None:
            model_trace.compute_log_prob()
            compute_score_parts(guide_trace)
            return
        self._not_analytic, self.joint = compute_log_prob(
            model_trace, guide_trace, self.projection, list(self.handler.drawn_by)
        )
        note_uses(model_trace, guide_trace, self.projection)

    def _is_single_draw(self, name: str, site: Any, reason: str) -> bool:
        if self.topk is None or site["infer"].get("rao_blackwell") is False:
            return False
        is_told = reason not in ("", "one value", SUPPLIED)
        return name in self.topk.plain or (is_told and is_single_draw(site))

    def summarize(self, guide_trace: Trace, otherwise: str, baselines: Baselines) -> Summary:
        """
        :param otherwise: what is said of sites that are left to Pyro.
        """
        rows: List[Row] = []
        path_sites = set(self.path_sites)
        for name in guide_trace.stochastic_nodes:
            site: Any = guide_trace.nodes[name]
            strategy = self.handler.drawn_by.get(name)
            treatment: Any = otherwise
            reason = self.handler.reasons.get(name, "")
            if strategy is None and self._is_single_draw(name, site, reason):
                treatment = "single draw, " + _describe_baseline(site, baselines)
            elif strategy is None:
                view = None if self.projection is None else self.projection.find(site["value"])
                if view is not None:
                    treatment, reason = f"as {view.site.name}", "shows its value"
            elif strategy is self.topk:
                treatment = "several draws"
                if any(name == e.name and e.has_table for e in self.topk.enumerated):
                    infer = site["infer"]
                    treatment = _Slots(infer.get("_topk"), infer["_enumerate_dim"])
            elif strategy is self.projection and name not in path_sites:
                ours = self.projection.sites[name]
                _, treatment, reason = describe(
                    ours, name not in self._not_analytic, self.projection.local
                )
                if self.projection.has_path and name not in self.joint:
                    of = "drawn row by row" if ours.draw.is_diagonal else "correlated noise"
                    reason += f"; no path gradient: {of}"
            else:
                treatment = None  # its scale is not known yet
                # At each step of a pause: without a look at what a subclass changes.
                if self._is_paused and isinstance(strip_independent(site["fn"], also_changed=True), GAUSSIANS):
                    reason += "; linear uses are not looked for, as recent steps had none"
            if self.topk is not None and has_own_baseline(site):
                reason = f"{reason}, infer={{'baseline': ...}}"
            rows.append(Row(name, treatment, reason))
        return Summary(rows, self.scales)


def _describe_baseline(site: Any, baselines: Baselines) -> str:
    if has_own_baseline(site):
        return "its own baseline"
    if baselines.over_particles(site):
        return f"baseline over {baselines.num_particles - 1} other particles"
    if baselines.kind is None or not is_single_draw(site):
        return "no baseline"
    return "no baseline: num_particles > 1 or infer={'baseline': ...} gives one"


class _Slots(NamedTuple):
    slots: Optional[Slots]
    dim: int

    def __str__(self) -> str:
        if self.slots is None:
            return "exact"
        top, sampled = (x.sum(self.dim).double() for x in self.slots[2:4])
        mass = (self.slots.log_weight.exp() * self.slots.is_sampled).sum(self.dim)
        return (
            f"top-k, k = {top.mean().item():.3g}, n = {sampled.mean().item():.3g}, "
            f"complement {mass.mean().item():.3g}"
        )
