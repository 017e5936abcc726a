# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What is drawn on the panels of a comparison: variance and time, parameters, and the course of training."""

import math
from typing import Any, Dict, List, Tuple

from pyro_rb.diagnostics.compare.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.show.palette import (
    INK,
    Handles,
    Styles,
    dress,
    error_bars,
    is_measured,
    literal,
)
from pyro_rb.diagnostics.show.words import short_names

#: So many parameters are shown, those with most of the reference's variance.
MOST = 12
SMALLEST_SHARE = 1e-8  # of the largest variance; less is drawn here
# Ratios below are drawn here: at an optimum they are rounding.
SMALLEST = 1e-4

Limits = Tuple[Tuple[float, float], Tuple[float, float]]


def draw_efficiency(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """
    Variance against time for a step, one panel a state. On each dashed line, variance x time is constant; the solid
    line is that of the reference, and losses below it are more efficient.
    """
    limits = _limits(comparison)
    for state, axes in zip(comparison.states, panels):
        _draw_state(axes, state, limits, styles, handles)
        if len(comparison.states) > 1:
            axes.set_title(state.when(), color=INK, fontsize=10)
    for axes in panels[1:]:  # the axis is that of the first
        axes.set_ylabel("")


def _limits(comparison: Comparison) -> Limits:
    """Those of both axes: the same in all panels, so that they can be compared."""
    points = [_point(r) for s in comparison.states for r in s.losses if is_measured(r)]
    x, y = zip(*points)
    # At least a factor of 2 and 10 around the reference, or noise would look like a result.
    return (
        (min(*x, 0.6) / 1.25, max(*x, 1.6) * 1.25),
        (min(*y, 0.3) / 2, max(*y, 3.0) * 2),
    )


def _point(result: LossResult) -> Tuple[float, float]:
    assert result.time_ratio is not None and result.variance_ratio is not None
    return result.time_ratio, max(result.variance_ratio, SMALLEST)


def _draw_state(
    axes: Any,
    state: StateResult,
    limits: Limits,
    styles: Styles,
    handles: Handles,
) -> None:
    (left, right), (bottom, top) = limits
    for exponent in range(math.floor(math.log10(bottom)) - 1, math.ceil(math.log10(top)) + 2):
        product = 10.0**exponent
        solid = exponent == 0
        lines = axes.plot(
            [left, right],
            [product / left, product / right],
            color=INK,
            alpha=0.8,
            zorder=1,
            lw=1.2 if solid else 0.7,
            ls="-" if solid else "--",
        )
        if solid:
            handles.setdefault("as efficient as the reference", lines[0])
    for result in state.losses:
        if not is_measured(result):
            continue
        x, y = _point(result)
        time_error = None if result.reference else error_bars([x], [result.time_ratio_error])
        error = None if result.reference else error_bars([y], [result.variance_ratio_error])
        line = axes.errorbar(
            x, y, xerr=time_error, yerr=error, linestyle="none", **styles.of(result)
        )
        handles.setdefault(styles.label(result), line[0])  # the marker without its bars
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for axis, low, high, candidates in (
        (axes.xaxis, left, right, (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)),
        (axes.yaxis, bottom, top, [10.0**exponent for exponent in range(-6, 10)]),
    ):
        ticks = [tick for tick in candidates if low <= tick <= high]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    dress(axes, "time per step / reference", "gradient variance / reference")


def parameters_height(comparison: Comparison) -> float:
    row = max(0.32, 0.08 * len(comparison.states[0].losses))
    return 1.4 + row * max(4, min(MOST + 1, len(comparison.parameters)))


def draw_parameters(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """The variance of each parameter's gradient, one panel a state; each loss has a marker on its line."""
    names = _shown(comparison)
    short = dict(zip(comparison.parameters, short_names(list(comparison.parameters))))
    rest = len(comparison.parameters) - len(names)
    labels = [literal(short[name]) for name in names] + ([f"{rest} others"] if rest else [])
    for state, axes in zip(comparison.states, panels):
        rows = [row for row in state.losses if is_measured(row)]
        largest = max(row.variance or 0.0 for row in rows) or 1.0
        for index, row in enumerate(rows):
            shares = [row.variance_shares.get(name, 0.0) for name in names]
            if rest:
                shares.append(max(0.0, sum(row.variance_shares.values()) - sum(shares)))
            values = [max(share * (row.variance or 0.0), SMALLEST_SHARE * largest) for share in shares]
            # Side by side, as they would hide one another.
            shift = 0.8 * ((index + 0.5) / len(rows) - 0.5)
            places = [place + shift for place in range(len(values))]
            (line,) = axes.plot(values, places, linestyle="none", **styles.of(row))
            handles.setdefault(styles.label(row), line)
        for place in range(len(labels)):
            axes.axhline(place, color=INK, alpha=0.25, lw=0.7, zorder=1)
        axes.set_xscale("log")
        # Names at the first panel are enough.
        axes.set_yticks(range(len(labels)), labels if axes is panels[0] else [""] * len(labels))
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(state.when() if len(comparison.states) > 1 else "", color=INK, fontsize=10)
        dress(axes, "variance of the gradient", "")


def _shown(comparison: Comparison) -> List[str]:
    total: Dict[str, float] = dict.fromkeys(comparison.parameters, 0.0)
    for state in comparison.states:
        for name, share in state.losses[0].variance_shares.items():
            total[name] += share
    ranked = sorted(total, key=lambda name: -total[name])
    shown = set(ranked if len(ranked) <= MOST + 1 else ranked[:MOST])
    return [name for name in total if name in shown]


def draw_ratios(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """Ratios to the reference: of the variance, and of variance times time."""
    for axes, label in zip(panels, ("gradient variance", "variance x time")):
        for points in _by_loss(comparison):
            row = points[0][1]
            steps = [step for step, _ in points]
            values = [max(r.variance_ratio or 0.0, SMALLEST) for _, r in points]
            errors = [r.variance_ratio_error for _, r in points]
            if label != "gradient variance":
                values = [max(r.cost_ratio or 0.0, SMALLEST) for _, r in points]
                errors = [_product_error(r) for _, r in points]
            bars = None if row.reference else error_bars(values, errors)
            style = styles.of(max((r for _, r in points), key=lambda r: bool(r.biased)))
            line = axes.errorbar(steps, values, yerr=bars, **style)
            handles.setdefault(styles.label(row), line[0])
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
        factors = (1, 2, 5) if top < 100 * bottom else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        shown = [tick for tick in ticks if bottom <= tick <= top]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axes.minorticks_off()
        dress(axes, "training steps", f"{label} / reference")


def draw_loss(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """
    The reference's loss along training, with a band of one standard deviation of a single
    value; and the mean loss of all losses at the states, with two standard errors.
    """
    (axes,) = panels
    windows = comparison.training
    middle = [window.step - (window.num_steps - 1) / 2 for window in windows]
    low = [w.mean - (w.deviation or 0.0) for w in windows]
    high = [w.mean + (w.deviation or 0.0) for w in windows]
    if windows:
        name = f"{comparison.states[0].losses[0].name} in training"
        handles[name] = axes.plot(middle, [w.mean for w in windows], color=INK, lw=1.2)[0]
        band = axes.fill_between(middle, low, high, color=INK, alpha=0.25, linewidth=0)
        handles["one standard deviation of a step"] = band
    num_losses = len(comparison.states[0].losses)
    last = max(comparison.states[-1].step, 1)
    values = []
    for index, points in enumerate(_by_loss(comparison)):
        # Side by side, as they would hide one another.
        shift = 0.012 * last * (index - (num_losses - 1) / 2)
        losses = [row.loss or 0.0 for _, row in points]
        values += losses
        line = axes.errorbar(
            [step + shift for step, _ in points],
            losses,
            yerr=[2 * (row.loss_error or 0.0) for _, row in points],
            linestyle="none",
            **styles.of(points[0][1]),
        )
        handles.setdefault(styles.label(points[0][1]), line[0])
    # What a few first steps lose would press the rest flat.
    tail = len(windows) // 10
    bottom, top = min(low[tail:] + values), max(high[tail:] + values)
    margin = 0.05 * (top - bottom) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    dress(axes, "training steps", "loss (negative ELBO, in nats)")


def draw_race(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """The loss against training time for each loss: the mean over seeds, and their range."""
    (axes,) = panels
    if comparison.race is None:
        raise ValueError('kind: "race" needs compare(..., train=True)')
    rows = {row.name: row for row in comparison.states[-1].losses}
    for curve in comparison.race.curves:
        if curve.losses and curve.error is None:
            columns = list(zip(*curve.losses))
            style = {**styles.of(rows[curve.name]), "markersize": 4}
            line = axes.plot(curve.seconds, [sum(c) / len(c) for c in columns], **style)[0]
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(curve.seconds, low, high, color=style["color"], alpha=0.25, linewidth=0)
            handles.setdefault(f"{styles.label(rows[curve.name])}, learning rate {curve.learning_rate:g}", line)
    dress(axes, "training time in seconds", "loss in nats")


def _by_loss(comparison: Comparison) -> List[List[Tuple[int, LossResult]]]:
    """The measured results of each loss along the states."""
    found = []
    for name in [row.name for row in comparison.states[0].losses]:
        points = [
            (state.step, row)
            for state in comparison.states
            for row in state.losses
            if row.name == name and is_measured(row)
        ]
        if points:
            found.append(points)
    return found


def _product_error(row: LossResult) -> float:
    assert row.variance_ratio is not None and row.time_ratio is not None
    variance = (row.variance_ratio_error or 0.0) * row.time_ratio
    time = (row.time_ratio_error or 0.0) * row.variance_ratio
    return (variance**2 + time**2) ** 0.5
