# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a step takes when it is compiled, and whether that pays: :func:`time_compiled`, :func:`with_compiled`."""

import copy
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple

from pyro.infer import SVI
from pyro.optim import PyroOptim

from pyro_rb.compiled.elbo import compile
from pyro_rb.compiled.svi import CompiledSVI
from pyro_rb.diagnostics.compare.recommend import (
    BAD_START,
    WORTHWHILE,
    Recommendation,
    ranked_by_time,
    recommend,
)
from pyro_rb.diagnostics.run.arguments import current_args
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.losses import usage
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.problem import Problem
from pyro_rb.diagnostics.run.sampler import choose_clock
from pyro_rb.diagnostics.run.sites import settle_plates

#: For how many steps a compilation is to pay, where nothing is said.
USUAL_STEPS = 10_000
#: So many losses are compiled, of those that need less than so many times the time of the loss recommended.
MOST_COMPILED, CLOSE = 2, 2.0
#: A graph that takes more than this share of the time of a step when it is replayed is not handed to Inductor:
#: then the operations take the time, and not Python.
WORTH_COMPILING = 0.85
#: Nor one whose steps take less than this when they are replayed, all together: Inductor takes about as long itself.
LEAST_SECONDS = 30.0
#: Steps before the times are taken: an adaptive loss learns at each of the first 50. Fewer if they take too long.
WARM_UP, LEAST_WARM_UP, WARM_UP_SECONDS = 70, 6, 10.0
#: Steps that are timed, at most, and the seconds for them.
NUM_TIMED, MOST_SECONDS = 60, 3.0


@dataclass
class CompiledTime:
    """
    A loss under :class:`~pyro_rb.compiled.svi.CompiledSVI`.

    :param str name: The loss.
    :param str backend: ``"inductor"`` or ``"replay"``.
    :param float eager_seconds: Median time of a step of :class:`~pyro.infer.svi.SVI`.
    :param float seconds: Median time of a step of ``CompiledSVI``.
    :param float setup_seconds: The time until the compiled step is ready, once per script.
    :param float replay_seconds: Time of a step that is replayed while Inductor compiles.
    :param float capture_seconds: The time until replayed steps are ready, with Inductor.
    :param str error: Why the step is not compiled, if so; the times are then those of eager steps.
    """

    name: str
    backend: str
    eager_seconds: float = math.nan
    seconds: float = math.nan
    setup_seconds: float = 0.0
    replay_seconds: Optional[float] = None
    capture_seconds: float = 0.0
    error: Optional[str] = None

    def share(self, num_steps: int) -> float:
        """
        The time of this many steps, including the compilation, over that of eager steps. Steps do not wait for
        Inductor, but are replayed meanwhile.

        **Example**

        >>> one = CompiledTime("Trace_ELBO", "inductor", 4e-3, 2e-4, 11.0, replay_seconds=2e-3, capture_seconds=1.0)
        >>> one.share(1000), one.share(5000), one.share(10000)
        (0.75, 0.55, 0.3)
        """
        if self.error is not None:
            return 1.0
        total = self.setup_seconds + num_steps * self.seconds
        if self.replay_seconds is not None:
            meanwhile = (self.setup_seconds - self.capture_seconds) / self.replay_seconds
            replayed = self.capture_seconds + num_steps * self.replay_seconds
            total = min(replayed, total - meanwhile * self.seconds)
        return round(total / (num_steps * self.eager_seconds), 12)

    @property
    def pays_from(self) -> Optional[int]:
        """
        The number of steps from which compiling pays; None if it never does.

        **Example**

        >>> CompiledTime("Trace_ELBO", "replay", 4e-3, 2e-3, 1.0).pays_from
        500
        """
        times = [(self.setup_seconds, self.seconds)]
        if self.replay_seconds is not None:
            times.append((self.capture_seconds, self.replay_seconds))
        saved = [(setup, self.eager_seconds - seconds) for setup, seconds in times]
        steps = [math.ceil(setup / less) for setup, less in saved if less > 0]
        return min(steps) if steps and self.error is None else None


def time_best(
    problem: Problem,
    states: Sequence[Any],
    made: Mapping[str, Any],
    optim: PyroOptim,
    times: List[CompiledTime],
    bar: TimedBar,
    num_steps: int,
) -> None:
    """
    Times the loss that is recommended, if one is, and the best of the others if it is close; unless time is over.

    :param list states: A :class:`~pyro_rb.diagnostics.compare.report.StateResult` for each state.
    :param dict made: Losses by name.
    :param list times: To which the times are added.
    :param int num_steps: That are intended.
    """
    if any(state.stopped == "max_seconds" for state in states):
        return
    advice = recommend(states)
    ranked = {one.name: one for one in advice.ranking}
    if advice.loss is not None:
        most = CLOSE * ranked[advice.loss].time
        starts = [one.name for one in advice.ranking if one.time < most and one.by_state[0] <= BAD_START]
        others = [name for name in starts if name != advice.loss]
        bar.start()
        for name in [advice.loss, *others][:MOST_COMPILED]:
            times += time_compiled(problem, name, made[name], optim, num_steps)
            bar.update("compilation")


def _is_worth_compiling(replayed: CompiledTime, num_steps: float) -> bool:
    is_python = replayed.seconds <= WORTH_COMPILING * replayed.eager_seconds
    return is_python and num_steps * replayed.seconds >= LEAST_SECONDS


def time_compiled(
    problem: Problem, name: str, loss: Any, optim: PyroOptim, num_steps: float = math.inf
) -> List[CompiledTime]:
    """
    Times whole steps, with the update of the parameters, eager and compiled in turns. The graph is replayed first;
    Inductor comes after it if that shows that Python takes the time, and if it can pay within ``num_steps``.

    :param Problem problem: Model and guide, whose parameters are trained by this.
    :param str name: The loss.
    :param loss: An ELBO. It is copied.
    :param optim: An optimizer. It is copied.
    """
    found: List[CompiledTime] = []
    for backend in ("replay", "inductor"):
        if found and (found[0].error or not _is_worth_compiling(found[0], num_steps)):
            break
        one = CompiledTime(name, backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _time(one, problem, loss, optim)
        except Exception as error:
            one.error = one_line(error)
        if found and one.error is None:
            one.replay_seconds, one.capture_seconds = found[0].seconds, found[0].setup_seconds
            one.setup_seconds = max(one.setup_seconds, one.capture_seconds)
        found.append(one)
    return found


def _time(one: CompiledTime, problem: Problem, loss: Any, optim: PyroOptim) -> None:
    if not problem.any_site:
        one.error = "neither model nor guide has a pyro.param site, without which SVI trains nothing"
        return
    svis = [_svi(SVI, problem, loss, optim), _svi(CompiledSVI, problem, loss, optim, one.backend)]
    steps = [_timed(svi, problem) for svi in svis]
    clock = time.perf_counter
    steps[0](clock)
    eager = steps[0](clock)
    program = svis[1].compiled.program(problem.model, problem.guide)
    warm: List[float] = []
    while len(warm) < min(WARM_UP, max(LEAST_WARM_UP, int(WARM_UP_SECONDS / eager))):
        warm.append(steps[1](clock))
        if program.reason:
            one.error = program.reason
            return
    if not any(graph.is_compiled or one.backend == "replay" for graph in program.graphs):
        one.error = f"nothing was compiled in {len(warm)} steps"
        return
    clock = choose_clock(problem.parameters.values())
    end = time.perf_counter() + MOST_SECONDS
    times: List[Tuple[float, float]] = []
    while len(times) < NUM_TIMED and (len(times) < 3 or time.perf_counter() < end):
        times.append((steps[0](clock), steps[1](clock)))
    one.eager_seconds, one.seconds = map(statistics.median, zip(*times))
    one.setup_seconds = max(0.0, sum(warm) - len(warm) * one.seconds)


def _svi(cls: Any, problem: Problem, loss: Any, optim: PyroOptim, backend: str = "") -> Any:
    loss, optim = copy.deepcopy(loss), PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
    settle_plates(loss, problem.sites)
    return cls(problem.model, problem.guide, optim, compile(loss, backend, background=False) if backend else loss)


def _timed(svi: Any, problem: Problem) -> Callable[[Callable[[], float]], float]:
    def step(clock: Callable[[], float]) -> float:
        start = clock()
        svi.step(*current_args(problem.args), **problem.kwargs)
        return clock() - start

    return step


def with_compiled(advice: Recommendation, times: Sequence[CompiledTime], num_steps: int) -> Recommendation:
    """
    Adds compiled losses to a ranking, and to the advice what they save.

    :param Recommendation advice: By noise and by the time of eager steps. It is changed.
    :param list times: Of the loss that is recommended, and maybe of others.
    :param int num_steps: How many steps the user intends.
    """
    eager = {ranked.name: ranked for ranked in advice.ranking}
    options = []
    for one in times:
        base = eager.get(one.name)
        if base is not None and one.error is None:
            label = f"{one.name}, {'compiled' if one.backend == 'inductor' else 'replayed'}"
            options.append((one, base.scaled(label, one.share(num_steps))))
    if not options or advice.loss is None:
        return advice
    advice.ranking = ranked_by_time([*advice.ranking, *(ranked for _, ranked in options)])
    usual = [pair for pair in options if pair[0].name == advice.loss]
    # Where the steps are over before Inductor is, both take the same time, and the default is the simpler.
    best, ranked = min(usual or options, key=lambda pair: (pair[1].time, pair[0].backend))
    for one, other in options:
        if other.time < (1 - WORTHWHILE) * ranked.time:
            best, ranked = one, other
    if ranked.time > (1 - WORTHWHILE) * eager[advice.loss].time:
        pays = min([one.pays_from for one, _ in options if one.pays_from is not None], default=None)
        if pays is not None and best.seconds < (1 - WORTHWHILE) * best.eager_seconds:
            advice.caveats.append(f"Compiled steps pay from {pays} steps, more than the {num_steps} that are intended.")
        return advice
    if best.name != advice.loss:
        advice.sentence += f" Compiled, {best.name} is ahead of it."
        advice.loss = best.name
    advice.usage = usage(best.name, best.backend)
    advice.caveats.insert(0, _sentence(best, num_steps))
    return advice


def _sentence(one: CompiledTime, num_steps: int) -> str:
    how, until = "", f"{one.setup_seconds:.{0 if one.setup_seconds >= 10 else 1}f} s of compilation"
    if one.backend == "replay":
        how = ", where the graph is replayed without a compiler,"
    if one.replay_seconds is not None:
        until += f", until which it takes {1e3 * one.replay_seconds:.2g} ms"
    return (
        f"With CompiledSVI{how} a step takes {1e3 * one.seconds:.2g} ms in place of {1e3 * one.eager_seconds:.2g} ms, "
        f"after {until}: {one.share(num_steps):.2g} of the time for {num_steps} steps, and it pays from step "
        f"{one.pays_from} on."
    )
