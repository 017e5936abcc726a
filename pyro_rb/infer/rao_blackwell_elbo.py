# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import queue
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.infer.util import torch_backward, torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan

from pyro_rb.infer.outside_plates import OutsidePlates, Terms
from pyro_rb.infer.particle_baseline import Draw, compute_scores
from pyro_rb.infer.path_mixin import Groups, PathGradientMixin, check_num_particles
from pyro_rb.infer.hint import hint_at_shapes
from pyro_rb.infer.run import Run
from pyro_rb.infer.surrogate import path_terms
from pyro_rb.infer.util import (
    check_traces,
    get_generators,
    get_traces,
    is_guide_messenger,
    set_generators,
    site_values,
)
from pyro_rb.infer.weights import Baselines, compute_elbo, set_apart, weigh, without_value
from pyro_rb.ops.projection import SOLVERS
from pyro_rb.ops.quiet_grad import quiet_grad
from pyro_rb.poutine import (
    PathGradient,
    Projection,
    ProjectionOptions,
    TopK,
    TopKOptions,
)
from pyro_rb.poutine.gaussian_site import Plain

BASELINES = (None, "loo", "reinforce+")
PRE_ACTIVATIONS = ("auto", "shared", "local", None)


class RaoBlackwell_ELBO(PathGradientMixin, Trace_ELBO):
    #: Which strategies sites are offered to, in this order.
    _strategies: Tuple[str, ...] = ("topk", "projection", "path")
    #: Says in the report how a site is treated that no strategy accepts.
    otherwise = "as Trace_ELBO"
    _own_option = "budget"

    def __init__(
        self,
        *args: Any,
        k: Optional[int] = None,
        num_samples: Optional[int] = None,
        budget: Optional[int] = 3,
        baseline: Optional[str] = "loo",
        draws: int = 2,
        control_variate_scale: Union[float, str] = "adaptive",
        pre_activations: Optional[str] = "auto",
        solver: str = "auto",
        max_evaluations: int = 2**16,
        num_steps: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        if k is not None or num_samples is not None:
            budget = None if budget == 3 else budget
        self.options = TopKOptions.make(k, num_samples, budget)
        self.baseline = baseline
        self.max_evaluations = max_evaluations
        self.draws = draws
        self.pre_activations = pre_activations
        self.solver = solver
        self.num_steps = num_steps
        self._init_scales(control_variate_scale)
        self._steps_done = 0
        self._makes_gradients = False
        # By name and shape of a site. An entry that is out of date costs variance only.
        self._plain: Dict[Tuple, Any] = {}
        self._outside = OutsidePlates()
        super().__init__(*args, **kwargs)
        check_num_particles(self.num_particles, self._own_option)

    def _get_learned(self) -> Dict[str, Any]:
        plain = [[name, list(shape), *p] for (name, shape), p in self._plain.items()]
        return {**super()._get_learned(), "steps_done": self._steps_done, "plain": plain}

    def _set_learned(self, learned: Dict[str, Any]) -> None:
        super()._set_learned(learned)
        self._steps_done = learned["steps_done"]
        self._plain = {(n, torch.Size(shape)): Plain(*p) for n, shape, *p in learned["plain"]}

    # -- Traces ------------------------------------------------------------------

    def _get_traces(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Trace, Trace]]:
        for _, terms in self._get_terms(model, guide, args, kwargs):
            yield terms.model_trace, terms.guide_trace

    def _get_terms(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[int, Terms]]:
        """The number of a particle, and its runs: one, but for sequential enumeration."""
        self._note_call(model, guide, args, kwargs)
        enumerates = self._enumerates(guide)
        if self.max_plate_nesting == math.inf and (enumerates or self.vectorize_particles):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorize_particles:
            # Before the handlers, so that each particle has draws of its own.
            guide = self._vectorized_num_particles(guide)
            model = self._vectorized_num_particles(model)
        num_runs = 1 if self.vectorize_particles else self.num_particles
        for particle in range(num_runs):
            path = PathGradient(self._obstacle())
            starts: Any = queue.LifoQueue()
            # All particles of a step use what was learned before the step.
            is_last = particle == num_runs - 1

            def get_traces(*handlers: Messenger) -> Tuple[Trace, Trace]:
                call = [h(f) for h, f in zip(handlers, (model, guide))] or [model, guide]
                pair = self._get_trace_from(starts, path, *call, args, kwargs)
                pair[1].run.may_learn = is_last and starts.empty()  # type: ignore[attr-defined]
                return pair

            if enumerates:
                for terms in self._outside.get_terms(get_traces, starts):
                    yield particle, terms
            else:
                yield particle, Terms(*get_traces())

    def _get_trace_from(
        self, starts: Any, path: PathGradient, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        """
        :param starts: partial traces of the guide, of sites that are enumerated in a loop.
        """
        saved, generators = list(starts.queue), None
        while True:
            run = self._make_run(path, guide)
            if generators is None and run.projection is not None:
                generators = get_generators()
            found = None
            try:
                with hint_at_shapes(run.hint):
                    found = self._run(run, starts, model, guide, args, kwargs)
            except Exception:
                # A derivative of what was projected may be the cause.
                if not run.is_void:
                    raise
            if found is not None and not run.is_void:
                self._note(run, found[1])
                return found
            # Nothing of this run is kept. The next has the same noise, so that what the
            # run depends on, its branches and the use that made it void, stays the same.
            assert run.projection is not None
            self._plain.update(run.projection.violated)
            set_generators(generators)
            starts.queue[:] = saved

    def _run(
        self, run: Run, starts: Any, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        enumerates, nesting = run.topk is not None, self.max_plate_nesting
        guide = run.guide(guide)
        if enumerates:
            guide = poutine.queue(
                guide, starts, escape_fn=iter_discrete_escape, extend_fn=iter_discrete_extend
            )
        model_trace, guide_trace = get_traces(run.model(model), guide, args, kwargs, nesting)
        run.compute_densities(model_trace, guide_trace)
        check_traces(model_trace, guide_trace, nesting, enumerates)
        if run.path is not None:
            run.path.raise_if_edited()
        guide_trace.run = run  # type: ignore[attr-defined]
        if enumerates:
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
            set_apart(guide_trace, self._baselines, run.path_sites)
        return model_trace, guide_trace

    def _note(self, run: Run, guide_trace: Trace) -> None:
        """For the report."""
        if self._makes_gradients or self._latest is None:
            self._latest = run.summarize(guide_trace, self.otherwise, self._baselines)

    @property
    def _baselines(self) -> Baselines:
        return Baselines(self.baseline, self.num_particles)

    def _enumerates(self, guide: Any) -> bool:
        """Whether discrete sites of the guide may have several values."""
        return "topk" in self._strategies and not is_guide_messenger(guide)

    def _make_run(self, path: PathGradient, guide: Any) -> Run:
        topk = projection = None
        first_available_dim = None
        if self._enumerates(guide):
            first_available_dim = -1 - self.max_plate_nesting
            topk = TopK(
                self.options,
                self.baseline == "reinforce+",
                self.max_evaluations,
                self.draws,
                self._outside.reasons,
            )
        has_projection = "projection" in self._strategies and self.pre_activations is not None
        if has_projection and not is_guide_messenger(guide):
            reason = ""
            if not self._makes_gradients:
                reason = "no gradient"
            elif self.num_steps is not None and self._steps_done >= self.num_steps:
                reason = f"schedule (num_steps={self.num_steps})"
            options = ProjectionOptions(self.pre_activations, self.solver)
            own_path = path if "path" in self._strategies and not path.obstacle else None
            projection = Projection(options, self._plain, reason, own_path)
        return Run(
            topk, projection, path if "path" in self._strategies else None, first_available_dim
        )

    # -- The surrogate --------------------------------------------------------------

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Any
    ) -> Tuple[Any, Any]:
        run: Run = guide_trace.run
        names = run.path_sites
        if not names:
            return super()._differentiable_loss_particle(model_trace, guide_trace)
        # A site with plain score parts has the log density for its entropy term.
        log_q = {name: guide_trace.nodes[name]["log_prob_sum"] for name in names}
        groups = self._choose_scales(log_q, run)
        terms = path_terms(log_q, run.path, self._scales)
        for name, z in run.path.values.items():
            site = guide_trace.nodes[name]
            entropy_term = terms.get(name, z.new_zeros(()))
            if name not in log_q:  # analytic
                entropy_term = entropy_term + site["score_parts"].entropy_term.sum()
            elif self._scales[name] != 1.0:
                entropy_term = torch.add(entropy_term, log_q[name], alpha=1.0 - self._scales[name])
            site["score_parts"] = site["score_parts"]._replace(entropy_term=entropy_term)
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        self._learn_scales(groups, log_q, surrogate, (model_trace, guide_trace))
        return loss, surrogate

    def _choose_scales(self, log_q: Mapping[str, torch.Tensor], run: Run) -> Groups:
        """Returns what to learn of from this particle."""
        assert run.path is not None
        self._scales = run.scales
        terms = {name: [term] for name, term in log_q.items()}
        return self._find_scales(terms, run.path.nodes, run.may_learn)

    def _learn_scales(
        self, groups: Groups, log_q: Mapping[str, torch.Tensor], surrogate: Any, traces: Any
    ) -> None:
        if groups:
            path, between = traces[1].run.path, site_values(*traces)

            def compute_scores(parameters: Any) -> Any:
                terms = [term for term in log_q.values() if term.requires_grad]
                with path.closed():
                    return quiet_grad(terms, parameters, between=between)

            self._learn(groups, surrogate, compute_scores, between)

    def _weighted_particle(self, terms: Terms) -> Tuple[Any, Any, List[Draw]]:
        run: Run = terms.guide_trace.run
        weighted = weigh(terms, self._baselines, self._outside.dependents)
        surrogate = weighted.surrogate
        if run.path is not None and run.path.values:
            log_q = {n: weighted.log_q[n] for n in run.path_sites if n in weighted.log_q}
            groups = self._choose_scales(log_q, run)
            # The scores of all others are left out, as their mean is zero.
            scales = {**dict.fromkeys(weighted.log_q, 1.0), **self._scales}
            for name, term in log_q.items():
                if scales[name] != 1.0:
                    surrogate = surrogate - without_value((1.0 - scales[name]) * term)
            for term in path_terms(weighted.log_q, run.path, scales).values():
                surrogate = surrogate - without_value(term)
            self._learn_scales(groups, log_q, -surrogate, terms[:2])
        return -torch_item(weighted.elbo), -surrogate, weighted.draws

    def _get_surrogates(
        self, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Iterator[Tuple[Any, Any, Terms, List[Tuple[int, Draw]]]]:
        """The loss of a run, its surrogate, and draws whose scores wait for other particles."""
        for particle, terms in self._get_terms(model, guide, args, kwargs):
            if not terms.costs:
                yield *self._differentiable_loss_particle(*terms[:2]), terms, []
            elif torch.is_grad_enabled():
                loss, surrogate, draws = self._weighted_particle(terms)
                yield loss, surrogate, terms, [(particle, draw) for draw in draws]
            else:
                loss = -torch_item(compute_elbo(terms))
                yield loss, loss, terms, []

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """:return: an estimate of the loss, minus the ELBO."""
        elbo: Any = 0.0
        for _, terms in self._get_terms(model, guide, args, kwargs):
            if terms.costs:
                elbo += torch_item(compute_elbo(terms))
            else:
                elbo += torch_item(terms.model_trace.log_prob_sum())
                elbo -= torch_item(terms.guide_trace.log_prob_sum())
        loss = -elbo / self.num_particles
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss, minus the ELBO, a scalar tensor. Its first
            derivatives are estimates of those of the loss; higher ones are not.
        """
        loss: Any = 0.0
        total: Any = 0.0
        waiting = []
        with self._step():
            for particle, surrogate, _, draws in self._get_surrogates(model, guide, args, kwargs):
                loss += particle / self.num_particles
                total += surrogate / self.num_particles
                waiting += draws
        total -= compute_scores(waiting) / self.num_particles
        warn_if_nan(total, "loss")
        return loss + (total - torch_item(total))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        :return: an estimate of the loss, minus the ELBO. Estimates of its gradient are
            added to the ``.grad`` of the parameters.
        """
        loss: Any = 0.0
        kept: Any = 0.0
        waiting = []
        with self._step():
            for particle, surrogate, terms, draws in self._get_surrogates(
                model, guide, args, kwargs
            ):
                loss += particle / self.num_particles
                nodes: List[Any] = [n for trace in terms[:2] for n in trace.nodes.values()]
                if not any(site["type"] == "param" for site in nodes):
                    continue
                surrogate = surrogate / self.num_particles
                if draws:
                    kept += surrogate
                    waiting += draws
                else:
                    # Sites that are enumerated in a loop share a graph.
                    shares_graph = any("_enum_total" in site.get("infer", {}) for site in nodes)
                    torch_backward(surrogate, retain_graph=shares_graph or self.retain_graph)
        kept -= compute_scores(waiting) / self.num_particles
        torch_backward(kept, retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._makes_gradients = True
        try:
            yield
        finally:
            self._makes_gradients = False
        self._steps_done += 1
