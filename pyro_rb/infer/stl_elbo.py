# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, Iterator, Tuple, Union

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace

from pyro_rb.infer.tapped import TappedMixin, check_num_particles
from pyro_rb.infer.util import site_values
from pyro_rb.ops.quiet_grad import quiet_grad
from pyro_rb.poutine import TapMessenger


def _compute_log_q(guide_trace: Trace, tap: TapMessenger) -> Dict[str, torch.Tensor]:
    """The scaled and masked log density of each tapped site, a scalar."""
    sites = {name: guide_trace.nodes[name] for name in tap.values}
    # A site with plain score parts has the log density for its entropy term.
    return {name: site["log_prob_sum"] for name, site in sites.items()}


def _replace_entropy_terms(
    guide_trace: Trace, tap: TapMessenger, scales: Dict[str, float]
) -> None:
    """
    Puts ``(1 - c) log q + <c d log q / dz, z>`` in the place of each tapped site's
    entropy term, with the derivative at fixed parameters and draws, and detached.
    """
    log_q = {
        name: term
        for name, term in _compute_log_q(guide_trace, tap).items()
        if term.requires_grad
    }
    if not any(scales[name] for name in log_q):
        return
    weights = None
    if any(scales[name] != 1.0 for name in log_q):
        weights = [torch.full_like(term, scales[name]) for name, term in log_q.items()]
    partials: Any = [None] * len(tap.values)
    if log_q:
        with tap.closed():
            partials = quiet_grad(
                list(log_q.values()), list(tap.values.values()), weights
            )
    for (name, z), partial in zip(tap.values.items(), partials):
        entropy_term = z.new_zeros(()) if partial is None else (partial * z).sum()
        if name in log_q and scales[name] != 1.0:
            entropy_term = torch.add(entropy_term, log_q[name], alpha=1.0 - scales[name])
        site = guide_trace.nodes[name]
        site["score_parts"] = site["score_parts"]._replace(entropy_term=entropy_term)


class STLTrace_ELBO(TappedMixin, Trace_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` that sticks the landing [1]: it drops the score
    of the reparameterised guide sites, whose mean is zero, or as much of it as pays.
    The objective is that of ``Trace_ELBO``, and so is the mean of the gradient.

    For parameters :math:`\phi` and a reparameterised draw
    :math:`z = z(\epsilon, \phi)`, the gradient of one particle is

    .. math::

        g_\text{Trace} + c \left. \frac{\partial \log q(z; \phi)}{\partial \phi}
        \right|_{z \text{ fixed}}

    where :math:`g_\text{Trace}` is that of ``Trace_ELBO``. It is unbiased for any
    :math:`c` that does not depend on the draw. With :math:`c = 1`, the path derivative
    of [1], it is zero at each draw where the guide is the posterior. The score is a
    control variate, and :math:`c` is its scale. By default it is learned.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, with plates,
    subsampling, ``scale`` and ``mask``. The path gradient is taken at each guide site
    that is drawn from its own distribution, has ``rsample``, is no
    :class:`~pyro.distributions.Delta`, has a support that does not depend on a
    parameter, and a ``log_prob`` that can be evaluated on a copy of the draw. All
    other sites are treated as ``Trace_ELBO`` treats them;
    :meth:`~pyro_rb.infer.tapped.TappedMixin.report` tells which.

    **When it is worse.** Where :math:`c = 0` or 1 is best, the default pays for having to
    find that out. ``control_variate_scale=1.0`` helps near the optimum only: a guide that is
    much narrower than the posterior has far MORE variance with it than with
    ``Trace_ELBO``, 30 to 10 000 times more at the default ``init_scale=0.1`` of
    :class:`~pyro.infer.autoguide.AutoNormal`. Nothing is gained on discrete sites, on
    :class:`~pyro.infer.autoguide.AutoStructured` and
    :class:`~pyro.infer.autoguide.AutoDelta`, or on flows without an inverse. An
    inverse autoregressive flow is inverted one dimension after the other, which
    costs several times the step. Gradients are first order only: Hessians of the
    surrogate loss are wrong.

    **What is learned** belongs to parameters: tensors without ``grad_fn`` that require grad.
    One that is frozen, that some steps do not use, or that is new leaves the others as they
    are. Tensors among the arguments of the step are no parameters, unless they are a
    :class:`torch.nn.Parameter` or in the param store. What was learned is part of a pickle
    and of :meth:`state_dict`, where parameters have the name that the param store gives them,
    or else the guide or model as a module. Others are told apart by their order.
    Hooks of parameters, and of the values of sites, fire once a step; those of modules and
    of other results fire for what is learned as well. Where a second backward pass is not
    possible, as through code that :func:`torch.compile` has compiled, :math:`c` stays as it
    is, 0 at first, and :meth:`report` says so.

    :param args: The arguments of :class:`~pyro.infer.Trace_ELBO`, in its order:
        ``num_particles``, ``max_plate_nesting`` and so on.
    :param control_variate_scale: The scale :math:`c`: ``"adaptive"``, the default, or a finite
        float without unit, such as 1.0 for the estimator of [1] and 0.0 for ``Trace_ELBO``.
        ``"adaptive"`` is one scale between 0 and 10 for each set of sites that share
        parameters, learned by least squares from the gradients of earlier steps, and starts
        with 3 steps at 0. It keeps two tensors of the shape of each of the guide's
        parameters, and takes about twice the time at each of the first 50 steps and at
        every 16th later on.
    :param kwargs: Further arguments of :class:`~pyro.infer.Trace_ELBO`:
        ``vectorize_particles``, ``retain_graph`` and so on.
    :raises ValueError: if ``control_variate_scale`` is neither a finite float nor
        ``"adaptive"``, or ``num_particles`` no positive int.
    :raises RuntimeError: at a step, if the value of a guide site was changed in place.
    :raises NotImplementedError: at a step, inside of :func:`torch.jit.trace`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
        >>> elbo = STLTrace_ELBO()
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.tensor([0.3, 0.8]))
        >>> print(elbo.report())
        site               treatment             reason
        -----------------  --------------------  -----------------------------
        loc_unconstrained  path gradient, c = 0  reparameterised draw
        loc                as Trace_ELBO         a Delta has no score identity

    **References**

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud (2017), "Sticking the Landing:
    Simple, Lower-Variance Gradient Estimators for Variational Inference".
    https://arxiv.org/abs/1703.09194
    """

    otherwise = "as Trace_ELBO"

    def __init__(
        self,
        *args: Any,
        control_variate_scale: Union[float, str] = "adaptive",
        **kwargs: Any,
    ) -> None:
        check_num_particles(args[0] if args else kwargs.get("num_particles", 1))
        self._init_tap(control_variate_scale)
        super().__init__(*args, **kwargs)

    def _get_traces(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Trace, Trace]]:
        last = 1 if self.vectorize_particles else self.num_particles
        traces = super()._get_traces(model, guide, args, kwargs)
        for index, (model_trace, guide_trace) in enumerate(traces, start=1):
            # All particles of a step use what was learned before the step.
            guide_trace.may_learn = index == last
            yield model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Any
    ) -> Tuple[Any, Any]:
        compute = super()._differentiable_loss_particle
        tap = guide_trace.tap
        if not tap.values:
            return compute(model_trace, guide_trace)
        log_q = _compute_log_q(guide_trace, tap)
        draws = {z.grad_fn for z in tap.values.values()}
        roots = {name: [term] for name, term in log_q.items()}
        groups = self._find_scales(roots, draws, guide_trace.may_learn)
        _replace_entropy_terms(guide_trace, tap, self._scales)
        loss, surrogate = compute(model_trace, guide_trace)
        if groups:
            between = site_values(model_trace, guide_trace)

            def compute_scores(parameters: Any) -> Any:
                terms = [term for term in log_q.values() if term.requires_grad]
                with tap.closed():
                    return quiet_grad(terms, parameters, between=between)

            self._learn(groups, surrogate, compute_scores, between)
        return loss, surrogate
