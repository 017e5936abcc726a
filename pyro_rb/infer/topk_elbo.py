# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import queue
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.infer.util import torch_backward, torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan

from pyro_rb.infer.learned_state import LearnedStateMixin
from pyro_rb.infer.report import Report, SiteReport
from pyro_rb.infer.topk_surrogate import (
    compute_elbo,
    compute_surrogate,
    has_own_baseline,
)
from pyro_rb.ops.topk import Slots
from pyro_rb.poutine import TopKMessenger, TopKModelMessenger, TopKOptions

BASELINES = (None, "loo", "reinforce+")
_SHAPES = re.compile("shape|size|dim|broadcast|ind(ex|ices)|scalar|ambiguous|alloc", re.I)


class _Treated(NamedTuple):
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
def _hint(handler: TopKMessenger) -> Iterator[None]:
    """Names the sites that were enumerated in errors that they may have caused."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        names = [site.name for site in handler.enumerated]
        is_known = type(e) in (IndexError, RuntimeError, TypeError, ValueError)
        text = str(e).split("Trace Shapes:")[0]
        if not (is_known and names and _SHAPES.search(text)) or "{'topk'" in text:
            raise
        raise type(e)(
            f"{e}\nThe values of the guide sites {names} have one more dim on the left, "
            "for the values that are looked at. If the model or guide cannot do with "
            "it, index by pyro.ops.indexing.Vindex, avoid .item() and if, or set "
            "infer={'topk': 0} at the site."
        ) from e


def _summarize(guide_trace: Trace, handler: TopKMessenger) -> List[_Treated]:
    enumerated = {site.name for site in handler.enumerated}
    rows = []
    for name in guide_trace.stochastic_nodes:
        site: Any = guide_trace.nodes[name]
        infer = site["infer"]
        reason = handler.reasons.get(name, "")
        treatment = "as TraceEnum_ELBO"
        if name in enumerated:
            # A replay around the loss comes after the handler, and puts its own options.
            if infer.get("enumerate") is None:
                reason = "its value was supplied, not drawn"
            else:
                treatment = "top-k" if "_topk" in infer else "exact"
        if has_own_baseline(site):
            reason += ", infer={'baseline': ...}"
        slots, dim = infer.get("_topk"), infer.get("_enumerate_dim", 0)
        rows.append(_Treated(name, treatment, reason, slots, dim))
    return rows


class RaoBlackwellTopK_ELBO(LearnedStateMixin, TraceEnum_ELBO):
    r"""
    A :class:`~pyro.infer.TraceEnum_ELBO` that sums the most likely values of discrete
    guide sites, and samples the others [1]. The objective is that of ``TraceEnum_ELBO``
    and of ``Trace_ELBO``, and so is the mean of the gradient.

    At a site with probabilities :math:`q(z)`, let :math:`C` be the ``k`` most likely
    values, and :math:`v_1, \ldots, v_n` independent draws of :math:`q` restricted to the
    others, :math:`C'`. The expectation of a function of :math:`z` is estimated by

    .. math::

        \sum_{z \in C} q(z) f(z) + \frac{q(C')}{n} \sum_{j=1}^n f(v_j)

    without bias, and so is its gradient. With one draw the variance of the gradient is at
    most :math:`q(C')` times that of a plain draw (Proposition 1 of [1]). The
    model is evaluated at ``k + num_samples`` values at once, in an enumeration dim. Where
    that is no less than the number of values, the site is enumerated, and the gradient is
    that of ``TraceEnum_ELBO``.

    **Requirements.** A model and guide that ``TraceEnum_ELBO`` accepts with the discrete
    sites of the guide enumerated: parallel enumeration must be possible, and nothing
    outside of a plate may depend on a site inside, such as a site of the model that is
    enumerated outside of a plate that the guide's site is in (``{"topk": 0}`` there gives
    what Pyro does). No annotation is needed. Treated is
    each latent guide site that is a Categorical, OneHotCategorical, Bernoulli, Binomial,
    any other distribution with ``enumerate_support``, or a Poisson, Geometric or
    NegativeBinomial. All other sites are treated as by ``TraceEnum_ELBO``; :meth:`report`
    tells which and why. In a plate of size ``N`` the value of a treated site has the
    shape ``[k + num_samples, N]``, not ``[K, 1]``: index arrays by
    :func:`~pyro.ops.indexing.Vindex`.

    **When it is worse.** With few values or a cheap model, enumerate. Where all values are
    about equally likely and ``baseline=None``, summing some of them is worse than drawing
    as many: take ``budget`` or a baseline. Sites that depend on one another are a
    cartesian product: ``(k + num_samples)`` to the power of the number of sites. Early in
    training the guide may be confident and wrong, and plain draws explore more.

    **Options of a site** in the guide: ``infer={"topk": k}``, or a dict of ``k``,
    ``num_samples``, ``budget``; ``{"topk": 0}`` asks for a plain draw. Sites with
    ``infer={"enumerate": ...}`` keep the meaning that Pyro gives them.
    ``infer={"baseline": {...}}`` works as in :class:`~pyro.infer.TraceGraph_ELBO`, in
    the place of ``baseline``, wherever something is drawn.

    Gradients are first order only: Hessians of the surrogate loss are wrong.

    :param int k: values to sum, ``>= 0``. Defaults to 1.
    :param int num_samples: draws among the others, ``>= 1``. Defaults to 1.
    :param int budget: evaluations, ``>= 1``, in the place of ``k`` and ``num_samples``:
        each element of a plate then has the ``k`` of Proposition 2, for which the
        variance is at most that of the mean of ``budget`` draws. Defaults to None.
    :param str baseline: what is subtracted from the cost at a draw: ``"loo"`` (the
        default), the mean over the other draws and the values that are summed;
        ``"reinforce+"``, the cost at one more draw, which takes one more evaluation;
        None, nothing.
    :param int max_evaluations: the largest cartesian product of the sites that a site of
        the model depends on. Defaults to 65536.
    :param kwargs: The arguments of :class:`~pyro.infer.TraceEnum_ELBO`, for example
        ``num_particles``, ``vectorize_particles`` and ``max_plate_nesting``.
        ``strict_enumeration_warning`` is False unless given.
    :raises ValueError: naming the argument, for ``k``, ``num_samples``, ``budget``,
        ``baseline`` or ``max_evaluations`` out of range, and for ``budget`` together with
        ``k`` or ``num_samples``. At a step, naming the site, for invalid options of a
        site, for ``"topk"`` where it cannot be followed, and for too large a product.
    :raises NotImplementedError: at a step, if the guide is a ``GuideMessenger``.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     with pyro.plate("data", len(data)):
        ...         z = pyro.sample("z", dist.Categorical(torch.ones(50) / 50))
        ...         pyro.sample("x", dist.Normal(z.float(), 1.0), obs=data)
        >>> def guide(data):
        ...     with pyro.plate("data", len(data)):
        ...         logits = pyro.param("logits", torch.zeros(len(data), 50))
        ...         pyro.sample("z", dist.Categorical(logits=logits))
        >>> elbo = RaoBlackwellTopK_ELBO(k=3)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([7.3, 41.8]))
        >>> print(elbo.report())
        site    treatment                             reason
        ------  ------------------------------------  --------------
        z       top-k, k = 3, n = 1, complement 0.94  4 of 50 values

    **References**

    [1] Runjing Liu, Jeffrey Regier, Nilesh Tripuraneni, Michael I. Jordan, Jon McAuliffe
    (2019), "Rao-Blackwellized Stochastic Gradients for Discrete Distributions".
    https://arxiv.org/abs/1810.04777
    """

    def __init__(
        self,
        k: Optional[int] = None,
        num_samples: Optional[int] = None,
        budget: Optional[int] = None,
        baseline: Optional[str] = "loo",
        max_evaluations: int = 2**16,
        **kwargs: Any,
    ) -> None:
        self.options = TopKOptions.make(k, num_samples, budget)
        if baseline not in BASELINES:
            raise ValueError(
                f"Invalid baseline: {baseline!r}. Expected one of {BASELINES}."
            )
        if not isinstance(max_evaluations, int) or max_evaluations < 1:
            raise ValueError(
                f"Invalid max_evaluations: {max_evaluations!r}. Expected an int >= 1."
            )
        self.baseline = baseline
        self.max_evaluations = max_evaluations
        kwargs.setdefault("strict_enumeration_warning", False)
        super().__init__(**kwargs)
        self._latest: Optional[List[_Treated]] = None

    def _get_traces(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Trace, Trace]]:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise NotImplementedError(
                "RaoBlackwellTopK_ELBO does not support GuideMessenger"
            )
        if self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorize_particles:
            # Before the handlers, so that each particle has draws of its own.
            guide = self._vectorized_num_particles(guide)
            model = self._vectorized_num_particles(model)
        # The allocator of dims is shared: the model takes dims left of the guide's.
        handler = TopKMessenger(
            self.options,
            first_available_dim=-1 - self.max_plate_nesting,
            probe=self.baseline == "reinforce+",
            max_evaluations=self.max_evaluations,
        )
        model = TopKModelMessenger(handler)(model)
        traces: Any = queue.LifoQueue()
        guide = poutine.queue(
            handler(guide),
            traces,
            escape_fn=iter_discrete_escape,
            extend_fn=iter_discrete_extend,
        )
        for _ in range(1 if self.vectorize_particles else self.num_particles):
            traces.put(Trace())
            while not traces.empty():
                with _hint(handler):
                    pair = self._get_trace(model, guide, args, kwargs)
                self._latest = _summarize(pair[1], handler)
                yield pair

    def _surrogates(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Any, Trace, Trace]]:
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if torch.is_grad_enabled():
                elbo = compute_surrogate(model_trace, guide_trace, self.baseline)
            else:
                elbo = compute_elbo(model_trace, guide_trace)
            yield elbo / self.num_particles, model_trace, guide_trace

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss, minus the ELBO. It does not depend on
            ``baseline`` other than by the random numbers that ``"reinforce+"`` takes.
        """
        traces = self._get_traces(model, guide, args, kwargs)
        elbo = sum(torch_item(compute_elbo(*pair)) for pair in traces)
        loss = -elbo / self.num_particles
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss, minus the ELBO, a scalar tensor. Its first
            derivatives are estimates of those of the loss; higher ones are not.
        """
        elbo: Any = 0.0
        for particle, _, _ in self._surrogates(model, guide, args, kwargs):
            elbo = elbo + particle
        loss = -elbo
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss, minus the ELBO. Estimates of its gradient are
            added to the ``.grad`` of the parameters.
        """
        loss: Any = 0.0
        for elbo, model_trace, guide_trace in self._surrogates(model, guide, args, kwargs):
            loss -= torch_item(elbo)
            nodes: List[Any] = [*model_trace.nodes.values(), *guide_trace.nodes.values()]
            if any(site["type"] == "param" for site in nodes):
                # Sites that are enumerated in a loop share a graph.
                shares_graph = any("_enum_total" in site.get("infer", {}) for site in nodes)
                torch_backward(-elbo, retain_graph=shares_graph or self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _trace_enum(self) -> TraceEnum_ELBO:
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            strict_enumeration_warning=self.strict_enumeration_warning,
        )

    def compute_marginals(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``TraceEnum_ELBO.compute_marginals``, with plain draws from the guide."""
        return self._trace_enum().compute_marginals(model, guide, *args, **kwargs)

    def sample_posterior(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``TraceEnum_ELBO.sample_posterior``, with plain draws from the guide."""
        return self._trace_enum().sample_posterior(model, guide, *args, **kwargs)

    def report(self) -> Report:
        """
        :return: a row for each latent site of the guide, from the last trace that was
            run: its name, the treatment, and the reason for it. Prints as a table.
        :raises RuntimeError: before the first step or loss.
        """
        if self._latest is None:
            raise RuntimeError(
                "report() tells what was done at the last step, and there was none. "
                "Expected a step, or a loss, before it: call SVI.step() first."
            )
        return Report(row.report() for row in self._latest)
