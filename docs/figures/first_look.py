# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The figure of ``README.rst``: microseconds of a step, and variance of the gradient after training. It draws what
``examples/benchmarks/compiled_peers.py`` and ``docs/figures/overview.py`` measured::

    python docs/figures/first_look.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from overview import _short
from overview_models import PROBLEMS
from pyro_rb.diagnostics.show.palette import STYLES, error_bars

STATIC = Path(__file__).resolve().parents[1] / "source" / "_static"
OURS = STYLES[3][0]
INK = "#404040"
#: By label: the kind of step in peers.json.
STEPS = {
    "Trace_ELBO, SVI": "Pyro, Trace_ELBO",
    "Trace_ELBO, CompiledSVI": "pyro_rb, Trace_ELBO, Inductor",
    "STLTrace_ELBO, CompiledSVI": "pyro_rb, STLTrace_ELBO, Inductor",
    "RaoBlackwell_ELBO, CompiledSVI": "pyro_rb, RaoBlackwell_ELBO, Inductor",
}


def read(name: str) -> Dict[str, Any]:
    return json.loads((STATIC / name).read_text())


def dress(axes: Any, labels: List[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.tick_params(axis="x", colors=INK)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def write(axes: Any, text: str, x: float, y: int) -> None:
    axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", color=INK)


def draw_steps(axes: Any) -> None:
    times = read("compiled/peers.json")["results"]["eight schools"]
    for place, (label, kind) in enumerate(STEPS.items()):
        value = times[kind]["us"][0]
        axes.barh(place, value, color=OURS if place else INK, height=0.6)
        write(axes, f"{value:.0f}", value, place)
    dress(axes, list(STEPS), "Microseconds of a step of SVI, eight schools")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def draw_noise(axes: Any) -> None:
    labels = []
    axes.axvline(1.0, color=INK, lw=1.2)
    for place, (name, found) in enumerate(read("overview/overview.json")["models"].items()):
        problem = PROBLEMS[name]
        title = " ".join(problem.title.replace("-\n", "-").split()).split(", ")[0]
        labels.append(f"{title}: {_short(problem.loss)}")
        after = found["losses"][problem.loss]["after"]
        value, error = after["variance_ratio"], after["variance_ratio_error"]
        axes.errorbar(value, place, xerr=error_bars([value], [error]), color=OURS, marker="o", markersize=8)
        write(axes, f"{value:.2g}" if value > 0.001 else f"{value:.5f}", value, place)
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 2.0)
    axes.set_xticks([0.001, 0.01, 0.1, 1.0], ["0.001", "0.01", "0.1", "1"])
    axes.minorticks_off()
    dress(axes, labels, "Variance of the gradient after training, Pyro's loss as 1")


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, height_ratios=[4, 5.5])
    draw_steps(top)
    draw_noise(bottom)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--smoke-test", action="store_true", help="to a temporary place")
    if parser.parse_args().smoke_test:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / "first_look.png")
    else:
        draw(STATIC / "overview" / "first_look.png")
