# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings
from contextlib import nullcontext
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.poutine import Trace
from pyro.util import warn_if_nan

from pyro_rb.infer.hint import hint_at_shapes
from pyro_rb.infer.importance_bound import compute_bound
from pyro_rb.infer.importance_checks import check_densities, check_reparameterized
from pyro_rb.infer.importance_surrogate import Surrogate
from pyro_rb.infer.path_mixin import Groups, PathGradientMixin
from pyro_rb.infer.report import Row, Summary
from pyro_rb.infer.traces import check_traces, get_traces, prune
from pyro_rb.infer.util import under
from pyro_rb.poutine import SharedSubsampleMessenger, TapMessenger
from pyro_rb.poutine.densities import compute_score_parts


def _find_hint(guide: Any, args: Tuple, kwargs: Dict) -> str:
    """What to say of an error in a vectorized run, unless there is something clearer."""
    try:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        guide_trace.compute_score_parts()
    except Exception:  # the very error, perhaps
        pass
    else:
        check_reparameterized(guide_trace)
    return (
        "The values of the guide sites have one more dim on the left, for the particles. If "
        "the model or guide cannot do with it, set vectorize_particles=False."
    )


class DReG_ELBO(PathGradientMixin, RenyiELBO):
    r"""
    The importance-weighted bound [1], that is :class:`~pyro.infer.RenyiELBO` with
    ``alpha=0``, with the doubly reparameterized gradient [2]. The signal-to-noise ratio of this
    gradient grows with the number of particles, while that of ``RenyiELBO`` falls [3].

    With :math:`K` particles :math:`z_k = z(\epsilon_k, \phi)`, weights
    :math:`w_k = p(x, z_k) / q(z_k; \phi)`, and :math:`\tilde w_k = w_k / \sum_j w_j`, the
    loss is :math:`-\log \frac1K \sum_k w_k`. Parameters of the guide have the gradient
    (equation 6 of [2])

    .. math::

        - \sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k}
        \frac{d z_k}{d \phi}.

    Where a scale :math:`\beta` multiplies the log density of a draw in :math:`\log w_k`, the factor
    :math:`\tilde w_k (1 - \beta (1 - \tilde w_k))` replaces :math:`\tilde w_k^2`. Parameters of
    the model have the gradient of ``RenyiELBO``. With :math:`K = 1` all this is
    :class:`~pyro_rb.infer.stl_elbo.STLTrace_ELBO` with ``control_variate_scale=1.0``.

    The arguments are those of ``RenyiELBO``, without ``alpha``. Set
    ``vectorize_particles=True`` where model and guide allow for one more dim on the left.
    All particles are then drawn in one run, which is much faster.

    **Items of plates.** Plates that hold *all* sites of model and guide, such as the one
    over the data of a variational autoencoder, have weights for each item. The loss is then a
    sum of bounds, one for each item. Where one site is outside, in the model or in the guide,
    there is one weight for the whole plate. ``RenyiELBO`` differs in three ways. It
    looks at the model only, and counts a guide site outside the plate once for each item. It
    has one weight for all items of a sequential plate. Where a plate that holds all
    sites subsamples, it multiplies the log weights by size / subsample size, not the bound, and
    its looped particles draw different subsamples. Here the loss is an unbiased
    estimate of the bound of all items. Factors of :func:`pyro.poutine.scale`, and the
    subsampling of plates that do not hold all sites, multiply log densities within the
    weights, as in ``RenyiELBO``. With ``num_particles > 1`` the latter makes another
    objective, which need not be a bound.

    **Requirements.** A guide without score function terms: a site that is not
    reparameterized must not depend on a parameter. A draw of
    :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide`, whose density is not known, is not allowed either.
    Both raise ``NotImplementedError``. Sites
    to which the method does not apply (see ``STLTrace_ELBO``) are treated as ``RenyiELBO``
    treats them; :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells which. Vectorized
    particles need static structure. Checkpoints in the model must not be reentrant.

    **When it is worse.** With a guide much narrower than the posterior, the gradient has far MORE
    variance than that of ``RenyiELBO``, hundreds of times more at the default ``init_scale=0.1`` of
    :class:`~pyro.infer.autoguide.AutoNormal`. It also has more where scales are far above 1. Use
    ``control_variate_scale="adaptive"``, or a wider guide. Looped particles keep all their
    graphs at the same time, as in ``RenyiELBO``. :meth:`differentiable_loss`
    goes through the model's graph twice; :meth:`loss_and_grads` only if model and guide
    share a parameter. Gradients are right to first order only.

    :param int num_particles: The number :math:`K` of particles. Defaults to 2.
    :param int max_plate_nesting: As in ``RenyiELBO``. Defaults to infinity.
    :param int max_iarange_nesting: As in ``RenyiELBO``, deprecated.
    :param bool vectorize_particles: Whether to draw all particles in one run of model and
        guide, in a plate. Defaults to False.
    :param bool strict_enumeration_warning: As in ``RenyiELBO``. Defaults to True.
    :param control_variate_scale: The share :math:`c` of the double reparameterization.
        1.0, the default, is the gradient of [2], 0.0 that of ``RenyiELBO``; any finite float is
        unbiased. ``"adaptive"`` learns one scale between 0 and 10 for each set of sites that
        share parameters, from earlier steps as in ``STLTrace_ELBO``.
    :param bool retain_graph: As in :class:`~pyro.infer.Trace_ELBO`.
    :raises ValueError: if ``num_particles`` is not a positive int, or ``control_variate_scale``
        is neither a finite float nor ``"adaptive"``.
    :raises NotImplementedError: at a step, naming the site, if the guide needs a score
        function, or does not know the density of a draw.
    :raises RuntimeError: at a step, if the value of a guide site was changed in place.
    :warns UserWarning: at a step, if all particles of at least one item have weight zero.
        The loss is then infinite, and that item adds no gradient.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     with pyro.plate("data", len(data)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=data)
        >>> elbo = DReG_ELBO(num_particles=8, vectorize_particles=True)
        >>> guide = AutoNormal(model, init_scale=1.0)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([0.3, 0.8]))
        >>> print(elbo.report())
        site             treatment             reason
        ---------------  --------------------  -----------------------------
        z_unconstrained  path gradient, c = 1  reparameterized draw
        z                as RenyiELBO          a Delta has no score identity

    **References**

    [1] Yuri Burda, Roger Grosse, Ruslan Salakhutdinov (2016), "Importance Weighted
    Autoencoders". https://arxiv.org/abs/1509.00519

    [2] George Tucker, Dieterich Lawson, Shixiang Gu, Chris J. Maddison (2019), "Doubly
    Reparameterized Gradient Estimators for Monte Carlo Objectives".
    https://arxiv.org/abs/1810.04152

    [3] Tom Rainforth, Adam R. Kosiorek, Tuan Anh Le, Chris J. Maddison, Maximilian Igl,
    Frank Wood, Yee Whye Teh (2018), "Tighter Variational Bounds are Not Necessarily
    Better". https://arxiv.org/abs/1802.04537
    """

    otherwise = "as RenyiELBO"

    def __init__(
        self,
        num_particles: int = 2,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: Optional[int] = None,  # DEPRECATED
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        *,
        control_variate_scale: Union[float, str] = 1.0,
        retain_graph: Optional[bool] = None,
    ) -> None:
        is_int = isinstance(num_particles, int) and not isinstance(num_particles, bool)
        if not is_int or num_particles < 1:
            raise ValueError(
                f"Invalid num_particles: {num_particles!r}. Expected a positive int."
            )
        self._init_scales(control_variate_scale)
        super().__init__(
            0,
            num_particles,
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
        )
        self.retain_graph = retain_graph

    def _get_trace(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        tap = TapMessenger(self._obstacle())
        nesting = self.max_plate_nesting
        traces = get_traces(model, under(tap, guide), args, kwargs)
        model_trace, guide_trace = prune(*traces, nesting)
        tap.settle(guide_trace)
        model_trace.compute_log_prob()
        compute_score_parts(guide_trace)
        check_traces(model_trace, guide_trace, nesting, enumerates=False)
        tap.path.raise_if_edited()
        tap.path.attach_flows()
        guide_trace.tap = tap  # type: ignore[attr-defined]
        return model_trace, guide_trace

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of minus the importance-weighted bound. Builds no graph.
        """
        with torch.no_grad():
            return self._evaluate(model, guide, args, kwargs)[0]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        Adds the gradient to the ``.grad`` of the parameters if model or guide has a
        :func:`pyro.param` site, as ``RenyiELBO`` does.

        :return: an estimate of minus the importance-weighted bound.
        """
        loss, surrogate, trainable = self._evaluate(model, guide, args, kwargs)
        if trainable:
            shares, groups = self._find_shares(surrogate)
            if groups or not surrogate.backward(shares, self.retain_graph):
                total = self._compute_total(surrogate, shares, groups)
                if getattr(total, "requires_grad", False):
                    total.backward(retain_graph=self.retain_graph)
        return loss

    def differentiable_loss(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Union[float, torch.Tensor]:
        """
        :return: an estimate of minus the importance-weighted bound, a scalar tensor whose
            gradient is the one of :meth:`loss_and_grads`.
        """
        loss, surrogate, _ = self._evaluate(model, guide, args, kwargs)
        total = self._compute_total(surrogate, *self._find_shares(surrogate))
        return loss + (total - total.detach()) if isinstance(total, torch.Tensor) else loss

    def _evaluate(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[float, Surrogate, bool]:
        """The loss, a surrogate for its gradient, and whether there is a param site."""
        self._note_call(model, guide, args, kwargs)
        is_vectorized = self.vectorize_particles and self.num_particles > 1

        def find_hint() -> str:
            return _find_hint(guide, args, kwargs) if is_vectorized else ""

        with nullcontext() if is_vectorized else SharedSubsampleMessenger():
            with hint_at_shapes(find_hint):
                traces = list(self._get_traces(model, guide, args, kwargs))
        for _, guide_trace in traces:
            check_densities(guide_trace)
            if torch.is_grad_enabled():
                check_reparameterized(guide_trace)
        particle_dim = -self.max_plate_nesting if is_vectorized else None
        loss: Any
        loss, surrogate = compute_bound(traces, particle_dim)
        warn_if_nan(loss, "loss")
        self._note(traces[-1][1], surrogate)
        if loss == math.inf and torch.is_grad_enabled():
            warnings.warn(
                "The loss of DReG_ELBO is infinite, as all particles have weight zero, at one "
                "item of a plate at least, which adds nothing to the gradient. Expected draws "
                "of the guide to which the model gives a density that is not zero: see to the "
                "support of the guide, or where it starts."
            )
        trainable = any(
            site["type"] == "param"
            for pair in traces
            for trace in pair
            for site in trace.nodes.values()
        )
        return loss, surrogate, trainable

    def _find_shares(self, surrogate: Surrogate) -> Tuple[List[float], Groups]:
        """By draw, how much of its score to reparameterize; and what to learn of from it."""
        draws = surrogate.draws
        log_q: Dict[str, List[torch.Tensor]] = {}
        for draw in draws:
            if draw.scale is not None:
                log_q.setdefault(draw.site, []).append(draw.log_q)
        nodes: Any = {draw.value.grad_fn for draw in draws}
        groups = self._find_scales(log_q, nodes)
        return [self._scales.get(draw.site, 0.0) for draw in draws], groups

    def _compute_total(self, surrogate: Surrogate, shares: List[float], groups: Groups) -> Any:
        """A scalar whose gradient is that of the loss."""
        if not surrogate.draws:
            return surrogate.kept
        total = surrogate.as_scalar(shares)
        if groups:
            values = [draw.value for draw in surrogate.draws]
            self._learn(groups, total, surrogate.differentiate_scores, values)
        return total

    def _note(self, guide_trace: Any, surrogate: Surrogate) -> None:
        """For the report."""
        if not torch.is_grad_enabled():
            return
        unknown = {draw.site for draw in surrogate.draws if draw.scale is None}
        tap, self._scales = guide_trace.tap, {}
        rows = []
        for name in guide_trace.stochastic_nodes:
            treatment = self.otherwise if tap.drawn_by.get(name) is None else None
            reason = tap.reasons.get(name, "")
            if name in unknown:
                treatment, reason = self.otherwise, "the factor of its log density is not known"
            rows.append(Row(name, treatment, reason))
        self._latest = Summary(rows, self._scales)
