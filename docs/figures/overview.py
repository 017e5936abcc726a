# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The figure of ``docs/source/index.rst``: what one changed argument does on five models, as
``pyro_rb.compare`` measures it, and what training makes of it on two of them. And the table of
``docs/source/choose.rst``: other losses on the same models. Takes about eight minutes.

Writes ``overview.png``, ``overview.csv`` and ``overview.json``::

    python docs/figures/overview.py
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import pyro
import torch
from pyro.infer import SVI
from tqdm import tqdm

from overview_models import PROBLEMS, Problem
from pyro_rb import Comparison, compare
from pyro_rb.diagnostics.compare.report import LossResult
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.show.palette import INK, STYLES, dress, error_bars

OUT = Path(__file__).resolve().parents[1] / "source" / "_static" / "overview"
OURS = STYLES[3][0]


def _one_line(title: str) -> str:
    return title.replace("-\n", "-").replace("\n", " ")


def measure(problem: Problem, num_samples: int, num_burn_in: int, num_steps: int) -> Comparison:
    pyro.clear_param_store()
    model, guide, args = problem.make()
    return compare(
        model,
        guide,
        [problem.loss, *problem.others],
        args=args,
        reference=problem.reference,
        optim=pyro.optim.Adam({"lr": problem.lr}),
        train_steps=[0, num_steps],
        num_samples=num_samples,
        num_burn_in=num_burn_in,
        title=_one_line(problem.title),
    )


def train(problem: Problem, loss: str, seed: int, num_steps: int, every: int) -> List[float]:
    """The negative ELBO along training by a loss, with as little noise as can be had."""
    pyro.clear_param_store()
    model, guide, args = problem.make()
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": problem.lr}), make_loss(loss))
    elbo, enumerate_guide = problem.exact
    found = []
    for step in range(num_steps):
        svi.step(*args)
        if (step + 1) % every == 0:
            with torch.random.fork_rng():
                found.append(round(elbo.loss(model, enumerate_guide(guide), *args), 3))
    return found


def draw(results: Dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 6.6), layout="constrained")
    figure.patch.set_alpha(0.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1.0])
    for part in (top, bottom):
        part.patch.set_alpha(0.0)
    draw_gains(top.subplots(), results["models"])
    for axes, name in zip(bottom.subplots(1, len(results["training"])), results["training"]):
        draw_training(axes, PROBLEMS[name], results["training"][name])
    figure.savefig(path, dpi=150)


def draw_gains(axes: Any, models: Dict[str, Any]) -> None:
    """A row for each model: variance times time, before and after training."""
    axes.axvline(1.0, color=INK, lw=1.2)
    labels: List[str] = []
    handles: Dict[bool, Any] = {}
    for place, (name, found) in enumerate(models.items()):
        problem = PROBLEMS[name]
        labels.append(problem.title)
        rows = found["losses"][problem.loss]
        for row, last in ((rows["before"], False), (rows["after"], True)):
            value = row["variance_ratio"] * row["time_ratio"]
            error = value * (row["variance_ratio_error"] / row["variance_ratio"])
            handles[last] = axes.errorbar(
                value,
                place,
                xerr=error_bars([value], [error]),
                color=OURS,
                marker="o",
                markersize=9,
                markerfacecolor=OURS if last else "none",
                alpha=1.0 if last else 0.7,
                zorder=3,
            )
            if last:
                axes.plot([1.0, value], [place, place], color=OURS, lw=3, alpha=0.5, zorder=1)
        text = f"{_short(problem.loss)}\n{_times(value)}"
        axes.annotate(
            text,
            (1.0, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=10.5,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(right=400.0)
    names = ["before training", "after training"]
    axes.legend([handles[last][0] for last in (False, True)], names, frameon=False, labelcolor=INK, loc="lower left")
    ticks = [0.001, 0.01, 0.1, 1.0]
    low = axes.get_xlim()[0]
    axes.set_xticks([tick for tick in ticks if tick > low], [f"{t:g}" for t in ticks if t > low])
    axes.minorticks_off()
    dress(axes, "time for an equally exact gradient: variance x time, relative to Pyro's loss", "")
    axes.tick_params(axis="y", labelsize=10.5, length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _times(product: float) -> str:
    gain = 1 / product
    if gain < 1.1:
        return "no gain" if product < 1.1 else f"{product:.1f} times the time"
    return f"{gain:.1f} times less" if gain < 10 else f"{float(f'{gain:.2g}'):.0f} times less"


def draw_training(axes: Any, problem: Problem, found: Dict[str, Any]) -> None:
    """Mean over seeds and the range of all of them, against time in steps of the reference."""
    lowest, highest = [], []
    for name, color in ((problem.reference, INK), (problem.loss, OURS)):
        curves = torch.tensor(found[name]["loss"])
        time = found["every"] * torch.arange(1, curves.shape[1] + 1) * found[name]["time_ratio"]
        axes.plot(time, curves.mean(0), color=color, label=name)
        lowest.append(curves.min().item())
        highest.append(curves[:, curves.shape[1] // 5 :].max().item())
        axes.fill_between(time, curves.min(0).values, curves.max(0).values, color=color, alpha=0.3, lw=0)
    # Equal time for both; the first fifth would press the rest flat.
    axes.set_xlim(0, found["every"] * len(found[problem.reference]["loss"][0]))
    margin = 0.05 * (max(highest) - min(lowest))
    axes.set_ylim(min(lowest) - margin, max(highest) + margin)
    dress(axes, f"time, in steps of {problem.reference}", "negative ELBO")
    axes.set_title(_one_line(problem.title), color=INK, fontsize=10.5)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)


def as_row(result: LossResult) -> Dict[str, Any]:
    keys = "variance_ratio variance_ratio_error time_ratio time_ratio_error bias_z biased".split()
    return {key: getattr(result, key) for key in keys}


def write_table(models: Dict[str, Any], path: Path) -> None:
    """Variance, time and their product as ratios to Pyro's loss, a row a loss."""
    rows: List[Dict[str, str]] = []
    for name, found in models.items():
        title = _one_line(PROBLEMS[name].title)
        for loss, states in found["losses"].items():
            if loss == found["reference"]:
                continue
            before, after = states["before"], states["after"]
            rows.append(
                {
                    # A name for all rows of a model is enough.
                    "model": title,
                    "loss": _short(loss),
                    "time": f"{after['time_ratio']:.2f}",
                    "variance, before": _number(before["variance_ratio"]),
                    "variance, after": _number(after["variance_ratio"]),
                    "product, before": _product(before),
                    "product, after": _product(after),
                }
            )
            title = ""
    with open(path, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _short(loss: str) -> str:
    particles = "num_particles=16,vectorize_particles=True"
    for text in ("+config_enumerate", f"{particles},control_variate_scale=", f":{particles}"):
        loss = loss.replace(text, "")
    return loss


def _product(row: Dict[str, Any]) -> str:
    return "biased" if row["biased"] else _number(row["variance_ratio"] * row["time_ratio"])


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    num_samples, num_burn_in, num_seeds = (4, 2, 1) if args.smoke_test else (400, 100, 5)
    results: Dict[str, Any] = {
        "settings": {"num_samples": num_samples, "num_seeds": num_seeds, "threads": 1, "torch": torch.__version__},
        "models": {},
        "training": {},
    }
    for name, problem in PROBLEMS.items():
        num_steps = 2 if args.smoke_test else problem.num_steps
        comparison = measure(problem, num_samples, num_burn_in, num_steps)
        before, after = ({row.name: as_row(row) for row in state.losses} for state in comparison.states)
        results["models"][name] = {
            "reference": problem.reference,
            "num_steps": num_steps,
            "losses": {loss: {"before": before[loss], "after": after[loss]} for loss in before},
        }
        print(comparison)
        if problem.exact is None:
            continue
        every = 1 if args.smoke_test else num_steps // 50
        training: Dict[str, Any] = {"every": every}
        for loss, ratio in ((problem.reference, 1.0), (problem.loss, after[problem.loss]["time_ratio"])):
            runs = [train(problem, loss, seed, num_steps, every) for seed in tqdm(range(num_seeds), loss)]
            training[loss] = {"time_ratio": ratio, "loss": runs}
        results["training"][name] = training
    (args.out / "overview.json").write_text(json.dumps(results, indent=1) + "\n")
    finish(results, args.out)


def finish(results: Dict[str, Any], out: Path) -> None:
    draw(results, out / "overview.png")
    write_table(results["models"], out / "overview.csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    parser.add_argument("--redraw", action="store_true", help="only figure and table, from the JSON file")
    parser.add_argument("--smoke-test", action="store_true", help="a few draws, to a temporary place")
    parsed = parser.parse_args()
    if parsed.smoke_test:
        with tempfile.TemporaryDirectory() as folder:
            parsed.out = Path(folder)
            main(parsed)
    elif parsed.redraw:
        finish(json.loads((parsed.out / "overview.json").read_text()), parsed.out)
    else:
        parsed.out.mkdir(parents=True, exist_ok=True)
        main(parsed)
