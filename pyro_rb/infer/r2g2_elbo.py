# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_rb.infer.r2g2_run import Run, run_once
from pyro_rb.infer.report import Report, SiteReport
from pyro_rb.infer.row_check import RowCheck
from pyro_rb.infer.util import get_generators, set_generators
from pyro_rb.ops.projection import SOLVERS
from pyro_rb.poutine import ProjectionOptions, R2G2Messenger
from pyro_rb.poutine.gaussian_site import Plain
from pyro_rb.poutine.local_draws import LocalDraws

PRE_ACTIVATIONS = ("shared", "local", "auto")


class R2G2_ELBO(Trace_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` with Rao-Blackwellised reparameterisation gradients
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
    one row this is local reparameterisation [2] (Theorem 4.3 of [1]).

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
    :meth:`report` tells for each site.

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
    :raises NotImplementedError: at a step, inside of :func:`torch.jit.trace`; or under a
        handler around the loss that replaces the distribution of a site drawn here.

    Example::

        >>> import pyro, pyro.distributions as dist
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
    "Rao-Blackwellised Reparameterisation Gradients". https://arxiv.org/abs/2506.07687

    [2] Diederik P. Kingma, Tim Salimans, Max Welling (2015), "Variational Dropout and
    the Local Reparameterization Trick". https://arxiv.org/abs/1506.02557
    """

    def __init__(
        self,
        *args: Any,
        pre_activations: str = "shared",
        solver: str = "auto",
        num_steps: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.num_particles, str):
            raise ValueError(
                f"Invalid num_particles: {self.num_particles!r}. Expected an integer. Options "
                "that Trace_ELBO does not have are keywords: "
                f"{type(self).__name__}(pre_activations={self.num_particles!r})."
            )
        _check("pre_activations", pre_activations, PRE_ACTIVATIONS)
        _check("solver", solver, SOLVERS)
        is_count = isinstance(num_steps, int) and not isinstance(num_steps, bool)
        if num_steps is not None and not (is_count and num_steps >= 1):
            raise ValueError(
                f"Invalid num_steps: {num_steps!r}. Expected None, or an integer that is "
                "at least 1."
            )
        self.pre_activations = pre_activations
        self.solver = solver
        self.num_steps = num_steps
        self._steps_done = 0
        self._makes_gradients = False
        # By name and shape of a site. An entry that is out of date costs variance only.
        self._plain: Dict[Tuple, Plain] = {}
        self._rows = RowCheck()
        self._report: Optional[Report] = None

    def report(self) -> Report:
        """
        :return: a row for each latent site of the guide, from the last particle of the
            last gradient: its name, the treatment, and the reason for it. Prints as a
            table.
        :raises RuntimeError: before the first gradient.
        """
        if self._report is None:
            raise RuntimeError(
                "report() tells what was done at the last step, and there was none. "
                "Expected a step, or a loss, before it: call SVI.step() first."
            )
        return self._report

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        with self._step():
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        with self._step():
            return super().loss_and_grads(model, guide, *args, **kwargs)

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._makes_gradients = True
        try:
            yield
        finally:
            self._makes_gradients = False
        self._steps_done += 1

    def _get_trace(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        if isinstance(poutine.unwrap(guide), Messenger):
            traces = super()._get_trace(model, guide, args, kwargs)
            reason = "its guide runs the model inside of itself"
            rows = (SiteReport(n, "plain", reason) for n in traces[1].stochastic_nodes)
            self._report = Report(rows)
            return traces
        if torch.jit.is_tracing():
            raise NotImplementedError(
                f"{type(self).__name__} was called inside of torch.jit.trace, which does "
                "not see the linear functions that it conditions on. Expected a call "
                "outside; to compile a loss, use JitTrace_ELBO."
            )
        generators, nesting = get_generators(), self.max_plate_nesting
        reason = self._why_plain()

        def run(local: Optional[LocalDraws]) -> Optional[Run]:
            handler = R2G2Messenger(ProjectionOptions(self.solver, local), self._plain, reason)
            found = run_once(handler, model, guide, args, kwargs, nesting)
            self._plain.update(handler.violated)
            return found

        def again(local: LocalDraws) -> Optional[Tuple[Trace, Trace]]:
            set_generators(generators)
            found = run(local)
            return None if found is None else found.traces

        while True:
            local = None if reason else self._make_local()
            found = run(local)
            if found is not None and self._rows.accepts(found.traces, local, again):
                if self._makes_gradients:
                    self._report = found.report(local)
                return found.traces
            # Nothing of this run is kept. The next has the same noise, so that what the
            # run depends on, its branches and the use that made it void, stays the same.
            set_generators(generators)

    def _why_plain(self) -> str:
        if not self._makes_gradients:
            return "no gradient"
        if self.num_steps is not None and self._steps_done >= self.num_steps:
            return f"schedule (num_steps={self.num_steps})"
        return ""

    def _make_local(self) -> Optional[LocalDraws]:
        if self.pre_activations == "shared":
            return None
        return LocalDraws() if self.pre_activations == "local" else self._rows.draws()


def _check(name: str, value: Any, accepted: Tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in accepted):
        names = ", ".join(map(repr, accepted))
        raise ValueError(f"Invalid {name}: {value!r}. Expected one of {names}.")
