# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of comparisons. matplotlib is imported when the first figure is drawn."""

import math
import os
from typing import Any, Dict, Optional, Sequence, Tuple

from pyro_rb.diagnostics.report import Comparison, LossResult, StateResult

# Middle tones that stand out on white and on black, told apart by shape as well.
INK = "#7d7d7d"
STYLES = (
    (INK, "o"),
    ("#3d8fd6", "s"),
    ("#e07b1a", "D"),
    ("#2ba37a", "^"),
    ("#c45ab3", "v"),
    ("#c9a20a", "P"),
    ("#e2574c", "X"),
    ("#7d78e8", "*"),
)
# Ratios below are drawn here: at an optimum they are rounding.
SMALLEST = 1e-4


def require_matplotlib() -> None:
    """
    :raises ImportError: If matplotlib is missing, naming the extra that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib, which is not installed: pip install "pyro_rb[plot]"'
        ) from error


def check_plot_path(path: str) -> None:
    """
    :raises ImportError: If matplotlib is missing.
    :raises ValueError: If matplotlib cannot write files with this extension.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    extension = os.path.splitext(path)[1].lstrip(".").lower()
    if extension not in known:
        raise ValueError(
            f"cannot plot to {path!r}: the extension is {extension!r}, "
            f"expected one of {', '.join(sorted(known))}"
        )


def plot_comparisons(comparisons: Sequence[Comparison], path: Optional[str] = None) -> Any:
    """
    Draws the variance ratio against the time ratio: one row of panels a comparison, one
    panel a state. On each dashed line, variance x time is constant; the solid line is that
    of the reference, and losses below it are more efficient. Biased losses are hollow; bars
    are two standard errors.

    The background is transparent and the colours suit light and dark pages.

    :param list comparisons: Results of :func:`~pyro_rb.diagnostics.compare.compare`.
    :param str path: Where to save the figure, by extension. Default: nowhere.
    :returns: A :class:`matplotlib.figure.Figure`.
    :raises ImportError: If matplotlib is missing.
    """
    require_matplotlib()
    if path is not None:
        check_plot_path(path)
    from matplotlib.figure import Figure

    num_columns = max(len(comparison.states) for comparison in comparisons)
    width = max(4.6 * num_columns, 6.0)
    figure = Figure(layout="constrained")
    figure.patch.set_alpha(0.0)
    names = list(
        dict.fromkeys(r.name for c in comparisons for s in c.states for r in s.losses)
    )
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    handles: Dict[str, Any] = {}
    rows = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for comparison, row in zip(comparisons, rows):
        row.patch.set_alpha(0.0)
        row.suptitle(comparison.title, color=INK, fontsize=11)
        panels = row.subplots(1, num_columns, squeeze=False)[0]
        limits = _limits(comparison)
        for state, axes in zip(comparison.states, panels):
            _draw_state(axes, state, limits, styles, handles)
            if len(comparison.states) > 1:
                when = f"after {state.step} training steps" if state.step else "before training"
                axes.set_title(when, color=INK, fontsize=10)
        for axes in panels[len(comparison.states) :]:
            axes.set_axis_off()
    # About a tenth of an inch a letter, and room for the marker.
    legend_columns = max(1, int(width / (0.6 + 0.09 * max(map(len, handles)))))
    legend_rows = math.ceil(len(handles) / legend_columns)
    figure.set_size_inches(width, 3.9 * len(comparisons) + 0.25 * legend_rows)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        labelcolor=INK,
    )
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


Limits = Tuple[Tuple[float, float], Tuple[float, float]]


def _limits(comparison: Comparison) -> Limits:
    """Those of both axes: the same in all panels, so that they can be compared."""
    points = [_point(r) for s in comparison.states for r in s.losses if _drawn(r)]
    x, y = zip(*points)
    # At least a factor of 2 and 10 around the reference, or noise would look like a result.
    return (
        (min(*x, 0.6) / 1.25, max(*x, 1.6) * 1.25),
        (min(*y, 0.3) / 2, max(*y, 3.0) * 2),
    )


def _drawn(result: LossResult) -> bool:
    values = (result.time_ratio, result.variance_ratio)
    return all(value is not None and math.isfinite(value) for value in values)


def _point(result: LossResult) -> Tuple[float, float]:
    assert result.time_ratio is not None and result.variance_ratio is not None
    return result.time_ratio, max(result.variance_ratio, SMALLEST)


def _draw_state(
    axes: Any,
    state: StateResult,
    limits: Limits,
    styles: Dict[str, Tuple[str, str]],
    handles: Dict[str, Any],
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
        if not _drawn(result):
            continue
        color, marker = styles[result.name]
        x, y = _point(result)
        errors = (result.time_ratio_error, result.variance_ratio_error)
        bars = [0.0 if e is None or not math.isfinite(e) else 2 * e for e in errors]
        handle = axes.errorbar(
            x,
            y,
            xerr=None if result.reference else [[min(bars[0], 0.9 * x)], [bars[0]]],
            yerr=None if result.reference else [[min(bars[1], 0.9 * y)], [bars[1]]],
            color=color,
            marker=marker,
            markersize=8,
            markerfacecolor="none" if result.biased else color,
            linestyle="none",
            zorder=3,
        )
        name = result.name + (" (biased)" if result.biased else "")
        handles.setdefault(name, handle[0])  # the marker without its bars
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for axis, low, high, candidates in (
        (axes.xaxis, left, right, (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)),
        (axes.yaxis, bottom, top, [10.0**exponent for exponent in range(-6, 10)]),
    ):
        ticks = [tick for tick in candidates if low <= tick <= high]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time per step / reference", color=INK)
    axes.set_ylabel("gradient variance / reference", color=INK)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
