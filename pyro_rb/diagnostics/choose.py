# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which losses are worth a trial on a model and guide: :func:`choose_losses`."""

import warnings
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)

from pyro_rb.diagnostics.control_flow import without_dependents
from pyro_rb.diagnostics.gradients import GradientSampler
from pyro_rb.diagnostics.losses import (
    ENUMERATED,
    REFERENCE,
    make_loss,
)
from pyro_rb.diagnostics.parameters import Arguments, parameters_of, run_traces
from pyro_rb.diagnostics.sites import (
    enclosing_subsamples,
    latent_sites,
    read_sites,
    settle_plates,
)
from pyro_rb.diagnostics.state import preserve_state
from pyro_rb.diagnostics.trial import evaluate, is_treated
from pyro_rb.infer import DReG_ELBO, RaoBlackwellTopK_ELBO

#: Enumeration is tried up to this many joint values, and this many numbers in one tensor.
MAX_EVALUATIONS, MAX_ELEMENTS = 2**16, 2**24
MEAN_FIELD, GRAPH = "TraceMeanField_ELBO", "TraceGraph_ELBO"
STL, FIXED = "STLTrace_ELBO", "STLTrace_ELBO:1.0"
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
    ['TraceMeanField_ELBO', 'STLTrace_ELBO', 'STLTrace_ELBO:1.0']
    >>> choice.left_out["RaoBlackwellTopK_ELBO:budget=4"]
    'the guide has no discrete site'
    """
    kwargs = dict(kwargs or {})
    with preserve_state(model, guide):
        traces = run_traces(model, guide, args, kwargs)
        parameters, any_site = parameters_of(traces, model, guide)

        def sampler(loss: Any) -> GradientSampler:
            settle_plates(loss, traces)
            return GradientSampler(loss, model, guide, args, kwargs, parameters, any_site)

        return Chooser(model, guide, traces, sampler).choose(reference)


class Chooser:
    """
    Chooses within :func:`~pyro_rb.diagnostics.state.preserve_state`.

    :param traces: Of guide and model.
    :param callable sampler: Makes a GradientSampler from a loss.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        traces: Tuple[poutine.Trace, poutine.Trace],
        sampler: Callable[[Any], GradientSampler],
    ) -> None:
        self._callables = (model, guide)
        self._sampler = sampler
        self._traces = traces
        self.sites = read_sites(traces)
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
            one = self._sampler(make_loss(GRAPH))
            with preserve_state(*self._callables), warnings.catch_warnings():
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
            self._try(FIXED)

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
        error = evaluate(loss, self._callables, self._sampler, unless)
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
        # With room for every value, the top-k handler counts before it evaluates.
        largest = max(_size(site) for site in self._traces[1].nodes.values())
        limit = min(MAX_EVALUATIONS, max(16, MAX_ELEMENTS // largest))
        loss = RaoBlackwellTopK_ELBO(k=2**20, max_evaluations=limit)
        error = evaluate(loss, self._callables, self._sampler)
        if error is not None:
            return f"too many joint values, or not to be enumerated in parallel: {error}"
        rows = [row for row in loss.report() if row.site in self.sites.countable]
        plain = [row for row in rows if row.site not in self.sites.annotated]
        missed = [f"'{row.site}': {row.reason}" for row in plain if row.treatment != "exact"]
        return "; ".join(missed) or None


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
