# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Variance against time for a step, one panel a state."""

import math
from typing import Any, Tuple

from pyro_rb.diagnostics.compare.report import Comparison, LossResult, StateResult
from pyro_rb.diagnostics.show.palette import (
    INK,
    Handles,
    Styles,
    dress,
    error_bars,
    is_measured,
)

# Ratios below are drawn here: at an optimum they are rounding.
SMALLEST = 1e-4

Limits = Tuple[Tuple[float, float], Tuple[float, float]]


def num_panels(comparison: Comparison) -> int:
    return len(comparison.states)


def draw(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """
    On each dashed line, variance x time is constant; the solid line is that of the
    reference, and losses below it are more efficient.
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
