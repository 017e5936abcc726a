# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import queue
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.infer.util import torch_backward, torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan

from pyro_rb.infer.outside_plates import OutsidePlates, Run
from pyro_rb.infer.particle_baseline import Draw, compute_scores
from pyro_rb.infer.report import Report
from pyro_rb.infer.topk_report import Treated, hint, summarize
from pyro_rb.infer.topk_surrogate import (
    Baselines,
    compute_elbo,
    compute_surrogate,
    drop_own_scores,
)
from pyro_rb.infer.util import get_packed_traces
from pyro_rb.poutine import TopKMessenger, TopKModelMessenger, TopKOptions

BASELINES = (None, "loo", "reinforce+")


class RaoBlackwellTopK_ELBO(TraceEnum_ELBO):
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
    sites of the guide enumerated: parallel enumeration must be possible. No annotation is
    needed. Treated is
    each latent guide site that is a Categorical, OneHotCategorical, Bernoulli, Binomial,
    any other distribution with ``enumerate_support``, or a Poisson, Geometric or
    NegativeBinomial. In a plate of size ``N`` the value of a treated site has the
    shape ``[k + num_samples, N]``, not ``[K, 1]``: index arrays by
    :func:`~pyro.ops.indexing.Vindex`.

    **Single draws.** A site has one draw where no table can be made, as for Bernoulli
    vectors by ``to_event``; where the table would have more than
    :data:`~pyro_rb.poutine.topk_table.MAX_TABLE` elements; where ``infer={"topk": 0}``
    asks for it; and where a cost depends on the site from outside of its plates, or on a
    sum over its values such as ``k.mean()``. The latter is found by following the values
    at the first step, when the structure changes, and now and then. Such a site then has
    the full cost, as in ``Trace_ELBO``. With ``num_particles > 1`` the baseline of single
    draws is the mean cost of the other particles, for each element of a plate. All
    sites that are reparameterised are treated as by ``TraceEnum_ELBO``; :meth:`report`
    tells what was done at each site, and why.

    **When it is worse.** With few values or a cheap model, enumerate. Where all values are
    about equally likely and ``baseline=None``, summing some of them is worse than drawing
    as many: take ``budget`` or a baseline. Sites that depend on one another are a
    cartesian product: ``(k + num_samples)`` to the power of the number of sites. Early in
    training the guide may be confident and wrong, and plain draws explore more.

    **Options of a site** in the guide: ``infer={"topk": k}``, or a dict of ``k``,
    ``num_samples``, ``budget``; ``{"topk": 0}`` asks for a single draw. Sites with
    ``infer={"enumerate": ...}`` keep the meaning that Pyro gives them, unless a cost depends
    on them from outside of their plates.
    ``infer={"baseline": {...}}`` works as in :class:`~pyro.infer.TraceGraph_ELBO`, in
    the place of ``baseline``, wherever something is drawn.

    Gradients are first order only: Hessians of the surrogate loss are wrong.

    :param args: The arguments of :class:`~pyro.infer.TraceEnum_ELBO`, in its order:
        ``num_particles``, ``max_plate_nesting``, and so on. There is no warning if no
        site is annotated, whatever ``strict_enumeration_warning`` says.
    :param int k: values to sum, ``>= 0``. Defaults to 1.
    :param int num_samples: draws among the others, ``>= 1``. Defaults to 1.
    :param int budget: evaluations, ``>= 1``, in the place of ``k`` and ``num_samples``:
        each element of a plate then has the ``k`` of Proposition 2, for which the
        variance is at most that of the mean of ``budget`` draws. Defaults to None.
    :param str baseline: what is subtracted from the cost at a draw: ``"loo"`` (the
        default), the mean over the other draws and the values that are summed;
        ``"reinforce+"``, the cost at one more draw, which takes one more evaluation;
        None, nothing. Single draws have the mean over other particles for the first two.
    :param int max_evaluations: the largest cartesian product of the sites that a site of
        the model depends on. Defaults to 65536.
    :param kwargs: The arguments of :class:`~pyro.infer.TraceEnum_ELBO` by name.
    :raises ValueError: naming the argument, for ``k``, ``num_samples``, ``budget``,
        ``baseline`` or ``max_evaluations`` out of range, and for ``budget`` together with
        ``k`` or ``num_samples``. At a step, naming the site, for invalid options of a
        site, for ``"topk"`` where there is no table, for too large a product, and for a
        cost that depends on a sum over vectorised particles.
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
        *args: Any,
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
        super().__init__(*args, **kwargs)
        self._outside = OutsidePlates()
        self._latest: Optional[List[Treated]] = None

    def _get_traces(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Trace, Trace]]:
        for _, run in self._get_runs(model, guide, args, kwargs):
            yield run.model_trace, run.guide_trace

    def _get_runs(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[int, Run]]:
        """The number of a particle, and its runs: one, but for sequential enumeration."""
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
            plain=self._outside.reasons,
        )
        model = TopKModelMessenger(handler)(model)
        traces: Any = queue.LifoQueue()
        guide = poutine.queue(
            handler(guide),
            traces,
            escape_fn=iter_discrete_escape,
            extend_fn=iter_discrete_extend,
        )

        def get_traces(*watches: Messenger) -> Tuple[Trace, Trace]:
            watched = [f(g) for f, g in zip(watches, (model, guide))] or [model, guide]
            with hint(handler):
                pair = get_packed_traces(
                    watched[0], watched[1], args, kwargs, self.max_plate_nesting
                )
            drop_own_scores(pair[1], self._baselines)
            self._latest = summarize(pair[1], handler, self._baselines)
            return pair

        for particle in range(1 if self.vectorize_particles else self.num_particles):
            for run in self._outside.get_runs(get_traces, traces):
                yield particle, run

    @property
    def _baselines(self) -> Baselines:
        return Baselines(self.baseline, self.num_particles)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss, minus the ELBO. It does not depend on
            ``baseline`` other than by the random numbers that ``"reinforce+"`` takes.
        """
        runs = self._get_runs(model, guide, args, kwargs)
        elbo = sum(torch_item(compute_elbo(run)) for _, run in runs)
        loss = -elbo / self.num_particles
        warn_if_nan(loss, "loss")
        return loss

    def _surrogates(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Any, Run, List[Tuple[int, Draw]]]]:
        """Surrogates of runs, and the draws whose scores wait for the other particles."""
        for particle, run in self._get_runs(model, guide, args, kwargs):
            if torch.is_grad_enabled():
                elbo, draws = compute_surrogate(run, self._baselines, self._outside.dependents)
            else:
                elbo, draws = compute_elbo(run), []
            yield elbo / self.num_particles, run, [(particle, draw) for draw in draws]

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss, minus the ELBO, a scalar tensor. Its first
            derivatives are estimates of those of the loss; higher ones are not.
        """
        elbo: Any = 0.0
        waiting = []
        for particle, _, draws in self._surrogates(model, guide, args, kwargs):
            elbo = elbo + particle
            waiting += draws
        loss = -(elbo + compute_scores(waiting) / self.num_particles)
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss, minus the ELBO. Estimates of its gradient are
            added to the ``.grad`` of the parameters.
        """
        loss: Any = 0.0
        kept: Any = 0.0
        waiting = []
        for elbo, run, draws in self._surrogates(model, guide, args, kwargs):
            loss -= torch_item(elbo)
            nodes: List[Any] = [*run.model_trace.nodes.values(), *run.guide_trace.nodes.values()]
            if not any(site["type"] == "param" for site in nodes):
                continue
            if draws:
                kept = kept + elbo
                waiting += draws
            else:
                # Sites that are enumerated in a loop share a graph.
                shares_graph = any("_enum_total" in site.get("infer", {}) for site in nodes)
                torch_backward(-elbo, retain_graph=shares_graph or self.retain_graph)
        kept = kept + compute_scores(waiting) / self.num_particles
        torch_backward(-kept, retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _trace_enum(self) -> TraceEnum_ELBO:
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            strict_enumeration_warning=False,
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
