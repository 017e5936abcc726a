# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import queue
from contextlib import contextmanager
from functools import partial
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from pyro import poutine
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger

from pyro_rb.infer.generators import (
    get_generators,
    get_torch_generators,
    set_generators,
    set_torch_generators,
)
from pyro_rb.infer.hint import hint_at_shapes
from pyro_rb.infer.outside_plates import OutsidePlates, Terms, needs_weights
from pyro_rb.infer.path_mixin import PathGradientMixin
from pyro_rb.infer.pause import Pause
from pyro_rb.infer.row_check import RowCheck
from pyro_rb.infer.run import Run
from pyro_rb.infer.traces import (
    check_traces,
    get_traces,
    is_guide_messenger,
    pack_traces,
    prune,
    sample_sites,
    shapes,
)
from pyro_rb.infer.weights import Baselines, set_apart
from pyro_rb.poutine import (
    PathGradient,
    Projection,
    ProjectionOptions,
    TopK,
    TopKOptions,
)
from pyro_rb.poutine.gaussian_site import Plain
from pyro_rb.poutine.local_draws import LocalDraws
from pyro_rb.poutine.topk_room import TooManySummed


class _NeedsWeights(Exception):
    """Says that a run was not made ready for sites with several values or scores."""


class RunMixin(PathGradientMixin):
    """
    Base class, to be named before the one of Pyro: runs guide and model for each particle,
    with sites drawn by strategies.
    """

    #: Which strategies sites are offered to, in this order.
    _strategies: Tuple[str, ...] = ("topk", "projection", "path")

    num_particles: int
    vectorize_particles: bool
    options: TopKOptions
    baseline: Optional[str]
    max_evaluations: int
    draws: int
    _draws_bits: bool
    pre_activations: Optional[str]
    solver: str
    num_steps: Optional[int]

    def _init_runs(self) -> None:
        self._steps_done = 0
        self._makes_gradients = False
        # By name and shape of a site. An entry that is out of date costs variance only.
        self._plain: Dict[Tuple, Any] = {}
        self._outside = OutsidePlates()
        # Sites whose values would be too many, with the reasons.
        self._never_summed: Dict[str, str] = {}
        self._rows = RowCheck()
        self._pause = Pause()

    def _get_learned(self) -> Dict[str, Any]:
        plain = [[name, list(shape), *p] for (name, shape), p in self._plain.items()]
        return {
            **super()._get_learned(),
            "steps_done": self._steps_done,
            "plain": plain,
            "never_summed": dict(self._never_summed),
        }

    def _set_learned(self, learned: Dict[str, Any]) -> None:
        super()._set_learned(learned)
        self._steps_done = learned["steps_done"]
        self._never_summed = dict(learned["never_summed"])
        self._plain = {(n, torch.Size(shape)): Plain(*p) for n, shape, *p in learned["plain"]}

    def _settled(self, recorder: Any) -> Any:
        settled: Any = super()._settled(recorder)
        settled._rows, settled._pause = self._rows.settled(), copy.deepcopy(self._pause)
        return settled

    @property
    def _num_runs(self) -> int:
        """Of a step."""
        return 1 if self.vectorize_particles else self.num_particles

    def _count_steps(self, num_steps: int) -> None:
        self._steps_done += num_steps
        self._pause.skip(num_steps * self._num_runs)

    def _is_over(self, num_steps: int = 0) -> bool:
        return self.num_steps is not None and self._steps_done + num_steps >= self.num_steps

    def _phase(self, num_steps: int) -> Any:
        if self._pause.looks_within(num_steps * self._num_runs):
            return None
        return self._is_over(num_steps - 1), self._pause.is_on, len(self._never_summed)

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
            self._guess_max_plate_nesting(model, guide, args, kwargs)  # type: ignore[attr-defined]
        if self.vectorize_particles:
            # Before the handlers, so that each particle has draws of its own.
            guide = self._vectorized_num_particles(guide)  # type: ignore[attr-defined]
            model = self._vectorized_num_particles(model)  # type: ignore[attr-defined]
        for particle in range(self._num_runs):
            path = PathGradient(self._obstacle())
            is_last = particle == self._num_runs - 1

            def make(starts: Optional[Any], *watches: Messenger) -> Tuple[Trace, Trace]:
                watched = [w(fn) for w, fn in zip(watches, (model, guide))] or [model, guide]
                pair = self._get_trace_from(starts, path, watched[0], watched[1], args, kwargs)
                is_end = is_last and (starts is None or starts.empty())
                pair[1].run.may_learn = is_end  # type: ignore[attr-defined]
                return pair

            if not enumerates or self._outside.is_idle:
                generators = get_torch_generators()
                try:
                    yield particle, Terms(*make(None))
                    continue
                except _NeedsWeights:
                    set_torch_generators(generators)
            starts: Any = queue.LifoQueue()
            for terms in self._outside.get_terms(partial(make, starts), starts):
                yield particle, terms

    def _get_trace_from(
        self, starts: Any, path: PathGradient, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        """
        :param starts: partial traces of the guide, of sites that are enumerated in a loop. None
            if no site has several values.
        """
        saved = [] if starts is None else list(starts.queue)
        may_repeat = starts is not None or self._projects(guide)
        generators = get_generators() if may_repeat else None

        def make(path: PathGradient, local: Optional[LocalDraws]) -> Optional[Tuple[Trace, Trace]]:
            run = self._make_run(path, guide, local, starts is not None)
            found = None
            try:
                with hint_at_shapes(run.hint):
                    found = self._run(run, starts, model, guide, args, kwargs)
            except TooManySummed as e:
                self._never_summed.update(e.reasons)
                return None
            except Exception:
                # A derivative of what was projected may be the cause.
                if not run.is_void:
                    raise
            if run.is_void:
                assert run.projection is not None
                self._plain.update(run.projection.violated)
                return None
            return found

        def rewind() -> None:
            set_generators(generators)
            if starts is not None:
                starts.queue[:] = saved

        def again(local: LocalDraws) -> Optional[Tuple[Trace, Trace]]:
            rewind()
            return make(PathGradient(self._obstacle()), local)

        while True:
            local = self._make_local(guide)
            found = make(path, local)
            left = [] if starts is None else list(starts.queue)
            if found is not None and self._rows.accepts(found, local, again):
                if starts is not None:
                    starts.queue[:] = left
                self._note(model, guide, *found)
                return found
            # Nothing of this run is kept. The next has the same noise, so that what the
            # run depends on, its branches and the use that made it void, stays the same.
            rewind()

    def _projects(self, guide: Any) -> bool:
        """Whether linear uses of Gaussian sites are watched."""
        is_on = "projection" in self._strategies and self.pre_activations is not None
        return is_on and not (self._is_paused or is_guide_messenger(guide))

    @property
    def _is_paused(self) -> bool:
        return self._makes_gradients and self._pause.is_on

    def _why_plain(self) -> str:
        """Why nothing is to be projected; empty if it is."""
        if not self._makes_gradients:
            return "no gradient"
        if self._is_over():
            return f"schedule (num_steps={self.num_steps})"
        return ""

    def _make_local(self, guide: Any) -> Optional[LocalDraws]:
        if not self._projects(guide) or self._why_plain() or self.pre_activations == "shared":
            return None
        return LocalDraws() if self.pre_activations == "local" else self._rows.draws()

    def _run(
        self, run: Run, starts: Any, model: Any, guide: Any, args: Tuple, kwargs: Dict
    ) -> Tuple[Trace, Trace]:
        enumerates, nesting = run.topk is not None, self.max_plate_nesting
        guide = run.guide(guide)
        if enumerates:
            guide = poutine.queue(
                guide, starts, escape_fn=iter_discrete_escape, extend_fn=iter_discrete_extend
            )
        pair = get_traces(run.model(model), guide, args, kwargs)
        is_light = run.is_inner and not enumerates
        if is_light and any(site["infer"].get("enumerate") for _, site in sample_sites(pair[0])):
            raise _NeedsWeights
        model_trace, guide_trace = prune(*pair, nesting)
        run.compute_densities(model_trace, guide_trace)
        run.has_weights = run.is_inner and needs_weights(model_trace, guide_trace)
        if is_light and run.has_weights:
            raise _NeedsWeights
        check_traces(model_trace, guide_trace, nesting, enumerates)
        if run.path is not None:
            run.path.raise_if_edited()
        guide_trace.run = run  # type: ignore[attr-defined]
        if run.has_weights:
            pack_traces(model_trace, guide_trace)
            set_apart(guide_trace, self._baselines, run.path_sites, run.joint)
        return model_trace, guide_trace

    def _note(self, model: Any, guide: Any, model_trace: Trace, guide_trace: Any) -> None:
        """
        For the next run, and for the report: of the last step, or of a loss before it, where
        nothing is projected.
        """
        run: Run = guide_trace.run
        if self._makes_gradients or (self._steps_done == 0 and run.projection is None):
            self._latest = run.summarize(guide_trace, self.otherwise, self._baselines)
        projection = run.projection
        if self._makes_gradients and (self._is_paused or (projection and projection.has_path)):
            modes = (getattr(fn, "training", None) for fn in (model, guide))
            structure = hash((*modes, *shapes(model_trace, guide_trace)))
            is_used = projection is not None and not all(
                map(projection.leaves_to_path, projection.sites.values())
            )
            self._pause.note(structure, projection is not None, is_used)

    @property
    def _baselines(self) -> Baselines:
        return Baselines(self.baseline, self.num_particles)

    def _enumerates(self, guide: Any) -> bool:
        """Whether discrete sites of the guide may have several values."""
        return "topk" in self._strategies and not is_guide_messenger(guide)

    def _make_run(
        self, path: PathGradient, guide: Any, local: Optional[LocalDraws], enumerates: bool
    ) -> Run:
        topk = projection = None
        first_available_dim = None
        if enumerates:
            first_available_dim = -1 - self.max_plate_nesting
            topk = TopK(
                self.options,
                self.baseline == "reinforce+",
                self.max_evaluations,
                self.draws,
                self._outside.reasons,
                self.baseline == "loo",
                self._never_summed,
                self._draws_bits,
            )
        if self._projects(guide):
            own_path = path if "path" in self._strategies and not path.obstacle else None
            options = ProjectionOptions(self.solver, local, own_path is not None)
            projection = Projection(options, self._plain, self._why_plain(), own_path)
        own: Optional[PathGradient] = path
        if "path" not in self._strategies:
            own = None
            if is_guide_messenger(guide):
                own = PathGradient("its guide runs the model inside of itself")
        is_inner = self._enumerates(guide)
        return Run(topk, projection, own, first_available_dim, is_inner, self._is_paused)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Within, runs are for gradients, if there are any."""
        self._makes_gradients = torch.is_grad_enabled()
        try:
            yield
        finally:
            self._makes_gradients = False
        self._steps_done += torch.is_grad_enabled()
