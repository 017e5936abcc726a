# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What all figures share: colors and markers that suit light and dark pages."""

import math
from typing import Any, Dict, List, Optional, Sequence

from pyro_rb.diagnostics.compare.report import Comparison, LossResult

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
Handles = Dict[str, Any]


class Styles:
    """The color and marker of each loss, the same in all panels. Biased losses are hollow."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        rows = [r for c in comparisons for s in c.states for r in s.losses]
        names = dict.fromkeys(row.name for row in rows)
        self._styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}

    def of(self, result: LossResult) -> Dict[str, Any]:
        """Arguments of ``errorbar`` and ``plot``."""
        color, marker = self._styles[result.name]
        face = "none" if result.biased else color
        size = 11 if marker == "*" else 8
        return dict(color=color, marker=marker, markersize=size, markerfacecolor=face, zorder=3)

    def label(self, result: LossResult) -> str:
        """For the legend."""
        return literal(result.name) + (" (biased)" if result.biased else "")


def figure_style() -> Dict[str, Any]:
    """
    Settings that make your own figures look like these, on light and on dark pages: a transparent
    background, and ink and colors of a middle tone.

    :returns: What :func:`matplotlib.rc_context` takes.
    :rtype: dict

    **Example**

    >>> import matplotlib.pyplot as plt
    >>> with plt.rc_context(figure_style()):
    ...     figure, axes = plt.subplots()
    >>> axes.xaxis.label.get_color()
    '#7d7d7d'
    >>> plt.close(figure)
    """
    from matplotlib.rcsetup import cycler

    inks = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color", "grid.color")
    return {
        **{name: INK for name in inks},
        "axes.prop_cycle": cycler(color=[color for color, _ in STYLES[1:]]),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }


def literal(text: str) -> str:
    """As matplotlib has to be given it to draw just that: no formulas, nothing it cannot encode."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # which it would leave out of legends


def dress(axes: Any, x_label: str, y_label: str) -> None:
    """Labels, transparent background, and the ink that suits any page."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.patch.set_alpha(0.0)
    axes.tick_params(which="both", colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def error_bars(values: Sequence[float], errors: Sequence[Optional[float]]) -> List[List[float]]:
    """Two standard errors, but on a logarithmic axis none that reaches zero."""
    bars = [0.0 if e is None or not math.isfinite(e) else 2 * e for e in errors]
    return [[min(bar, 0.9 * abs(value)) for bar, value in zip(bars, values)], bars]


def is_measured(result: LossResult) -> bool:
    """Whether it has a finite variance and time."""
    values = (result.time_ratio, result.variance_ratio)
    return all(value is not None and math.isfinite(value) for value in values)
