# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of comparisons. matplotlib is imported when the first figure is drawn."""

import math
import os
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence

from pyro_rb.diagnostics.compare.report import Comparison
from pyro_rb.diagnostics.show import views
from pyro_rb.diagnostics.show.palette import INK, Handles, Styles, literal


class Kind(NamedTuple):
    """
    :param callable draw: Draws on the panels of one comparison.
    :param callable num_panels: How many it needs. Default: one a state.
    :param callable height: Of a panel, in inches.
    """

    draw: Callable
    num_panels: Callable[[Comparison], int] = lambda comparison: len(comparison.states)
    height: Callable[[Comparison], float] = lambda _: 3.4


KINDS: Dict[str, Kind] = {
    "efficiency": Kind(views.draw_efficiency),
    "parameters": Kind(views.draw_parameters, height=views.parameters_height),
    "training": Kind(views.draw_ratios, lambda _: 2),
    "elbo": Kind(views.draw_loss, lambda _: 1),
    "race": Kind(views.draw_race, lambda _: 1),
}


def require_matplotlib() -> None:
    """
    :raises ImportError: If matplotlib is missing, naming the extra that installs it.

    **Example**

    >>> require_matplotlib()  # it is there
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

    **Example**

    >>> check_plot_path("figure.text")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cannot plot to 'figure.text': the extension is 'text', expected one of ...
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


def plot_comparisons(
    comparisons: Sequence[Comparison], path: Optional[str] = None, kind: str = "efficiency"
) -> Any:
    """
    Draws a row of panels for each comparison. Biased losses have hollow markers; error bars are two
    standard errors. The background is transparent, and the colors suit light and dark pages.

    :param list comparisons: Results of :func:`~pyro_rb.diagnostics.compare.compare.compare`.
    :param str path: Where to save the figure, by extension. Default: nowhere.
    :param str kind: What to draw, see :meth:`~pyro_rb.diagnostics.compare.report.Comparison.plot`.
    :returns: A :class:`matplotlib.figure.Figure`.
    :raises ImportError: If matplotlib is missing.
    :raises ValueError: If there is no such kind.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_rb import compare
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.))
    >>> result = compare(model, guide, "STLTrace_ELBO", train_steps=0, num_samples=40, progress=False)
    >>> figure = plot_comparisons([result])
    >>> len(figure.axes)
    1
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    require_matplotlib()
    if path is not None:
        check_plot_path(path)
    from pyro_rb.diagnostics.show.figure import NotebookFigure

    draw, num_panels, height = KINDS[kind]
    num_columns = max(map(num_panels, comparisons))
    width = max(3.5 * num_columns, 7.0)
    figure = NotebookFigure(layout="constrained")
    figure.patch.set_alpha(0.0)
    styles = Styles(comparisons)
    handles: Handles = {}
    heights = [height(comparison) for comparison in comparisons]
    rows = figure.subfigures(len(comparisons), 1, squeeze=False, height_ratios=heights)[:, 0]
    for comparison, row in zip(comparisons, rows):
        row.patch.set_alpha(0.0)
        row.suptitle(literal(comparison.title), color=INK, fontsize=11)
        panels = row.subplots(1, num_columns, squeeze=False)[0]
        count = num_panels(comparison)
        draw(panels[:count], comparison, styles, handles)
        for axes in panels[count:]:
            axes.set_axis_off()
    # About a tenth of an inch a letter, and room for the marker.
    legend_columns = max(1, int(width / (0.6 + 0.09 * max(map(len, handles)))))
    legend_rows = math.ceil(len(handles) / legend_columns)
    figure.set_size_inches(width, sum(heights) + 0.25 * legend_rows)
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
