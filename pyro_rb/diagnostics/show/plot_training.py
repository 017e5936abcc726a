# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Variance along training, by :func:`draw_ratios`, and the loss, by :func:`draw_loss`."""

import math
from typing import Any, List, Tuple

from pyro_rb.diagnostics.compare.report import Comparison, LossResult
from pyro_rb.diagnostics.show.palette import (
    INK,
    Handles,
    Styles,
    dress,
    error_bars,
    is_measured,
)
from pyro_rb.diagnostics.show.plot_efficiency import SMALLEST


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
