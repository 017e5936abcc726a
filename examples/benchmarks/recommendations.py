# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Does training bear out what ``pyro_rb.compare`` recommends?

For each of fourteen kinds of model the comparison runs with its defaults: it measures the losses that apply, before
and after a short training, and recommends one. It then trains with the reference and the four losses that it ranks
highest, for equal CPU time from the same start, in turns, with three seeds, each with its own learning rate, the best
of four: ``compare(model, guide, train=seconds)``::

    python examples/benchmarks/recommendations.py --out docs/source/_static/recommend
    python examples/benchmarks/recommendations.py --out docs/source/_static/recommend --models survival network

``result.json`` is written after each model; a model that is in it already is run again only if it is named.

**The verdict.** One loss beats another if it ends lower by more than 3 standard errors of the differences seed by
seed (seeds are few), and by more than 0.01 nats.

* *right*: no loss beats the one that was recommended;
* *harmless*: a loss beats it, but the reference does not;
* *wrong*: the reference beats it;
* *no advice*: the comparison said that its evidence is too thin.
"""

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import _path  # noqa: F401
import numpy as np
import pyro
import torch
from tabulate import tabulate

from pyro_rb import compare
from pyro_rb.diagnostics.show.palette import STYLES
from support.recommendation_cases import CASES
from support.results import cell, make_panels, write_table

STANDARD_ERRORS, TOLERANCE = 3.0, 0.01  # nats


def ask(name, args):
    """What the comparison recommends, and what training shows."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    case = CASES[name]()
    start = time.process_time()
    result = compare(
        case.model,
        case.guide,
        args=case.args,
        num_samples=args.num_samples,
        num_burn_in=args.num_burn_in,
        train_steps=args.train_steps,
        reference=case.reference,
        title=case.title,
        train=args.seconds * case.seconds,
        steps=args.steps,
    )
    found = result.recommendation
    print(f"\n{result.table()}\n")
    return {
        "title": case.title,
        "loss": found.loss,
        "sentence": str(found),
        "times": {ranked.name: float(f"{ranked.time:.3g}") for ranked in found.ranking},
        "reference": result.settings["reference"],
        "num_steps": result.states[-1].step,
        "seconds": round(time.process_time() - start, 1),
        "left_out": result.left_out,
        "curves": [dataclasses.asdict(curve) for curve in result.race.curves],
        "torch": torch.__version__,
    }


def ends(entry):
    """The loss at the end for each seed, by name; those that have failed are infinitely bad."""
    return {
        curve["name"]: np.nan_to_num([seed[-1] for seed in curve["losses"]] or math.inf, nan=math.inf)
        for curve in entry["curves"]
    }


def difference(a, b):
    """Mean of ``a - b`` over seeds, and its standard error."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float(np.sign(np.isinf(a).sum() - np.isinf(b).sum())) * math.inf, 0.0
    return float((a - b).mean()), float((a - b).std(ddof=1) / len(a) ** 0.5)


def beats(a, b):
    mean, error = difference(b, a)
    return mean > max(STANDARD_ERRORS * error, TOLERANCE)


def judge(entry):
    """The verdict, as above."""
    found, loss = ends(entry), entry["loss"]
    if loss is None:
        return "no advice"
    ahead = [name for name in found if name != loss and beats(found[name], found[loss])]
    if entry["reference"] in ahead:
        return "wrong"
    return "harmless" if ahead else "right"


def summarize(entry):
    """A row of the table."""
    found, reference = ends(entry), entry["reference"]
    taken = entry["loss"] or reference
    order = sorted(found, key=lambda name: found[name].mean())
    behind = "" if order[0] == taken else cell(*difference(found[taken], found[order[0]]))
    return {
        "model": entry["title"],
        "recommended": short(entry["loss"] or "none"),
        "time predicted": f"{entry['times'][taken]:.2g}",
        "gain, nats": "0" if taken == reference else cell(*difference(found[reference], found[taken])),
        "rank": f"{order.index(taken) + 1} of {len(order)}",
        "behind the best, nats": behind,
        "the best": short(order[0]),
        "verdict": judge(entry),
    }


def short(name):
    """With fewer words for particles, and without arguments that all losses of a model share."""
    parts = [part for part in name.replace(":", ",").split(",") if "nesting" not in part and "vectorize" not in part]
    return ", ".join(part.replace("num_particles=", "particles ") for part in parts)


def draw(entries):
    """The loss above the lowest value seen, against CPU time."""
    names = [short(curve["name"]) for entry in entries for curve in entry["curves"]]
    dashes = [(color, marker, line) for line in ("-", "--") for color, marker in STYLES]
    styles = dict(zip(dict.fromkeys(names), dashes))
    columns = min(2, len(entries))
    fig, panels = make_panels(-(-len(entries) // columns), columns, size=(3.6, 2.4))
    handles = {}
    for ax, entry in zip(panels, entries):
        means = {c["name"]: np.mean(c["losses"], 0) for c in entry["curves"] if c["losses"]}
        lowest = min(mean.min() for mean in means.values())
        for curve in entry["curves"]:
            if curve["name"] in means:
                color, marker, line = styles[short(curve["name"])]
                style = dict(color=color, marker=marker, linestyle=line, markersize=4)
                width = 3.0 if curve["name"] == entry["loss"] else 1.2
                ax.plot(curve["seconds"], means[curve["name"]] - lowest, linewidth=width, **style)
                handles.setdefault(short(curve["name"]), ax.plot([], [], **style)[0])
        ax.set_yscale("log", nonpositive="clip")
        # Where curves meet, what is left is noise.
        ax.set_ylim(bottom=1e-3 * max(mean.max() - lowest for mean in means.values()))
        ax.set(xlabel="CPU time, s", ylabel="nats above the lowest")
        ax.set_title(entry["title"], fontsize=8)
    for ax in panels[len(entries) :]:
        ax.set_axis_off()
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=7)
    return fig


def main(args):
    torch.set_num_threads(1)
    path = args.out / "result.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.models or [name for name in CASES if name not in results]:
        results[name] = ask(name, args)
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    entries = [results[name] for name in CASES if name in results]
    rows = [summarize(entry) for entry in entries]
    print(tabulate(rows, headers="keys"))
    write_table(args.out / "table.csv", rows)
    draw(entries).savefig(args.out / "figure.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, metavar="MODEL", help=", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time of a run, a factor on that of the model")
    parser.add_argument("--num-samples", type=int, default=300, help="gradients of each loss at each state")
    parser.add_argument("--num-burn-in", type=int, default=100)
    parser.add_argument("--train-steps", type=int, help="training before the second measurement (automatic)")
    parser.add_argument("--out", type=Path, help="folder of result.json, table.csv and figure.png")
    parser.add_argument("--smoke-test", action="store_true", help="one model and few steps, to a temporary place")
    parser.add_argument("--steps", type=int, help="that are intended; 0 compiles nothing (10000)")
    parsed = parser.parse_args()
    if parsed.smoke_test:
        parsed.models, parsed.seconds, parsed.num_samples, parsed.num_burn_in = ["survival"], 0.02, 4, 2
        parsed.train_steps, parsed.steps = 2, 0
    if parsed.smoke_test or parsed.out is None:
        with tempfile.TemporaryDirectory() as folder:
            parsed.out = Path(folder)
            main(parsed)
    else:
        parsed.out.mkdir(parents=True, exist_ok=True)
        main(parsed)
