# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Measures several losses side by side at one state of the parameters."""

import math
import operator
import signal
import threading
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import numpy as np

from pyro_rb.diagnostics.compare.measurement import (
    Draw,
    Gauge,
    find_signal,
    steps_ratios,
)
from pyro_rb.diagnostics.run.arguments import check_counts
from pyro_rb.diagnostics.run.bar import TimedBar
from pyro_rb.diagnostics.run.messages import WarningLog, one_line
from pyro_rb.diagnostics.run.sampler import draw_seeds

# Draws are gathered in about this many blocks; the spread of the blocks' variances gives
# the standard error of the variance.
NUM_BLOCKS = 20
# Where an error is asked for, it is looked at whenever there are so many times more draws.
GROWTH = 1.5
#: A loss is dropped if it needs so many times the time of the best, and is so many standard errors behind it, after
#: so many draws at least.
FAR_BEHIND, STANDARD_ERRORS = 2.0, 5.0
LEAST_BLOCKS, LEAST_DRAWS = 4, 60
#: The z-score of a bias that is no chance, however many coordinates there are.
PLAIN_BIAS = 10.0
#: How long to go on for a relative error at most, where nothing else is said.
DEFAULT_SECONDS = 600.0


class Plan(NamedTuple):
    """
    How long to sample at one state.

    :param int num_samples: Number of gradients of each loss; with ``rel_error``, the least.
    :param int num_burn_in: Number of gradients that are thrown away before.
    :param float rel_error: Relative standard error that each variance ratio is to reach.
    :param float deadline: When to stop at the latest, by :func:`time.perf_counter`.
    :param bool may_drop: Whether losses that are far behind are measured no further.
    """

    num_samples: int
    num_burn_in: int
    rel_error: Optional[float] = None
    deadline: Optional[float] = None
    may_drop: bool = False


class ReferenceFailed(Exception):
    """
    The reference cannot be measured any further.

    :param Exception cause: What it has raised.
    :param int seed: Of the random numbers with which it failed.
    """

    def __init__(self, cause: Exception, seed: int) -> None:
        super().__init__(one_line(cause))
        self.cause, self.seed = cause, seed


def measure(
    gauges: List[Gauge], plan: Plan, seed: int, bar: TimedBar, warned: WarningLog
) -> str:
    """
    Draws from all gauges in turn. One that fails is left out from there on; if it is the
    first, the reference, that is the end. What was drawn until then stays. One that is far
    behind is drawn from no more, see :func:`drop_hopeless`.

    :returns: Why it has ended, as in :class:`~pyro_rb.diagnostics.compare.report.StateResult`.
    :raises ReferenceFailed: If it has ended by that.
    """
    burn_in, draws = draw_seeds(seed, plan.num_samples, plan.num_burn_in)
    block_size = max(2, plan.num_samples // NUM_BLOCKS)
    start, turn, done = time.perf_counter(), 0, 0
    try:
        for number in burn_in:
            if plan.deadline is not None and 2 * time.perf_counter() > start + plan.deadline:
                break  # at most half of the time
            _draw_all(gauges, number, turn, warned)
            turn += 1
            bar.update("round")
        while True:
            for left, number in zip(range(len(draws) - 1, -1, -1), draws):
                late = plan.deadline is not None and time.perf_counter() > plan.deadline
                if late and done >= 2:
                    return "max_seconds"
                drawn = _draw_all(gauges, number, turn, warned)
                turn, done = turn + 1, done + 1
                with _no_interrupt():
                    _update(gauges, drawn)
                    # The last block is longer rather than short.
                    if gauges[0].block.count >= block_size <= left:
                        _end_blocks(gauges)
                        if plan.may_drop:
                            drop_hopeless(gauges)
                bar.update("round")
            with _no_interrupt():
                _end_blocks(gauges)
            if plan.rel_error is None:
                return "num_samples"
            if largest_error(gauges) <= plan.rel_error:
                return "rel_error"
            more = math.ceil((GROWTH - 1) * done)
            draws = draw_seeds(draws[-1], more)[1]
            bar.counts["round"] += more
    except KeyboardInterrupt:
        for gauge in gauges:
            gauge.sampler.clear()
        return "interrupted"
    finally:
        with _no_interrupt():
            _end_blocks(gauges)


def largest_error(gauges: List[Gauge]) -> float:
    """
    The largest relative standard error of the variance ratios to the first gauge's. A
    variance that is next to nothing beside the reference's need not be known well.
    """
    errors = [0.0]
    for gauge in gauges[1:]:
        if gauge.is_live:
            ratio, error = gauge.ratio_to(gauges[0])
            errors.append(0.0 if ratio == 0 or ratio + error < 1e-3 else error / ratio)
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def _draw_all(
    gauges: List[Gauge], seed: int, turn: int, warned: WarningLog
) -> Dict[str, Draw]:
    live = [gauge for gauge in gauges if gauge.is_live]
    first = turn % len(live)  # no loss always runs on another's warm cache
    drawn: Dict[str, Draw] = {}
    failed: Dict[str, Exception] = {}
    for gauge in live[first:] + live[:first]:
        try:
            drawn[gauge.name] = gauge.draw(seed)
        except Exception as error:
            gauge.sampler.clear()
            if gauge is gauges[0]:
                # What else has failed with it may have failed for the same reason.
                raise ReferenceFailed(error, seed) from error
            failed[gauge.name] = error
        warned.collect(gauge.name)
    for gauge in live:
        if gauge.name in failed:
            gauge.failure = one_line(failed[gauge.name])
    return drawn


def drop_hopeless(gauges: List[Gauge]) -> None:
    """
    Losses that are behind the best by :data:`FAR_BEHIND` in the number that decides, the time for the same precision,
    and by :data:`STANDARD_ERRORS` of its difference, are measured no further at this state. The reference is. What is
    plainly biased is not the best.
    """
    live = [gauge for gauge in gauges if gauge.is_live]
    if len(gauges[0].block_variances) < LEAST_BLOCKS or gauges[0].moments.count < LEAST_DRAWS:
        return
    sound = [gauge for gauge in live if gauge.verdict(gauges[0], PLAIN_BIAS).z < PLAIN_BIAS]
    ratios = steps_ratios(live, find_signal(sound))
    needed = {gauge: gauge.time_needed(gauges[0], *ratios[gauge.name]) for gauge in live}
    time, error = min(needed[gauge] for gauge in sound)
    for gauge, (other, other_error) in needed.items():
        far = max(FAR_BEHIND * time, time + STANDARD_ERRORS * math.hypot(error, other_error))
        if other > far and gauge is not gauges[0]:
            gauge.is_dropped = True


def _update(gauges: List[Gauge], drawn: Dict[str, Draw]) -> None:
    for gauge in gauges:
        if gauge.is_live:
            gauge.update(drawn[gauge.name], drawn[gauges[0].name])


def _end_blocks(gauges: List[Gauge]) -> None:
    for gauge in gauges:
        if gauge.is_live:
            gauge.end_block()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Puts Ctrl-C off until the end of the block, which must not be left half done."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    pending: List[Any] = []
    signal.signal(signal.SIGINT, lambda *received: pending.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if pending:
            usual(*pending[0])


def make_plan(
    num_samples: int, num_burn_in: int, rel_error: Optional[float], max_seconds: Optional[float]
) -> Plan:
    """:raises ValueError: If a number is out of range."""
    check_counts(num_samples, num_burn_in, 2)
    for name, value in (("rel_error", rel_error), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    if max_seconds is None and rel_error is not None:
        max_seconds = DEFAULT_SECONDS
    deadline = None if max_seconds is None else time.perf_counter() + max_seconds
    return Plan(num_samples, num_burn_in, rel_error, deadline)


def list_steps(train_steps: Union[int, Sequence[int]]) -> List[int]:
    """
    After how many training steps to measure.

    **Example**

    >>> list_steps(100), list_steps([10, 5])
    ([0, 50, 100], [5, 10])
    """
    given: Any = train_steps
    is_one = not isinstance(given, (Sequence, np.ndarray))
    try:
        listed = [operator.index(n) for n in ([given] if is_one else list(given))]
    except TypeError:
        listed = []
    if not listed or min(listed) < 0:
        raise ValueError(
            f"train_steps: expected an integer >= 0 or a list of such, got {train_steps!r}"
        )
    return sorted({0, listed[0] // 2, listed[0]} if is_one else set(listed))
