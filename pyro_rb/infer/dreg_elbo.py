# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import nullcontext
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from pyro.infer import RenyiELBO
from pyro.poutine import Trace
from pyro.util import warn_if_nan

from pyro_rb.infer.importance_bound import (
    Draw,
    Partials,
    Surrogate,
    check_reparameterized,
    compute_bound,
)
from pyro_rb.infer.path_mixin import PathGradientMixin
from pyro_rb.infer.report import Row, Summary
from pyro_rb.ops.quiet_grad import quiet_grad
from pyro_rb.poutine import SharedSubsampleMessenger, TapMessenger


class _Path(NamedTuple):
    """
    A gradient in two parts: that of the draws, times ``of_draws``, and that of ``rest``.
    """

    of_draws: List[torch.Tensor]  # detached, one for each draw and of its shape
    rest: List[torch.Tensor]  # scalars

    def as_scalar(self, draws: Sequence[Draw]) -> Any:
        terms = [(g * d.value).sum() for g, d in zip(self.of_draws, draws)]
        return sum(terms + self.rest)


class DReG_ELBO(PathGradientMixin, RenyiELBO):
    r"""
    The importance-weighted bound [1], that is :class:`~pyro.infer.RenyiELBO` with
    ``alpha=0``, with the doubly reparameterized gradient [2]: its signal-to-noise ratio
    grows with the number of particles, where that of ``RenyiELBO`` falls [3].

    With :math:`K` particles :math:`z_k = z(\epsilon_k, \phi)`, weights
    :math:`w_k = p(x, z_k) / q(z_k; \phi)`, and :math:`\tilde w_k = w_k / \sum_j w_j`, the
    loss is :math:`-\log \frac1K \sum_k w_k`, and guide parameters have the gradient
    (equation 6 of [2])

    .. math::

        - \sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k}
        \frac{d z_k}{d \phi}.

    Model parameters have the gradient of ``RenyiELBO``. With :math:`K = 1` all this is
    :class:`~pyro_rb.infer.stl_elbo.STLTrace_ELBO`.

    **Items of plates.** Plates that hold *all* sites of model and guide, such as the one
    over the data of a variational autoencoder, have weights for each item: the loss is a
    sum of bounds, one an item. Where one site is outside, in the model or in the guide,
    there is one weight for the whole plate. Two things differ from ``RenyiELBO`` here. It
    looks at the model only, and counts a guide site outside of the plate once an item.
    And where such a plate subsamples, it multiplies the log weights by the ratio of the
    sizes, not the bound; its looped particles also draw different subsamples. Here the
    loss is an unbiased estimate of the bound of all items. Factors of
    :func:`pyro.poutine.scale`, and the subsampling of plates that do not hold all sites,
    multiply log densities within the weights, as in ``RenyiELBO``: the latter changes
    the bound if ``num_particles > 1``.

    **Requirements.** A guide without score function terms: a site that is not
    reparameterized must not depend on a parameter, else ``NotImplementedError``. Sites to
    which the method does not apply (see ``STLTrace_ELBO``) are treated as ``RenyiELBO``
    treats them; :meth:`~pyro_rb.infer.tapped.TappedMixin.report` tells which. Vectorized
    particles need static structure.

    **When it is worse.** A guide much narrower than the posterior has far MORE variance
    than with ``RenyiELBO``, hundreds of times more at the default ``init_scale=0.1`` of
    :class:`~pyro.infer.autoguide.AutoNormal`. Use ``control_variate_scale="adaptive"``, or
    a wider guide. With looped particles all their graphs are alive at the same time, as
    in ``RenyiELBO``. :meth:`differentiable_loss` passes through the model's graph twice;
    :meth:`loss_and_grads` does not. Gradients are first order only.

    :param int num_particles: The number :math:`K` of particles. Defaults to 2.
    :param bool vectorize_particles: Whether to draw them in one run of model and guide,
        in a plate. Defaults to True.
    :param control_variate_scale: The share :math:`c` of the double reparameterization.
        1.0, the default, is [2], 0.0 is the gradient of ``RenyiELBO``; any finite float is
        unbiased. Or ``"adaptive"``: one scale between 0 and 10 for each set of sites that
        are linked, by parameters or by one's draw in the other's distribution, learned
        from earlier steps as in ``STLTrace_ELBO``.
    :param bool retain_graph: As in :class:`~pyro.infer.Trace_ELBO`.
    :param kwargs: Further arguments of :class:`~pyro.infer.RenyiELBO`:
        ``max_plate_nesting`` and ``strict_enumeration_warning``.
    :raises ValueError: if ``num_particles`` is no positive int, or ``control_variate_scale``
        neither a finite float nor ``"adaptive"``.
    :raises NotImplementedError: at a step, naming the site, if the guide needs a score
        function.
    :raises RuntimeError: at a step, if the value of a guide site was changed in place.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     with pyro.plate("data", len(data)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=data)
        >>> elbo = DReG_ELBO(num_particles=8)
        >>> guide = AutoNormal(model, init_scale=1.0)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([0.3, 0.8]))
        >>> print(elbo.report())
        site             treatment             reason
        ---------------  --------------------  -----------------------------
        z_unconstrained  path gradient, c = 1  reparameterised draw
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
        vectorize_particles: bool = True,
        control_variate_scale: Union[float, str] = 1.0,
        *,
        retain_graph: Optional[bool] = None,
        **kwargs: Any,
    ) -> None:
        is_int = isinstance(num_particles, int) and not isinstance(num_particles, bool)
        if not is_int or num_particles < 1:
            raise ValueError(
                f"Invalid num_particles: {num_particles!r}. Expected a positive int."
            )
        self._init_scales(control_variate_scale)
        super().__init__(
            alpha=0,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            **kwargs,
        )
        self.retain_graph = retain_graph

    def _get_trace(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        tap = TapMessenger(self._obstacle())
        model_trace, guide_trace = super()._get_trace(model, tap(guide), args, kwargs)
        tap.path.raise_if_edited()
        guide_trace.tap = tap  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            self._scales = {}
            self._latest = Summary(
                [
                    Row(name, None if tap.drawn_by.get(name) else self.otherwise, tap.reasons.get(name, ""))
                    for name in guide_trace.stochastic_nodes
                ],
                self._scales,
            )
        return model_trace, guide_trace

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of minus the importance-weighted bound. Builds no graph.
        """
        with torch.no_grad():
            return self._evaluate(model, guide, args, kwargs)[0]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        Adds the gradient to the ``.grad`` of the parameters, if model or guide have a
        :func:`pyro.param` site, as ``RenyiELBO`` does.

        :return: an estimate of minus the importance-weighted bound.
        """
        loss, surrogate, trainable = self._evaluate(model, guide, args, kwargs)
        if not trainable:
            return loss
        # First through the model, down to the draws; then through the guide. What the
        # second pass starts from is known after the first.
        draws = surrogate.draws
        for draw in draws:
            draw.value.retain_grad()
        if getattr(surrogate.kept, "requires_grad", False):
            with surrogate.closed():
                retain_graph = True if draws else self.retain_graph
                surrogate.kept.backward(retain_graph=retain_graph)
        if draws:
            path = self._compute_path(surrogate, [draw.value.grad for draw in draws])
            roots = [draw.value for draw in draws] + path.rest
            gradients: Any = path.of_draws + [None] * len(path.rest)
            torch.autograd.backward(roots, gradients, retain_graph=self.retain_graph)
        return loss

    def differentiable_loss(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Union[float, torch.Tensor]:
        """
        :return: an estimate of minus the importance-weighted bound, a scalar tensor whose
            gradient is the one of :meth:`loss_and_grads`.
        """
        loss, surrogate, _ = self._evaluate(model, guide, args, kwargs)
        total = surrogate.kept
        if surrogate.draws:
            partials = surrogate.partials_of_kept()
            total = _join(surrogate, partials, self._compute_path(surrogate, partials))
        return loss + (total - total.detach()) if isinstance(total, torch.Tensor) else loss

    def _evaluate(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[float, Surrogate, bool]:
        """The loss, a surrogate for its gradient, and whether there is a param site."""
        self._note_call(model, guide, args, kwargs)
        is_vectorized = self.vectorize_particles and self.num_particles > 1
        with nullcontext() if is_vectorized else SharedSubsampleMessenger():
            traces = list(self._get_traces(model, guide, args, kwargs))
        if torch.is_grad_enabled():
            for _, guide_trace in traces:
                check_reparameterized(guide_trace)
        particle_dim = -self.max_plate_nesting if is_vectorized else None
        loss: Any
        loss, surrogate = compute_bound(traces, particle_dim)
        warn_if_nan(loss, "loss")
        trainable = any(
            site["type"] == "param"
            for pair in traces
            for trace in pair
            for site in trace.nodes.values()
        )
        return loss, surrogate, trainable

    def _compute_path(self, surrogate: Surrogate, partials: Partials) -> _Path:
        """
        :param partials: derivatives of ``surrogate.kept`` by each draw; None is zero.
        """
        draws = surrogate.draws
        log_q: Dict[str, List[torch.Tensor]] = {}
        for draw in draws:
            log_q.setdefault(draw.site, []).append(draw.log_q)
        # Through the draws: a site shares the scale of those that it depends on.
        groups = self._find_scales(log_q)
        path, score = _Path([], []), _Path([], [])
        for draw, of_kept, a in zip(draws, partials, surrogate.partials_of_log_q()):
            # Of minus log w, with the weight as a factor; the path has it once more.
            g = a if of_kept is None else of_kept + a
            doubled = draw.broad_weight * g
            rest = 1.0 - self._scales[draw.site]
            if rest == 0.0 and not groups:
                path.of_draws.append(doubled)
                continue
            # What the gradient of RenyiELBO has beyond the doubly reparameterized one.
            beyond, direct = g - doubled - a, draw.weighted_log_q
            path.of_draws.append(doubled + rest * beyond)
            path.rest.append(rest * direct)
            score.of_draws.append(beyond)
            score.rest.append(direct)
        if groups:
            values = [draw.value for draw in draws]
            self._learn(
                groups,
                _join(surrogate, partials, path),
                lambda parameters: quiet_grad([score.as_scalar(draws)], parameters, between=values),
                values,
            )
        return path


def _join(surrogate: Surrogate, partials: Partials, path: _Path) -> torch.Tensor:
    """A scalar with the whole gradient: what ``kept`` passes to the draws is replaced."""
    total = surrogate.kept + path.as_scalar(surrogate.draws)
    for draw, partial in zip(surrogate.draws, partials):
        if partial is not None:
            total = total - (partial * draw.value).sum()
    return total
