# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Union

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO


class STLTrace_ELBO(RaoBlackwell_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` that sticks the landing [1]: it drops the score
    of the reparameterized guide sites, whose mean is zero, or as much of it as pays.
    The objective is that of ``Trace_ELBO``, and so is the mean of the gradient.

    For parameters :math:`\phi` and a reparameterized draw
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
    that is drawn from its own distribution, has ``rsample``, and a score whose mean is
    known to be zero. Known are the distributions and transforms of PyTorch and Pyro
    whose support does not move with a parameter. All other sites are treated as
    ``Trace_ELBO`` treats them; :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells
    which, and why.

    **When it is worse.** Where :math:`c = 0` or 1 is best, the default pays for having to
    find that out. ``control_variate_scale=1.0`` helps near the optimum only: a guide that is
    much narrower than the posterior has far MORE variance with it than with
    ``Trace_ELBO``, 30 to 10 000 times more at the default ``init_scale=0.1`` of
    :class:`~pyro.infer.autoguide.AutoNormal`. Nothing is gained on discrete sites, on
    :class:`~pyro.infer.autoguide.AutoStructured` and
    :class:`~pyro.infer.autoguide.AutoDelta`. Flows without a fast inverse, such as
    :class:`~pyro.infer.autoguide.AutoIAFNormal`, are solved at their draws [2]; of layers
    whose Jacobian has no known structure all rows are computed, up to 128. Gradients are first
    order only: Hessians of the surrogate loss are wrong.

    **What is learned** belongs to parameters: tensors without ``grad_fn`` that require grad.
    One that is frozen, that some steps do not use, or that is new leaves the others as they
    are. Tensors among the arguments of the step are no parameters, unless they are a
    :class:`torch.nn.Parameter` or in the param store. What was learned is part of a pickle
    and of :meth:`~pyro_rb.infer.learned_state.LearnedStateMixin.state_dict`, where parameters
    have the name that the param store gives them,
    or else the guide or model as a module. Others are told apart by their order.
    Hooks of parameters, and of the values of sites, fire once a step; those of modules and
    of other results fire for what is learned as well. Where a second backward pass is not
    possible, as through code that :func:`torch.compile` has compiled, :math:`c` stays as it
    is, 0 at first, and :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` says so.

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

        >>> import pyro, torch, pyro.distributions as dist
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
        loc_unconstrained  path gradient, c = 0  reparameterized draw
        loc                as Trace_ELBO         a Delta has no score identity

    **References**

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud (2017), "Sticking the Landing:
    Simple, Lower-Variance Gradient Estimators for Variational Inference".
    https://arxiv.org/abs/1703.09194

    [2] Lorenz Vaitl, Kim A. Nicoli, Shinichi Nakajima, Pan Kessel (2022), "Gradients should
    stay on path: better estimators of the reverse- and forward KL divergence for normalizing
    flows". https://arxiv.org/abs/2207.08219
    """

    _own_option = "control_variate_scale"
    _strategies = ("path",)

    def __init__(
        self, *args: Any, control_variate_scale: Union[float, str] = "adaptive", **kwargs: Any
    ) -> None:
        super().__init__(*args, control_variate_scale=control_variate_scale, **kwargs)
