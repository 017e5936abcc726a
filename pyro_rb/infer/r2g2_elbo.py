# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Set, Tuple

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_rb.infer.gaussian_kl import replace_kl
from pyro_rb.infer.report import Report, SiteReport
from pyro_rb.infer.util import get_generators, set_generators
from pyro_rb.ops.projection import SOLVERS
from pyro_rb.poutine import ProjectionOptions, R2G2Messenger
from pyro_rb.poutine.gaussian_site import GaussianSite, Plain

PRE_ACTIVATIONS = ("shared", "local")


def _note_uses(
    model_trace: Trace, guide_trace: Trace, handler: R2G2Messenger
) -> None:
    """Notes what can be seen of a run after it is over."""
    terms: Dict[Tuple[str, str], Any] = {}
    for name, site in model_trace.nodes.items():
        if site["type"] == "sample":
            terms["model", name] = (site["value"], [site["log_prob_sum"]])
    has_score_function = False
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            parts = site["score_parts"]
            terms["guide", name] = (site["value"], [parts.score_function, parts.entropy_term])
            if not is_identically_zero(parts.score_function):
                has_score_function = True
    handler.note_hidden_uses(terms)
    if has_score_function:
        handler.note_score_functions()


def _describe(site: GaussianSite, has_analytic_kl: bool) -> SiteReport:
    treatment = "plain"
    if site.projected is not None:
        treatment = " and ".join(sorted(set(site.treatments.values())))
        if isinstance(site.projected, torch.Tensor):
            share = site.projected.double().mean().item()
            if share < 1.0:
                treatment += f" ({100 * share:.0f} %)"
    reasons = list(site.treatments) + site.reasons
    if not reasons:
        reasons = ["not used"]
    if not has_analytic_kl:
        reasons.append("log prior not analytic")
    return SiteReport(site.name, treatment, "; ".join(reasons))


class R2G2_ELBO(Trace_ELBO):
    r"""
    A :class:`~pyro.infer.Trace_ELBO` with Rao-Blackwellised reparameterisation gradients
    [1]. TODO
    """

    def __init__(
        self,
        pre_activations: str = "shared",
        solver: str = "auto",
        num_steps: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
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
        self._report: Optional[Report] = None
        super().__init__(**kwargs)

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
        generators = get_generators()
        while True:
            handler = self._make_handler()
            traces, left = None, set()
            try:
                traces = super()._get_trace(
                    handler.model(model), handler.guide(guide), args, kwargs
                )
                left = replace_kl(*traces, handler)
                _note_uses(*traces, handler)
            except Exception:
                # A derivative of what was projected may be the cause.
                if not handler.violated:
                    raise
            if traces is not None and not handler.violated:
                self._note(traces[1], handler, left)
                return traces
            # Nothing of this run is kept. The next has the same noise, so that what the
            # run depends on, its branches and the use that made it void, stays the same.
            self._plain.update(handler.violated)
            set_generators(generators)

    def _make_handler(self) -> R2G2Messenger:
        reason = ""
        if not self._makes_gradients:
            reason = "no gradient"
        elif self.num_steps is not None and self._steps_done >= self.num_steps:
            reason = f"schedule (num_steps={self.num_steps})"
        options = ProjectionOptions(self.pre_activations, self.solver)
        return R2G2Messenger(options, self._plain, reason)

    def _note(self, guide_trace: Trace, handler: R2G2Messenger, left: Set[str]) -> None:
        if not self._makes_gradients:
            return
        self._report = Report()
        for name in guide_trace.stochastic_nodes:
            view = handler.find(guide_trace.nodes[name]["value"])
            if name in handler.sites:
                row = _describe(handler.sites[name], name not in left)
            elif view is not None:
                row = SiteReport(name, f"as {view.site.name}", "shows its value")
            else:
                row = SiteReport(name, "plain", handler.reasons.get(name, ""))
            self._report.append(row)


def _check(name: str, value: Any, accepted: Tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in accepted):
        names = ", ".join(map(repr, accepted))
        raise ValueError(f"Invalid {name}: {value!r}. Expected one of {names}.")
