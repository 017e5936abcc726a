# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The variance of each parameter's gradient, one panel a state."""

from typing import Any, Dict, List

from pyro_rb.diagnostics.compare.report import Comparison
from pyro_rb.diagnostics.show.palette import (
    INK,
    Handles,
    Styles,
    dress,
    is_measured,
    literal,
)
from pyro_rb.diagnostics.show.table import short_names

#: So many parameters are shown, those with most of the reference's variance.
MOST = 12
SMALLEST = 1e-8  # of the largest variance; less is drawn here


def num_panels(comparison: Comparison) -> int:
    return len(comparison.states)


def height(comparison: Comparison) -> float:
    row = max(0.32, 0.08 * len(comparison.states[0].losses))
    return 1.4 + row * max(4, min(MOST + 1, len(comparison.parameters)))


def draw(panels: Any, comparison: Comparison, styles: Styles, handles: Handles) -> None:
    """Each loss has a marker on the line of each parameter."""
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
            values = [max(share * (row.variance or 0.0), SMALLEST * largest) for share in shares]
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
