# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Union

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO


class STLTrace_ELBO(RaoBlackwell_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` that sticks the landing [1]. It removes the score of
    reparameterized guide sites, whose mean is zero, from the gradient, or as much of it as
    reduces the variance. The objective and the mean of the gradient are those of ``Trace_ELBO``.

    For parameters :math:`\phi` and a reparameterized draw
    :math:`z = z(\epsilon, \phi)`, the gradient of the ELBO from one particle is

    .. math::

        g_\text{Trace} + c \left. \frac{\partial \log q(z; \phi)}{\partial \phi}
        \right|_{z \text{ fixed}}

    where :math:`g_\text{Trace}` is that of ``Trace_ELBO``. It is unbiased for any
    :math:`c` that does not depend on the draw. With :math:`c = 1`, the path derivative
    of [1], it is zero at each draw where the guide is the posterior. The score is a
    control variate, and :math:`c` is its scale. By default :math:`c` is learned.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, with plates,
    subsampling, ``scale`` and ``mask``. The path gradient is taken at each guide site
    that is drawn from its own distribution, has ``rsample``, and has a score whose mean is
    known to be zero. This is known for the distributions and transforms of PyTorch and Pyro
    whose support does not move with a parameter. All other sites are treated as
    ``Trace_ELBO`` treats them; :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells
    which, and why.

    **When it is worse.** Where :math:`c = 0` or 1 is best, the default takes time to
    find that out. ``control_variate_scale=1.0`` helps near the optimum only. With a guide that is
    much narrower than the posterior, it has far MORE variance than
    ``Trace_ELBO``: 30 to 10,000 times more at the default ``init_scale=0.1`` of
    :class:`~pyro.infer.autoguide.AutoNormal`. Nothing is gained on discrete sites, or with
    :class:`~pyro.infer.autoguide.AutoStructured` and
    :class:`~pyro.infer.autoguide.AutoDelta`. For flows without a fast inverse, such as
    :class:`~pyro.infer.autoguide.AutoIAFNormal`, a linear system is solved at each draw [2]. For
    layers whose Jacobian has no known structure, all its rows are computed, up to 128. Gradients
    are right to first order only: Hessians of the surrogate loss are wrong.

    **What is learned** belongs to parameters: tensors without ``grad_fn`` that require grad.
    A parameter that is frozen, that some steps do not use, or that is new does not disturb the
    others. Tensors among the arguments of the step are not parameters, unless they are a
    :class:`torch.nn.Parameter` or in the param store. What was learned is saved in a pickle
    and in :meth:`~pyro_rb.infer.learned_state.LearnedStateMixin.state_dict`. There, parameters
    have the name that the param store gives them, or else the guide or model as a module.
    Parameters without a name are told apart by their order.
    Hooks of parameters, and of the values of sites, fire once a step. Hooks of modules and
    of other results also fire when something is learned. Where a second backward pass is not
    possible, as through code that :func:`torch.compile` has compiled, :math:`c` stays as it
    is, 0 at first, and :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` says so.

    :param args: The arguments of :class:`~pyro.infer.Trace_ELBO`, in the same order:
        ``num_particles``, ``max_plate_nesting`` and so on.
    :param control_variate_scale: The scale :math:`c`: ``"adaptive"``, the default, or a finite
        float, such as 1.0 for the estimator of [1] and 0.0 for ``Trace_ELBO``.
        ``"adaptive"`` learns one scale between 0 and 10 for each set of sites that share
        parameters, by least squares from the gradients of earlier steps. It starts
        with 3 steps at 0. It keeps two tensors of the shape of each of the guide's
        parameters, and takes about twice the time at each of the first 50 steps and at
        every 16th later on.
    :param kwargs: Further arguments of :class:`~pyro.infer.Trace_ELBO`:
        ``vectorize_particles``, ``retain_graph`` and so on.
    :raises ValueError: if ``control_variate_scale`` is neither a finite float nor
        ``"adaptive"``, or ``num_particles`` is not a positive int.
    :raises RuntimeError: at a step, if the value of a guide site was changed in place.
    :raises NotImplementedError: at a step inside :func:`torch.jit.trace`.

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
