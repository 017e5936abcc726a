# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""A comparison as text: tables, and sentences about what they show."""

import math
from typing import Dict, Iterator, List, Sequence, Tuple

from pyro_rb.diagnostics.compare.compiled import CompiledTime
from pyro_rb.diagnostics.compare.guides import GuideComparison
from pyro_rb.diagnostics.compare.race import Race
from pyro_rb.diagnostics.compare.recommend import LOW_POWER
from pyro_rb.diagnostics.compare.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.run.messages import counted, number, percent, with_error
from pyro_rb.diagnostics.show.words import (
    fitted,
    left_then_right,
    shares,
    wrapped,
)
from pyro_rb.diagnostics.stats.summary import HEAVY_TAIL


def table(comparison: Comparison) -> str:
    """The printed form of a comparison, without the legend."""
    lines = [comparison.title]
    for text in outline(comparison):
        lines += wrapped(text)
    for state in comparison.states:
        lines += ["", *_state_lines(state, heading(comparison, state))]
    headers, rows = ranking(comparison)
    if len(rows) > 1:
        title = "Ranking: training time for the same precision, over that of the reference"
        lines += ["", *wrapped(title), "", fitted(rows, headers, left_then_right(headers))]
    lines += ["", *wrapped(comparison.recommendation.sentence)]
    if comparison.recommendation.usage:
        lines.append(f"  {comparison.recommendation.usage}")
    for text in comparison.recommendation.caveats:
        lines += wrapped(text)
    for sentence, headers, rows in trained(comparison):
        lines += ["", *wrapped(sentence)]
        lines += ["", fitted(rows, headers, left_then_right(headers))] if rows else []
    if comparison.left_out or comparison.notes:
        lines.append("")
    lines += wrapped(left_out(comparison))
    for text in comparison.notes:
        lines += wrapped(f"Note: {text}")
    return "\n".join(lines)


def text(comparison: Comparison) -> str:
    """The printed form, with the legend."""
    return f"{table(comparison)}\n\n{LEGEND}"


def trained(comparison: Comparison) -> Iterator[Tuple[str, List[str], List[List[str]]]]:
    """What was tried out beside the gradients, if it was: a sentence, headers and rows of each."""
    if comparison.compiled:
        sentence = "Whole steps, with the update of the parameters: of SVI, and of CompiledSVI."
        for one in comparison.compiled:
            if one.error is not None:
                sentence += f" {one.name} is not compiled: {one.error.rstrip('.')}."
        yield sentence, *_compiled_rows(comparison.compiled)
    if comparison.race is not None:
        yield str(comparison.race), *_race_rows(comparison.race)
    if comparison.guides is not None:
        yield str(comparison.guides), *_guide_rows(comparison.guides)


def _compiled_rows(times: Sequence[CompiledTime]) -> Tuple[List[str], List[List[str]]]:
    rows = []
    for one in times:
        if one.error is None:
            ms = [f"{1e3 * seconds:.3g}" for seconds in (one.eager_seconds, one.seconds)]
            pays = "never" if one.pays_from is None else f"{one.pays_from} steps"
            faster = f"{one.eager_seconds / one.seconds:.1f}"
            rows.append([one.name, one.backend, *ms, faster, f"{number(one.setup_seconds)} s", pays])
    return ["loss", "backend", "eager, ms", "compiled, ms", "times as fast", "compilation", "pays from"], rows


def _guide_rows(found: GuideComparison) -> Tuple[List[str], List[List[str]]]:
    rows = []
    for guide in found.guides:
        khat = "-" if guide.khat is None else f"{guide.khat:.2f}"
        cells = [with_error(guide.elbo, guide.elbo_error), khat, str(guide.num_values)]
        cells += [f"{guide.learning_rate:g}", str(guide.steps)]
        rows.append([guide.name, *(["-"] * len(cells) if guide.error else cells)])
    return ["guide", "ELBO, nats", "k-hat", "parameter values", "learning rate", "steps"], rows


def _race_rows(race: Race) -> Tuple[List[str], List[List[str]]]:
    """Headers and rows: the loss along training, the mean over seeds."""
    points = sorted({0, len(race.curves[0].seconds) // 2, len(race.curves[0].seconds) - 1} - {-1})
    headers = ["loss", "learning rate", "steps"]
    headers += [f"nats after {race.curves[0].seconds[point]:.3g} s" for point in points]
    rows = []
    for curve in race.curves:
        columns = list(zip(*curve.losses))
        means = [f"{sum(columns[point]) / len(columns[point]):.6g}" for point in points if columns]
        steps = f"{curve.steps[-1]:.0f}" if curve.steps else "-"
        rows.append([curve.name, f"{curve.learning_rate:g}", steps, *(means or ["failed"] * len(points))])
    return headers, rows


def outline(comparison: Comparison) -> List[str]:
    """How it was measured, a line each."""
    settings = comparison.settings
    size = sum(math.prod(shape) for shape in comparison.parameters.values())
    counts = sorted({state.num_samples for state in comparison.states})
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if any(map(_has_dropped, comparison.states)):
        count = f"up to {counts[-1]}"
    lines = [
        f"{counted(size, 'parameter value')}, {count} gradients of each loss, "
        f"seed {settings['seed']}, device {settings['device']}",
        f"biased means |z| > {settings['bias_threshold']:.1f} against "
        f"{settings['reference_gradient']}",
    ]
    if comparison.states[-1].step:
        reference = comparison.states[0].losses[0].name
        lines.append(f"trained with {reference} and {settings['optim']}")
    if comparison.interrupted:
        lines.append("Interrupted: not all that was asked for was measured.")
    if comparison.error:
        lines.append(f"Ended early, by an error: {comparison.error}")
    return lines


def heading(comparison: Comparison, state: StateResult) -> str:
    """Which state it is, and how the measurement ended if not as planned."""
    when = state.when()
    if len(comparison.states) == 1 and not state.step:
        when = "at the parameters as they are"
    stopped = {
        "max_seconds": f", time over after {state.num_samples} gradients",
        "interrupted": f", interrupted after {state.num_samples} gradients",
        "failed": f", failed after {state.num_samples} gradients",
        "rel_error": f", as exact as asked for after {state.num_samples} gradients",
    }
    return when[0].upper() + when[1:] + stopped.get(state.stopped, "")


def left_out(comparison: Comparison) -> str:
    """Losses that were not tried, by the reason."""
    by_reason: Dict[str, List[str]] = {}
    for name, reason in comparison.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return f"Not tried: {'; '.join(parts)}." if parts else ""


LEGEND = """\
draws            gradients that were measured, if losses differ in it; those far behind have fewer.
variance         of the gradient, summed over all parameters; over that of the reference, with its
                 standard error.
time             of one step, over that of the reference.
variance x time  the time to estimate the gradient as well; below 1 is better. The ranking counts each
                 coordinate in units of its own gradient, as Adam does, and may differ from it where
                 few parameters have most of the variance.
|z|              largest difference of the mean gradient from the reference's, in standard errors.
                 !  so large that the loss is biased, or has another objective.
bias seen from   the smallest bias in one coordinate that would have been seen, in % of the size of
                 the reference's gradient; more draws lower it.  ?  only a large one.
                 -  too few draws make up the spread to tell.
memory           peak of what a step allocates, over that of the reference.
most variance in  the parameters with most of it."""

HEADERS = ["loss", "variance", "time", "variance x time", "|z|", "bias seen from", "memory", "most variance in"]


def ranking(comparison: Comparison) -> Tuple[List[str], List[List[str]]]:
    """Headers and rows: the time for the same precision, and the difference to the best."""
    headers = ["loss", "time needed", "behind the best"]
    states = comparison.states if len(comparison.states) > 1 else []
    headers += [f"at step {state.step}" for state in states]
    rows = []
    for one in comparison.recommendation.ranking:
        difference = with_error(one.difference, one.difference_error) if one.difference else ""
        times = [number(time) for time in one.by_state] if states else []
        rows.append([one.name, with_error(one.time, one.error or None), difference, *times])
    return headers, rows


def _state_lines(state: StateResult, title: str) -> List[str]:
    headers, rows = state_cells(state)
    align = [*left_then_right(headers[:-1]), "left"]
    lines = [*wrapped(f"{title}: {summary(state)}"), "", fitted(rows, headers, align), ""]
    for remark in remarks(state):
        lines += wrapped(remark)
    return lines


def summary(state: StateResult) -> str:
    """The reference in a few words."""
    reference = state.losses[0]
    assert reference.seconds is not None and reference.loss is not None
    return (
        f"loss {reference.loss:.4g} +/- {reference.loss_error:.2g} nats, {1e3 * reference.seconds:.3g} ms a step "
        f"with {reference.name}; noise makes up {percent(state.noise_share)} of the mean square of its gradient"
    )


def remarks(state: StateResult) -> List[str]:
    """What is to be said about a state, in sentences."""
    found = []
    for result in state.losses:
        if result.error:
            found.append(f"{result.name} could not be measured: {result.error}")
        elif result.biased:
            found.append(
                f"{result.name} is biased, or has another objective: its mean gradient differs "
                f"at {result.bias_at} by {percent(result.bias_size)} of the gradient's size."
            )
    bad = [f"{r.bad_losses} times with {r.name}" for r in state.losses if r.bad_losses]
    if bad:
        found.append(
            f"In {state.num_samples} draws the loss was not finite {', '.join(bad)}, though the "
            "gradient was."
        )
    heavy = [
        f"{percent(result.tail_share)} of that of {result.name}"
        for result in state.losses
        if (result.tail_share or 0) > HEAVY_TAIL
    ]
    if heavy:
        found.append(
            "Rare large gradients dominate the variance: the largest 1% make up "
            f"{', '.join(heavy)}. It is less certain than the standard error says; take more draws."
        )
    fit = [r for r in state.losses if r.cost_ratio is not None and not r.biased]
    if fit:
        best = min(fit, key=lambda r: r.cost_ratio or 0.0)
        found.append(f"Best variance x time: {best.name}, {number(best.cost_ratio)}.")
    return found


def state_cells(state: StateResult) -> Tuple[List[str], List[List[str]]]:
    """Headers and rows of a state; with the number of draws, if they differ."""
    headers, rows = list(HEADERS), [_row_cells(result) for result in state.losses]
    if _has_dropped(state):
        headers.insert(1, "draws")
        for row, result in zip(rows, state.losses):
            row.insert(1, str(result.num_samples or "-"))
    return headers, rows


def _has_dropped(state: StateResult) -> bool:
    return any(r.num_samples is not None and r.num_samples < state.num_samples for r in state.losses)


def _row_cells(result: LossResult) -> List[str]:
    """The cells of one loss, in the order of ``HEADERS``."""
    if result.error:
        return [result.name, "not measured", *["-"] * 5, ""]
    bias, seen = "reference", ""
    if result.bias_z is not None:
        low_power = (result.detectable_bias or 0) > LOW_POWER
        mark = "!" if result.biased else "?" if low_power else " "
        large = result.bias_z >= 1000
        bias = f"{'>999' if large else f'{result.bias_z:.1f}'} {mark}"
        seen = percent(result.detectable_bias)
    return [
        result.name,
        with_error(result.variance_ratio, None if result.reference else result.variance_ratio_error),
        with_error(result.time_ratio, None if result.reference else result.time_ratio_error),
        number(result.cost_ratio),
        bias,
        seen,
        number(result.memory_ratio),
        shares(result.variance_shares),
    ]
