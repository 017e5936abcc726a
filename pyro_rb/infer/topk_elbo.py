# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Optional

from pyro.infer import TraceEnum_ELBO

from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO
from pyro_rb.infer.traces import is_guide_messenger
from pyro_rb.poutine import TopKOptions


class RaoBlackwellTopK_ELBO(RaoBlackwell_ELBO, TraceEnum_ELBO):
    r"""
    A :class:`~pyro.infer.TraceEnum_ELBO` that sums the most likely values of discrete
    guide sites, and samples the others [1]. The objective and the mean of the gradient are
    those of ``TraceEnum_ELBO`` and of ``Trace_ELBO``.

    At a site with probabilities :math:`q(z)`, let :math:`C` be the ``k`` most likely
    values, :math:`C'` the others, and :math:`v_1, \ldots, v_n` independent draws of
    :math:`q` restricted to :math:`C'`. The expectation of a function of :math:`z` is estimated by

    .. math::

        \sum_{z \in C} q(z) f(z) + \frac{q(C')}{n} \sum_{j=1}^n f(v_j)

    without bias, and so is its gradient. With one draw the variance of the gradient is at
    most :math:`q(C')` times that of a plain draw (Proposition 1 of [1]). Two draws are made
    without replacement, with other weights (:func:`~pyro_rb.ops.topk.select_slots`). The
    model is evaluated at ``k + num_samples`` values at once, in an enumeration dim. If
    the site has no more values than that, it is enumerated, and the gradient is
    that of ``TraceEnum_ELBO``.

    **Requirements.** A model and guide that ``TraceEnum_ELBO`` accepts with the discrete
    sites of the guide enumerated: parallel enumeration must be possible. No annotation is
    needed. The method applies to
    each latent guide site that is a Categorical, OneHotCategorical, Bernoulli, Binomial,
    any other distribution with ``enumerate_support``, or a Poisson, Geometric or
    NegativeBinomial. All but the last three may be several variables made one site by
    ``to_event``, with their joint values. In a plate of size ``N`` the value of such a site has
    the shape ``[k + num_samples, N]``, not ``[K, 1]``. Use :func:`~pyro.ops.indexing.Vindex` to
    index arrays by it.

    **Single draws.** A site has one draw where no table of values can be made; where the table
    would have more than :data:`~pyro_rb.poutine.topk_table.MAX_TABLE` elements, or more than
    :data:`~pyro_rb.poutine.topk_table.MAX_JOINT_TABLE` for joint values; where
    ``infer={"topk": 0}`` asks for it; and where a cost outside the plates of the site depends on
    it, or a cost depends on a sum over its values such as ``k.mean()``. Such costs are found by
    following the values at the first step, when the structure changes, and now and then. The
    site then has the full cost, as in ``Trace_ELBO``. With ``num_particles > 1`` the baseline of
    single draws is the mean cost of the other particles, for each element of a plate. All
    sites that are reparameterized are treated as by ``TraceEnum_ELBO``.
    :meth:`~pyro_rb.infer.path_mixin.PathGradientMixin.report`
    tells what was done at each site, and why.

    **When it is worse.** With few values or a cheap model, enumerate. Where all values are
    about equally likely and ``baseline=None``, summing some of them is worse than drawing
    as many: take ``budget`` or a baseline. Sites that depend on one another are evaluated at all
    combinations: ``(k + num_samples)`` to the power of the number of sites. Early in
    training the guide may be confident and wrong, and plain draws explore more.

    **Options of a site** in the guide: ``infer={"topk": k}``, or a dict of ``k``,
    ``num_samples``, ``budget``, ``sum_up_to``; ``{"topk": 0}`` asks for a single draw. Sites with
    ``infer={"enumerate": ...}`` are enumerated as Pyro does, unless a cost outside their plates
    depends on them. ``infer={"baseline": {...}}`` works as in
    :class:`~pyro.infer.TraceGraph_ELBO`, and replaces ``baseline``, wherever something is drawn.

    Gradients are right to first order only: Hessians of the surrogate loss are wrong.

    :param args: The arguments of :class:`~pyro.infer.TraceEnum_ELBO`, in the same order:
        ``num_particles``, ``max_plate_nesting``, and so on. There is no warning if no
        site is annotated, whatever ``strict_enumeration_warning`` says.
    :param int k: number of values to sum, ``>= 0``. Defaults to 1.
    :param int num_samples: number of draws among the others, ``>= 1``. Defaults to 1.
    :param int budget: number of evaluations, ``>= 1``, in place of ``k`` and ``num_samples``.
        Each element of a plate then has a ``k`` of its own, see
        :func:`~pyro_rb.ops.topk.optimal_k`. Unless ``baseline`` is ``"loo"``, it is that of
        Proposition 2, for which the variance is at most that of the mean of ``budget``
        draws. Defaults to None.
    :param str baseline: what is subtracted from the cost at a draw. ``"loo"`` (the
        default): the mean over the other draws and the values that are summed.
        ``"reinforce+"``: the cost at one more draw, which takes one more evaluation.
        None: nothing. With the first two, single draws have the mean over other particles.
    :param int max_evaluations: the largest number of combinations of values of the sites that a
        site of the model depends on. Defaults to 65536.
    :param kwargs: The arguments of :class:`~pyro.infer.TraceEnum_ELBO` by name.
    :raises ValueError: naming the argument, if ``k``, ``num_samples``, ``budget``,
        ``baseline`` or ``max_evaluations`` is out of range, or ``budget`` is given together with
        ``k`` or ``num_samples``. At a step, naming the site, for invalid options of a
        site, for ``"topk"`` where there is no table, for too many combinations, and for a
        cost that depends on a sum over vectorized particles.
    :raises NotImplementedError: at a step, if the guide is a ``GuideMessenger``.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     with pyro.plate("data", len(data)):
        ...         z = pyro.sample("z", dist.Categorical(torch.ones(50) / 50))
        ...         pyro.sample("x", dist.Normal(z.float(), 1.0), obs=data)
        >>> def guide(data):
        ...     with pyro.plate("data", len(data)):
        ...         logits = pyro.param("logits", torch.zeros(len(data), 50))
        ...         pyro.sample("z", dist.Categorical(logits=logits))
        >>> pyro.clear_param_store()
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

    _own_option = "k"
    _default_options = TopKOptions()
    _strategies = ("topk",)
    otherwise = "as TraceEnum_ELBO"

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
        super().__init__(
            *args,
            k=k,
            num_samples=num_samples,
            budget=budget,
            baseline=baseline,
            draws=1,
            max_evaluations=max_evaluations,
            **kwargs,
        )

    def _enumerates(self, guide: Any) -> bool:
        if is_guide_messenger(guide):
            raise NotImplementedError("RaoBlackwellTopK_ELBO does not support GuideMessenger")
        return True
