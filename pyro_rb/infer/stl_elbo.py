# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Union

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO


class STLTrace_ELBO(RaoBlackwell_ELBO):
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
    control variate, and :math:`c` is its scale.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, with plates,
    subsampling, ``scale`` and ``mask``. The path gradient is taken at each guide site
    that is drawn from its own distribution, has ``rsample``, and a score whose mean is
    known to be zero. Known are the distributions and transforms of PyTorch and Pyro
    whose support does not move with a parameter. All other sites are treated as
    ``Trace_ELBO`` treats them; :meth:`~pyro_rb.infer.tapped.TappedMixin.report` tells
    which, and why.

    **When it is worse.** ``control_variate_scale=1.0`` helps near the optimum only.
    A guide that is much narrower than the posterior has far MORE variance with it
    than with ``Trace_ELBO``: 30 to 10 000 times more at the default ``init_scale=0.1``
    of :class:`~pyro.infer.autoguide.AutoNormal`. Use ``"adaptive"``, or train with
    ``Trace_ELBO`` first. Nothing is gained on discrete sites, on
    :class:`~pyro.infer.autoguide.AutoStructured` and
    :class:`~pyro.infer.autoguide.AutoDelta`, or on flows without an inverse. An
    inverse autoregressive flow is inverted one dimension after the other, which
    costs several times the step. Gradients are first order only: Hessians of the
    surrogate loss are wrong.

    :param control_variate_scale: The scale :math:`c`, a finite float without unit.
        Defaults to 1.0. Or the string ``"adaptive"``: one scale between 0 and 10 for
        each set of sites that share parameters, learned by least squares from the
        gradients of earlier steps, starting with 3 steps at 0. It then keeps three
        vectors in the shape of the guide's parameters, and takes about twice the
        time at each of the first 50 steps and at every 16th later on.
    :param kwargs: The arguments of :class:`~pyro.infer.Trace_ELBO`:
        ``num_particles``, ``vectorize_particles``, ``max_plate_nesting``,
        ``retain_graph`` and so on.
    :raises ValueError: if ``control_variate_scale`` is neither a finite float nor
        ``"adaptive"``.
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
        >>> elbo = STLTrace_ELBO(control_variate_scale="adaptive")
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

    _own_option = "control_variate_scale"
    _strategies = ("path",)

    def __init__(
        self, *args: Any, control_variate_scale: Union[float, str] = "adaptive", **kwargs: Any
    ) -> None:
        super().__init__(*args, control_variate_scale=control_variate_scale, **kwargs)
