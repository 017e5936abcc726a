# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a guide and a model, with projected or local uses of Gaussian sites."""

from typing import Any, Dict, NamedTuple, Optional, Set, Tuple

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace

from pyro_rb.infer.gaussian_kl import compute_log_prob
from pyro_rb.infer.report import Report, SiteReport
from pyro_rb.infer.util import check_shapes, get_traces, sample_sites
from pyro_rb.poutine import R2G2Messenger
from pyro_rb.poutine.gaussian_site import GaussianSite
from pyro_rb.poutine.local_draws import LocalDraws


class Run(NamedTuple):
    """
    :param tuple traces: of model and guide, with log densities.
    :param R2G2Messenger handler: what it ran under.
    :param set left: names of guide sites of which a log prior has no formula.
    """

    traces: Tuple[Trace, Trace]
    handler: R2G2Messenger
    left: Set[str]

    def report(self, local: Optional[LocalDraws]) -> Report:
        """A row for each latent site of the guide."""
        report = Report()
        guide_trace = self.traces[1]
        for name in guide_trace.stochastic_nodes:
            view = self.handler.find(guide_trace.nodes[name]["value"])
            if name in self.handler.sites:
                row = _describe(self.handler.sites[name], name not in self.left, local)
            elif view is not None:
                row = SiteReport(name, f"as {view.site.name}", "shows its value")
            else:
                row = SiteReport(name, "plain", self.handler.reasons.get(name, ""))
            report.append(row)
        return report


def run_once(
    handler: R2G2Messenger,
    model: Any,
    guide: Any,
    args: Tuple,
    kwargs: Dict[str, Any],
    max_plate_nesting: Any,
) -> Optional[Run]:
    """Runs guide and model under a handler; None if elements of its sites are ``violated``."""
    try:
        model_trace, guide_trace = get_traces(
            handler.model(model), handler.guide(guide), args, kwargs, max_plate_nesting
        )
        left = compute_log_prob(model_trace, guide_trace, handler)
        check_shapes(model_trace, guide_trace, max_plate_nesting)
        _note_uses(model_trace, guide_trace, handler)
    except Exception:
        # A derivative of what was projected may be the cause.
        if not handler.violated:
            raise
    return None if handler.violated else Run((model_trace, guide_trace), handler, left)


def _note_uses(
    model_trace: Trace, guide_trace: Trace, handler: R2G2Messenger
) -> None:
    """Notes what can be seen of a run after it is over."""
    terms: Dict[Tuple[str, str], Any] = {}
    for name, site in sample_sites(model_trace):
        terms["model", name] = (site["value"], [site["log_prob_sum"]])
    has_score_function = False
    for name, site in sample_sites(guide_trace):
        parts = site["score_parts"]
        terms["guide", name] = (site["value"], [parts.score_function, parts.entropy_term])
        if not is_identically_zero(parts.score_function):
            has_score_function = True
    handler.note_hidden_uses(terms)
    if has_score_function:
        handler.note_score_functions()


def _describe(
    site: GaussianSite, has_analytic_kl: bool, local: Optional[LocalDraws]
) -> SiteReport:
    treatment = "plain"
    if site.projected is not None:
        treatment = " and ".join(sorted(set(site.treatments.values())))
        if isinstance(site.projected, torch.Tensor):
            share = site.projected.double().mean().item()
            if share < 1.0:
                treatment += f" ({100 * share:.0f} %)"
    reasons = list(site.treatments) + site.reasons
    if not reasons:
        reasons = ["not used"]
    if local is not None and local.record is not None and "local" in treatment:
        reasons.append("rows are independent")
    if local is not None and local.why_shared(site.key):
        reasons.append(f"not local: {local.why_shared(site.key)}")
    if not has_analytic_kl:
        reasons.append("log prior not analytic")
    return SiteReport(site.name, treatment, "; ".join(reasons))
