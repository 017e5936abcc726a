# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Tables, figures, and files of results."""

import csv
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyro
import torch
from tabulate import tabulate

from pyro_rb.diagnostics.show.palette import figure_style


def mean_and_error(values):
    """The mean of a few numbers, and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


def cell(value, error, digits=2):
    """For a table, with as many digits as the error allows."""
    if np.isnan(error):
        return f"{value:.3g}"
    places = max(0, digits - 1 - int(np.floor(np.log10(max(error, 1e-12)))))
    return f"{value:.{min(places, 4)}f} ± {error:.{min(places, 4)}f}"


def import_pyplot():
    """matplotlib, so set that figures read well on light and on dark pages."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit(
            "The figure needs matplotlib, which is not installed. Expected the extra "
            '"examples": pip install "pyro_rb[examples]".'
        ) from error
    plt.rcParams.update(figure_style())
    return plt


def make_panels(num_rows, num_columns, size=(4.5, 3.4), **options):
    """A figure of panels, and a list of these."""
    size = (size[0] * num_columns, size[1] * num_rows)
    fig, axes = import_pyplot().subplots(
        num_rows, num_columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    for ax in axes.flat:
        ax.grid()
    return fig, list(axes.flat)


def draw_histories(histories, labels):
    """
    For each run of ``take_turns``, values against the seconds of training, means over seeds.

    :param histories: a list of one for each seed; or several such lists by title, a row of panels for each.
    :param dict labels: of the axes, a panel for each, by what was noted.
    """
    by_title = histories if isinstance(histories, dict) else {None: histories}
    fig, axes = make_panels(len(by_title), len(labels))
    num_colors = len(import_pyplot().rcParams["axes.prop_cycle"])
    for ax, ((title, seeds), (key, label)) in zip(axes, itertools.product(by_title.items(), labels.items())):
        for i, name in enumerate(seeds[0]):
            notes = [[(note["seconds"], note[key]) for note in history[name]] for history in seeds]
            ax.plot(*np.mean(notes, 0).T, "-" if i < num_colors else "--", label=name)
        ax.set(xlabel="seconds of training", ylabel=label, title=title)
    axes[0].legend()
    return fig


def report(args, rows, draw=None, **more):
    """
    Prints a table, and writes it as :func:`write_results` does.

    :param rows: dicts of cells; or several such tables, by what comes after PREFIX.
    :param more: goes to the JSON file, too; numbers and texts are printed.
    """
    for table in rows.values() if isinstance(rows, dict) else [rows]:
        print(tabulate(table, headers="keys", disable_numparse=True))
    for key, value in more.items():
        if isinstance(value, (int, float, str)):
            print(f"{key}: {value}")
    write_results(args, {**more, "rows": rows}, rows, draw)


def write_results(args, results, tables, draw=None):
    """
    With ``--out PREFIX``: ``PREFIX.json`` with the settings, a table ``PREFIX.csv``, a
    figure ``PREFIX.png``. In a smoke test all are written, and removed.

    :param args: of the command line.
    :param dict results: for the JSON file.
    :param tables: rows of a table, dicts; or several of these, by what comes after PREFIX.
    :param callable draw: returns a figure; None for no figure.
    """
    if not (args.out or args.smoke_test):
        return
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(args.out or Path(scratch) / "result")
        prefix.parent.mkdir(parents=True, exist_ok=True)

        def path(ending):
            return prefix.with_name(prefix.name + ending)

        text = json.dumps({"settings": settings_of(args), **results}, indent=1)
        path(".json").write_text(text + "\n", encoding="utf-8")
        for ending, rows in (tables if isinstance(tables, dict) else {"": tables}).items():
            write_table(path(f"{ending}.csv"), rows)
        if draw is not None:
            figure = draw()
            figure.savefig(path(".png"), dpi=120)
            import_pyplot().close(figure)


def write_table(path, rows):
    """Rows as CSV: dicts of cells, with a column for each key that occurs."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def settings_of(args):
    """The options that results depend on, and versions."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data_dir", "smoke_test")}
    settings.update(torch=torch.__version__, pyro=pyro.__version__, python=sys.version.split()[0])
    settings.update(threads=torch.get_num_threads(), cores=os.cpu_count())
    return settings
