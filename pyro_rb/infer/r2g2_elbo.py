# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Optional

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO


class R2G2_ELBO(RaoBlackwell_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` with Rao-Blackwellized reparameterization gradients
    [1], for Gaussian guide sites that the model uses by linear functions: weights of
    Bayesian neural networks, coefficients of a regression, inducing values.

    For a draw :math:`v = \mu + V \epsilon`, that enters by pre-activations
    :math:`z = W v + c`, gradients are taken with

    .. math::

        \epsilon^* = \mathbb{E}[\epsilon \mid z] = A^+ A \epsilon, \qquad A = W V

    in the place of :math:`\epsilon` (Definition 4.1 of [1]). The forward pass stays as it
    is, with one draw of :math:`v` for all rows of a minibatch. The mean of the gradient
    is that of ``Trace_ELBO``; its variance given one layer is never larger. The gradient
    to the other factor of :math:`W v` sees :math:`v^* = \mu + V \epsilon^*` as well. With
    one row this is local reparameterization [2] (Theorem 4.3 of [1]).

    Entropies of these sites, and expected log priors where prior and guide are Gaussian,
    are analytic, also with autoguides.

    **Requirements.** Any model and guide that ``Trace_ELBO`` accepts, without change.
    Projected is each latent site of the guide that is exactly a ``Normal``,
    ``MultivariateNormal`` or ``LowRankMultivariateNormal`` (under any ``to_event``, or a
    subclass that changes no method; priors are told in the same way), at ``F.linear``,
    ``F.conv1d`` to ``F.conv3d``, ``@`` and the ``matmul`` family, ``torch.einsum`` with a
    string, ``tensordot``, ``inner`` and ``dot``, in guide and model. Reshaped, transposed,
    indexed and split values are followed. Each element of a value may be used once. Where
    it is used twice, by a non-linear function, under ``no_grad``, inside of ``torch.func``,
    a checkpoint or a function that ``torch.compile`` made, its gradient is the plain one;
    and so it is where there are as many rows as inputs, as nothing can be gained there. A
    value that was drawn under ``no_grad`` has no gradient, as in ``Trace_ELBO``.
    :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report` tells for each site.

    If such a use is found after the projection, guide and model are run once
    more, with the same random numbers. It happens in the first steps, and is remembered
    by site name and shape. Code with side effects is then run twice.

    **What cannot be seen.** Uses without a gradient in code that bypasses PyTorch's
    function dispatch, such as ``w.detach()`` inside of a function that ``torch.jit.script``
    or ``torch.compile`` (by Inductor) made. A generator of the user's own, a data iterator
    or BatchNorm statistics inside of guide or model, which the second run does not rewind.
    A prior that depends, without a gradient, on an earlier part of the same *correlated*
    guide site. ``pre_activations="local"`` on models that couple rows, see below; with
    ``"auto"``, a coupling that comes with a number that changes, until the next check.

    **When it is worse.** A step takes longer: a solve for each layer, and one more
    evaluation of each linear function. Several particles for the same time
    may have less variance, unless there are many more inputs than rows. Nothing is
    gained where rows reach about 0.7 times the inputs, for decoders of full column rank,
    for tied or siamese weights, recurrent networks and attention, and for correlated
    guides over several layers. Mostly gradients of scales gain; late in training, when
    scales are small, they matter less, hence ``num_steps``. Gradients are first order
    only: Hessians of the surrogate loss are wrong.

    :param args: The positional arguments of :class:`~pyro.infer.Trace_ELBO`, in its order.
    :param str pre_activations: ``"shared"`` (default): one draw of the weights for all
        rows; always valid. ``"local"``: pre-activations of ``F.linear`` with inputs of
        shape ``[rows, inputs]`` and a diagonal guide are drawn for each row, as in [2];
        all else as in ``"shared"``. Less variance and less time, but WRONG, silently,
        if the loss couples rows: BatchNorm, contrastive losses, positions of a sequence
        folded into rows, ensembles of functions. ``"auto"``: as ``"local"`` for the layers
        of which it is proven that each term of the ELBO depends on one row only, as
        ``"shared"`` for the others. The proof is made at the first step, again at the
        second, fourth, eighth and so on, and whenever functions, flags (``train()``,
        ``eval()``) or shapes change; such a step takes about three times as long, and runs
        guide and model two more times. See :class:`~pyro_rb.infer.row_check.RowCheck`.
    :param str solver: ``"cholesky"``, ``"cg"`` or ``"qr"``, which project wherever something
        can be gained; ``"auto"`` (default) chooses by size, and takes the plain gradient where
        variance times time would not fall: with less than 2 inputs for each row, in large
        layers (inputs times outputs times rows over a million) less than 6. All are exact
        up to rounding. Conjugate gradients that do not converge fall back on Cholesky, and
        that on QR.
    :param int num_steps: After that many calls of ``loss_and_grads`` or
        ``differentiable_loss``, however many particles, the plain gradient is taken, with
        analytic KL terms. Defaults to None, never.
    :param kwargs: Its keyword arguments: ``num_particles``, ``vectorize_particles``,
        ``max_plate_nesting``, ``retain_graph`` and so on.
    :raises ValueError: if one of the three options is none of these.
    :raises NotImplementedError: at a step, inside of :func:`torch.jit.trace`.

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
