# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Optional

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO


class R2G2_ELBO(RaoBlackwell_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` with Rao-Blackwellized reparameterization gradients
    [1], for Gaussian guide sites that enter the model through linear functions: weights of
    Bayesian neural networks, coefficients of a regression, inducing values.

    For a draw :math:`v = \mu + V \epsilon` that enters through pre-activations
    :math:`z = W v + b`, gradients are computed with

    .. math::

        \epsilon^* = \mathbb{E}[\epsilon \mid z] = A^+ A \epsilon, \qquad A = W V

    in place of :math:`\epsilon` (Definition 4.1 of [1]). The forward pass stays as it
    is, with one draw of :math:`v` for all rows of a minibatch. The mean of the gradient
    is that of ``Trace_ELBO``; its variance given one layer is never larger. The gradient
    for the other factor :math:`W` is computed with :math:`v^* = \mu + V \epsilon^*` as well. With
    one row this is local reparameterization [2] (Theorem 4.3 of [1]).

    Entropies of these sites, and expected log priors where prior and guide are Gaussian,
    are analytic, also with autoguides.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, without change.
    The method applies to each latent site of the guide that is exactly a ``Normal``,
    ``MultivariateNormal`` or ``LowRankMultivariateNormal``, under any ``to_event``, or a
    subclass that changes no method. (Priors are recognized in the same way.) Its noise is
    projected at ``F.linear``, ``F.conv1d`` to ``F.conv3d``, ``@`` and the ``matmul`` family,
    ``torch.einsum`` with a string, ``tensordot``, ``inner`` and ``dot``, in guide and model.
    Reshaped, transposed, indexed and split values are followed. Each element of a value may be
    used once. It gets the plain gradient where it is used twice, by a non-linear function, under
    ``no_grad``, or inside ``torch.func``, a checkpoint or a function that ``torch.compile``
    made; and where there are as many rows as inputs, as nothing can be gained there. A
    value that was drawn under ``no_grad`` has no gradient, as in ``Trace_ELBO``.
    :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells what was done at each site.

    If another use of an element is found after its projection, guide and model are run once
    more, with the same random numbers. This happens in the first steps, and is remembered
    by site name and shape. Code with side effects is then run twice.

    **What is not detected.** Uses without a gradient in code that bypasses PyTorch's
    function dispatch, such as ``w.detach()`` inside a function that ``torch.jit.script``
    or ``torch.compile`` (with Inductor) made. A generator of your own, a data iterator
    or BatchNorm statistics inside guide or model, which the second run does not rewind.
    A prior that depends, without a gradient, on an earlier part of the same *correlated*
    guide site. With ``pre_activations="local"``, models that couple rows, see below. With
    ``"auto"``, a coupling that appears when a number changes, until the next check.

    **When it is worse.** A step takes longer: it solves a system for each layer, and evaluates
    each linear function once more. Several particles in the same time
    may have less variance, unless there are many more inputs than rows. Nothing is
    gained where the number of rows reaches about 0.7 times that of inputs, for decoders of full
    column rank, for tied or siamese weights, recurrent networks and attention, and for
    correlated guides over several layers. Mostly gradients of scales gain. Late in training, when
    scales are small, these matter less; set ``num_steps`` to stop then. Gradients are right to
    first order only: Hessians of the surrogate loss are wrong.

    :param args: The positional arguments of :class:`~pyro.infer.Trace_ELBO`, in the same order.
    :param str pre_activations: ``"shared"`` (default): one draw of the weights for all
        rows. This is always valid. ``"local"``: pre-activations of ``F.linear`` with inputs of
        shape ``[rows, inputs]`` and a diagonal guide are drawn for each row, as in [2];
        all else is as in ``"shared"``. This has less variance and takes less time, but is WRONG,
        silently, if the loss couples rows: BatchNorm, contrastive losses, positions of a sequence
        folded into rows, ensembles of functions. ``"auto"``: as ``"local"`` for layers where
        each term of the ELBO is proven to depend on one row only, and as
        ``"shared"`` for the others. The proof is made at the first step, again at the
        second, fourth, eighth and so on and at every 1000th, and whenever functions, flags
        (``train()``, ``eval()``) or shapes change. Such a step takes about three times as long,
        and runs guide and model two more times. See :class:`~pyro_rb.infer.row_check.RowCheck`.
    :param str solver: ``"cholesky"``, ``"cg"`` or ``"qr"`` project wherever something
        can be gained. ``"auto"`` (default) chooses by size, and takes the plain gradient where
        variance times time would not fall: with fewer than 2 inputs for each row, or fewer than 6
        in large layers (inputs times outputs times rows over a million). All are exact
        up to rounding. Where conjugate gradients do not converge, Cholesky is used, and where that
        fails, QR.
    :param int num_steps: After this many calls of ``loss_and_grads`` or
        ``differentiable_loss``, however many particles they have, the plain gradient is used, with
        analytic KL terms. Defaults to None: never.
    :param kwargs: The keyword arguments of ``Trace_ELBO``: ``num_particles``,
        ``vectorize_particles``, ``max_plate_nesting``, ``retain_graph`` and so on.
    :raises ValueError: naming the option, if one of these three has an invalid value.
    :raises NotImplementedError: at a step inside :func:`torch.jit.trace`.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> pyro.clear_param_store()
        >>> def model(x, y):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
        >>> elbo = R2G2_ELBO()
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(torch.ones(4, 20), torch.zeros(4))
        >>> print(elbo.report())
        site             treatment           reason
        ---------------  ------------------  -----------------------------------
        w_unconstrained  projected           matmul: 4 rows, fan-in 20, cholesky
        w                as w_unconstrained  shows its value

    **References**

    [1] Kevin Lam, Thang Bui, George Deligiannidis, Yee Whye Teh (2025),
    "Rao-Blackwellized Reparameterization Gradients". https://arxiv.org/abs/2506.07687

    [2] Diederik P. Kingma, Tim Salimans, Max Welling (2015), "Variational Dropout and
    the Local Reparameterization Trick". https://arxiv.org/abs/1506.02557
    """

    _own_option = "pre_activations"
    _strategies = ("projection",)
    otherwise = "plain"
    _pre_activations = ("shared", "local", "auto")

    def __init__(
        self,
        *args: Any,
        pre_activations: str = "shared",
        solver: str = "auto",
        num_steps: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, pre_activations=pre_activations, solver=solver, num_steps=num_steps, **kwargs
        )
