# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What :class:`~pyro_rb.infer.topk_elbo.RaoBlackwellTopK_ELBO` says of a run."""

import re
from contextlib import contextmanager
from typing import Any, Iterator, List, NamedTuple, Optional

from pyro.poutine import Trace

from pyro_rb.infer.report import SiteReport
from pyro_rb.infer.topk_surrogate import Baselines, has_own_baseline, is_single_draw
from pyro_rb.ops.topk import Slots
from pyro_rb.poutine import TopKMessenger

_SHAPES = re.compile("shape|size|dim|broadcast|ind(ex|ices)|scalar|ambiguous|alloc", re.I)
#: A value that a table does not have. Fewer dims would not help.
_VALUES = re.compile("out of bounds|out of range in self")


class Treated(NamedTuple):
    """What was done at a latent site, and why."""

    site: str
    treatment: str
    reason: str
    slots: Optional[Slots] = None
    dim: int = 0

    def report(self) -> SiteReport:
        treatment = self.treatment
        if self.slots is not None:
            top, sampled = (x.sum(self.dim).double() for x in self.slots[2:])
            mass = (self.slots.log_weight.exp() * self.slots.is_sampled).sum(self.dim)
            treatment = (
                f"{treatment}, k = {top.mean().item():.3g}, n = {sampled.mean().item():.3g}, "
                f"complement {mass.mean().item():.3g}"
            )
        return SiteReport(self.site, treatment, self.reason)


@contextmanager
def hint(handler: TopKMessenger) -> Iterator[None]:
    """Names the sites that were enumerated in errors that they may have caused."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        names = [site.name for site in handler.enumerated]
        is_known = type(e) in (IndexError, RuntimeError, TypeError, ValueError)
        text = str(e).split("Trace Shapes:")[0]
        is_by_shape = _SHAPES.search(text) and not _VALUES.search(text)
        if not (is_known and names and is_by_shape) or "{'topk'" in text:
            raise
        plates = sorted({plate for site in handler.enumerated for plate in site.plates})
        raise type(e)(
            f"{e}\nThe values of the guide sites {names} have one more dim on the left, "
            "for the values that are looked at. If the model or guide cannot do with "
            f"it, as where a site inside of plates {plates} is used outside, set "
            "infer={'topk': 0} at the site, which then has a single draw and the full cost. "
            "Else index by pyro.ops.indexing.Vindex, and avoid .item() and if."
        ) from e


def summarize(
    guide_trace: Trace, handler: TopKMessenger, baselines: Baselines
) -> List[Treated]:
    enumerated = {site.name for site in handler.enumerated}
    rows = []
    for name in guide_trace.stochastic_nodes:
        site: Any = guide_trace.nodes[name]
        infer, reason = site["infer"], handler.reasons.get(name, "")
        treatment = "as TraceEnum_ELBO"
        if name in enumerated:
            # A replay around the loss comes after the handler, and puts its own options.
            if infer.get("enumerate") is None:
                reason = "its value was supplied, not drawn"
            else:
                treatment = "top-k" if "_topk" in infer else "exact"
        elif name in handler.plain or (reason not in ("", "one value") and is_single_draw(site)):
            treatment = "single draw, " + _baseline(site, baselines)
        if has_own_baseline(site):
            reason += ", infer={'baseline': ...}"
        slots, dim = infer.get("_topk"), infer.get("_enumerate_dim", 0)
        rows.append(Treated(name, treatment, reason, slots, dim))
    return rows


def _baseline(site: Any, baselines: Baselines) -> str:
    if has_own_baseline(site):
        return "its own baseline"
    if baselines.over_particles(site):
        return f"baseline over {baselines.num_particles - 1} other particles"
    if baselines.kind is None or not is_single_draw(site):
        return "no baseline"
    return "no baseline: num_particles > 1 or infer={'baseline': ...} gives one"
