# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which losses are worth a trial on a model and guide: :func:`choose_losses`."""

import math
import warnings
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.ops.provenance import get_provenance
from pyro.util import set_rng_seed

from pyro_rb.diagnostics.run.losses import ENUMERATED, REFERENCE, make_loss
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.parameters import Arguments
from pyro_rb.diagnostics.run.problem import Problem, prepared
from pyro_rb.diagnostics.run.sites import (
    enclosing_subsamples,
    latent_sites,
    read_sites,
)
from pyro_rb.diagnostics.run.size_limit import SizeLimit
from pyro_rb.infer import DReG_ELBO
from pyro_rb.infer.util import sample_sites

#: Enumeration is tried up to this many numbers in one tensor.
MAX_ELEMENTS = 2**22
MEAN_FIELD, GRAPH = "TraceMeanField_ELBO", "TraceGraph_ELBO"
STL, ADAPTIVE = "STLTrace_ELBO", "STLTrace_ELBO:adaptive"
TOP_K = "RaoBlackwellTopK_ELBO:budget=4"
R2G2, LOCAL = "R2G2_ELBO", "R2G2_ELBO:local"


class Choice(NamedTuple):
    """
    :param str reference: The loss that the others are compared to.
    :param list losses: Names of the losses to try, the simpler ones first.
    :param dict left_out: Why the other candidates are not tried, by name.
    """

    reference: str
    losses: List[str]
    left_out: Dict[str, str]


def choose_losses(
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    reference: Optional[str] = None,
) -> Choice:
    """
    Chooses losses by what the traces of model and guide show and by one evaluation of each
    candidate, from which the world is left as it was found.

    :param callable model: A Pyro model.
    :param callable guide: A Pyro guide.
    :param args: Positional arguments of model and guide.
    :param dict kwargs: Keyword arguments of model and guide.
    :param str reference: The loss that they will be compared to. With an
        importance-weighted bound, such as ``"RenyiELBO:alpha=0,num_particles=8"``, the
        candidates are those with the same objective. Default:
        :class:`~pyro.infer.traceenum_elbo.TraceEnum_ELBO` if the model enumerates a site,
        else :class:`~pyro.infer.trace_elbo.Trace_ELBO`.
    :rtype: Choice

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.)), 1.))
    >>> choice = choose_losses(model, guide)
    >>> choice.losses
    ['TraceMeanField_ELBO', 'STLTrace_ELBO', 'STLTrace_ELBO:adaptive']
    >>> choice.left_out["RaoBlackwellTopK_ELBO:budget=4"]
    'the guide has no discrete site'
    """
    with prepared(model, guide, args, kwargs, must_match=False) as problem:
        return Chooser(problem).choose(reference)


class Chooser:
    """Chooses for a prepared problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._traces = problem.traces
        self.sites = read_sites(problem.traces)
        self._tried: List[str] = []
        self._left_out: Dict[str, str] = {}
        self._obstacle: Optional[Tuple[Optional[str]]] = None

    def reference(self) -> str:
        """The loss that others are compared to by default."""
        return "TraceEnum_ELBO" if self.sites.summed else REFERENCE

    def choose(self, reference: Optional[str] = None) -> Choice:
        reference = reference or self.reference()
        loss = make_loss(reference)
        if isinstance(loss, RenyiELBO) and loss.alpha == 0:
            self._choose_importance_weighted(reference, loss)
        elif not latent_sites(self._traces[0]):
            names = [MEAN_FIELD, GRAPH, ENUMERATED, STL, R2G2, TOP_K]
            self._left_out = dict.fromkeys(names, "the guide has no latent site")
        elif not has_elbo(reference):
            reason = f"another objective than {reference}"
            self._left_out = dict.fromkeys([MEAN_FIELD, GRAPH, ENUMERATED, STL, R2G2, TOP_K], reason)
        else:
            if self.sites.summed:
                reason = f"it does not sum out the model's {_listed(self.sites.summed)}"
                for name in (MEAN_FIELD, GRAPH, STL, R2G2):
                    self._left_out[name] = reason
            else:
                self._choose_mean_field()
                self._choose_graph()
            self._choose_enumerated()
            if not self.sites.summed:
                self._choose_stl()
                self._choose_r2g2()
            self._choose_top_k()
        self._left_out.pop(reference, None)
        return Choice(reference, [n for n in self._tried if n != reference], self._left_out)

    def is_exact(self) -> bool:
        """Whether enumeration leaves nothing to chance, apart from subsampling."""
        sites, latent = self.sites, latent_sites(self._traces[0])
        discrete_only = {name for name, _ in latent} == set(sites.countable)
        return bool(latent) and discrete_only and not sites.summed and self._too_many() is None

    def _choose_mean_field(self) -> None:
        if self.sites.scored:
            verb = "is" if len(self.sites.scored) == 1 else "are"
            self._left_out[MEAN_FIELD] = f"{_listed(self.sites.scored)} {verb} not reparameterised"
        elif self.sites.jacobians:
            self._left_out[MEAN_FIELD] = (
                "biased on this guide: Pyro's KL divergence of a Delta leaves out its "
                f"log_density, here the Jacobian of {_listed(self.sites.jacobians)}"
            )
        else:
            self._try(MEAN_FIELD, unless="mean field restriction")

    def _choose_graph(self) -> None:
        if not self.sites.scored:
            self._left_out[GRAPH] = "all sites of the guide are reparameterised"
        elif self._try(GRAPH) is not None:
            one = self._problem.sampler(make_loss(GRAPH))
            with self._problem.preserved(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hidden = without_dependents(*one.call, **one.kwargs)
            if hidden:
                self._tried.remove(GRAPH)
                self._left_out[GRAPH] = (
                    f"it sees nothing that depends on {_listed(hidden)}, and is biased where that "
                    "is so by control flow such as if, range() or .item()"
                )

    def _choose_enumerated(self) -> None:
        sites = self.sites
        name = "TraceEnum_ELBO" if sites.annotated == sites.countable else ENUMERATED
        reason = self._too_many() if sites.countable else None
        if not sites.discrete:
            self._left_out[ENUMERATED] = "the guide has no discrete site"
        elif not sites.countable:
            self._left_out[ENUMERATED] = f"{_listed(sites.discrete)} cannot be enumerated"
        elif reason is not None:
            self._left_out[name] = reason
        else:
            self._try(name)

    def _choose_stl(self) -> None:
        loss = self._try(STL)
        if loss is not None and not is_treated(loss, "path gradient"):
            self._tried.remove(STL)
            self._left_out[STL] = "the guide has no site whose score could be removed"
        elif loss is not None:
            self._try(ADAPTIVE)

    def _choose_r2g2(self) -> None:
        loss = self._try(R2G2)
        if loss is not None and not is_treated(loss, "projected", "local"):
            self._tried.remove(R2G2)
            reasons = dict.fromkeys(f"'{row.site}': {row.reason}" for row in loss.report())
            self._left_out[R2G2] = f"it projects no site; {_shortened(list(reasons))}"
        loss = self._try(LOCAL)
        if loss is not None:
            # Biased if rows are coupled, which no trace shows; so it is never taken unasked.
            self._tried.remove(LOCAL)
            if is_treated(loss, "local"):
                self._left_out[LOCAL] = "right only if no row has an effect on another; then name it in losses"

    def _choose_top_k(self) -> None:
        if not self.sites.discrete:
            self._left_out[TOP_K] = "the guide has no discrete site"
            return
        loss = self._try(TOP_K)
        if loss is not None and not is_treated(loss, "top-k"):
            self._tried.remove(TOP_K)
            self._left_out[TOP_K] = "there are too few values: all are summed"

    def _choose_importance_weighted(self, reference: str, loss: RenyiELBO) -> None:
        elbos = [MEAN_FIELD, GRAPH, ENUMERATED, STL, TOP_K]
        self._left_out = dict.fromkeys(elbos, "the ELBO, another objective")
        name = f"DReG_ELBO:num_particles={loss.num_particles}"
        plates = enclosing_subsamples(self._traces)
        if plates and not isinstance(loss, DReG_ELBO):
            self._left_out[name] = (
                f"another objective: where {_listed(plates)} subsamples, RenyiELBO multiplies the log weights, "
                f"not the bound; take {name},control_variate_scale=0.0 as reference, which does not"
            )
            return
        self._try(name)
        if name in self._tried:
            self._try(f"{name},control_variate_scale=adaptive")

    def _try(self, name: str, unless: str = "") -> Any:
        """
        Takes a loss if one evaluation of it succeeds, and gives no warning with the words
        ``unless``.

        :returns: The loss, or None.
        """
        loss = make_loss(name)
        error = self._evaluate(loss, unless)
        if error is not None:
            self._left_out[name] = error
            return None
        self._tried.append(name)
        return loss

    def _too_many(self) -> Optional[str]:
        """Why enumeration of the guide is not to be risked, if it is not."""
        if self._obstacle is None:
            self._obstacle = (self._find_obstacle(),)
        return self._obstacle[0]

    def _find_obstacle(self) -> Optional[str]:
        # Pyro sums one site out after another, so that what counts is the largest tensor on the way.
        largest = max(_size(site) for site in self._traces[1].nodes.values())
        limit = max(MAX_ELEMENTS, 16 * largest)
        error = self._evaluate(make_loss(ENUMERATED), limit=limit)
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
            set_rng_seed(0)
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


def without_dependents(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> List[str]:
    """
    Sites of the guide without a reparameterised draw, on which no other site depends as far as
    :class:`~pyro.infer.tracegraph_elbo.TraceGraph_ELBO` knows. It follows tensors. What a value
    decides by ``if``, ``while``, ``range()`` or ``.item()`` it takes for independent of it,
    leaves it out of the costs of that site, and its gradient is biased.

    **Example**

    >>> import torch, pyro
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     loc = 1.0 if z > 0 else -1.0
    ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(0.2))
    >>> without_dependents(model, guide)
    ['z']
    """
    traces = TraceGraph_ELBO()._get_traces(model, guide, args, kwargs)
    model_trace, guide_trace = next(iter(traces))
    seen: Set[str] = set()
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        for name, site in sample_sites(trace):
            seen |= get_provenance(site["log_prob"]) - {name}
    scored = [n for n, s in latent_sites(guide_trace) if not getattr(s["fn"], "has_rsample", False)]
    return [name for name in scored if name not in seen]


def has_elbo(name: str) -> bool:
    """Whether a loss has the ELBO for its objective."""
    loss = make_loss(name)
    elbos = (Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO)
    return isinstance(loss, elbos) and not isinstance(loss, TraceTailAdaptive_ELBO)


def _size(site: Any) -> int:
    value = site.get("value")
    return value.numel() if isinstance(value, torch.Tensor) else 1


def _listed(names: List[str]) -> str:
    return _shortened([repr(name) for name in names])


def _shortened(items: List[str]) -> str:
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
