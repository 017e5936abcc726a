# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Does a long training run bear out what ``pyro_rb.compare`` recommends?

For each model: the comparison runs by its defaults, along 1000 training steps. Then models are
trained by every loss that it has measured and not called biased, for the same CPU time, from the
same start, by Adam: at the first seed at each of three learning rates, as a loss with less noise
may take larger steps; at the others at that of the comparison, and at the better one of the other
two. All runs of a seed take turns. The objective itself is noted along time, with the same random numbers
for all, and by enumeration where there are discrete sites::

    python examples/recommendations.py --out docs/source/_static/recommend
    python examples/recommendations.py --out docs/source/_static/recommend --again advice
    python examples/recommendations.py --models schools vae

``result.json`` is written after each seed of a model; what is in it already is not run again,
unless ``--again advice`` or ``--again training`` asks for it.

**The verdict.** What counts for a run is the mean objective over the last quarter of its time, at
the better of the loss's two learning rates. Losses are compared seed by seed. One beats another if
it is better by more than 3 standard errors of these differences (seeds are few), and by more
than 0.01 nats.

* *not borne out*: the reference beats the loss that was recommended; or it is the reference
  that was recommended, and another loss beats it;
* *not the best*: it beats the reference, or is no worse, but another loss beats it;
* *borne out*: it beats the reference, and no loss beats it; or it is the reference, and is the best;
* *within noise*: none of these;
* *no advice*: the comparison said that its evidence is too thin.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from recommend_models import CASES
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb import compare
from pyro_rb.diagnostics.run.losses import make_loss
from pyro_rb.diagnostics.show.palette import STYLES
from utils.results import cell, make_panels, write_table
from utils.training import Run

FACTORS = {"third": 1 / 3, "same": 1.0, "triple": 3.0}  # of the learning rate
STANDARD_ERRORS, TOLERANCE = 3.0, 0.01  # nats
ADVICE = ("step", "noise_share", "num_samples")
MEASURED = (
    "name", "error", "biased", "variance_ratio", "time_ratio", "time_ratio_error", "steps_ratio", "steps_ratio_error",
    "tail_share", "seconds",
)  # fmt: skip


def ask(case, args):
    """What the comparison recommends, and the measurements that this rests on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = case.make()
    start = time.process_time()
    result = compare(
        model,
        guide,
        case.losses,
        case.args,
        train_steps=args.train_steps,
        num_samples=args.num_samples,
        num_burn_in=args.num_burn_in,
        optim=pyro.optim.Adam({"lr": case.lr}),
        reference=case.reference,
    )
    found = result.recommendation
    return {
        "loss": found.loss,
        "sentence": found.sentence,
        "caveats": found.caveats,
        "progress_time": rounded(found.progress_time),
        "progress_time_error": rounded(found.progress_time_error),
        "reference": result.settings["reference"],
        "seconds": round(time.process_time() - start, 1),
        "left_out": result.left_out,
        "states": [
            {**{key: getattr(state, key) for key in ADVICE}}
            | {"losses": [rounded({key: getattr(row, key) for key in MEASURED}) for row in state.losses]}
            for state in result.states
        ],
    }


def rounded(values):
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


class TimedRun(Run):
    """A run that goes on until a CPU time. ``error`` says why it broke off, if it did."""

    def __init__(self, case, loss, factor, seed):
        super().__init__(case.make, make_loss(loss), {"lr": factor * case.lr}, seed)
        self.case, self.error, self.num_steps, self.objective = case, None, 0, []
        with pyro.get_param_store().scope(self.store):
            self.guide(*case.args)  # starts the same way, whatever the loss

    def until(self, seconds):
        pyro.set_rng_seed(1000 * self.seed + self.num_epochs)
        with pyro.get_param_store().scope(self.store):
            start, before = time.process_time(), self.seconds
            while self.seconds < seconds and self.error is None:
                try:
                    self.svi.step(*self.case.args)
                except (ValueError, RuntimeError) as error:
                    self.error = " ".join(str(error).split())[:200]
                self.num_steps += 1
                self.seconds = before + time.process_time() - start
        self.num_epochs += 1

    def note(self, loss):
        """Notes the objective; infinite if the run broke off."""
        case, value = self.case, math.inf
        if self.error is None:
            pyro.set_rng_seed(0)
            call = case.args if case.all_args is None else case.all_args
            with torch.no_grad(), pyro.get_param_store().scope(self.store):
                try:
                    value = sum(loss.loss(self.model, self.guide, *call) for _ in range(case.draws)) / case.draws
                except (ValueError, RuntimeError) as error:
                    self.error = " ".join(str(error).split())[:200]
        self.objective.append(value if math.isfinite(value) else math.inf)


def train(case, losses, seed, times, rates, progress):
    """
    Trains from one seed by each loss, at each of its learning rates.

    :param list times: CPU times at which the objective is noted.
    :param dict rates: by loss, names of :data:`FACTORS`.
    :return: by loss and rate, the objective at these times, the number of steps, and the error.
    """
    runs = {(loss, rate): TimedRun(case, loss, FACTORS[rate], seed) for loss in losses for rate in rates[loss]}
    objective = make_loss(case.objective)
    progress.reset(len(times) * len(runs))
    for until in times:
        for (loss, _), run in runs.items():
            run.until(until)
            run.note(objective)
            progress.set_postfix_str(f"{loss}, seed {seed}", refresh=False)
            progress.update()
    results = {loss: {} for loss in losses}
    for (loss, rate), run in runs.items():
        curve = [float(f"{x:.9g}") for x in run.objective]
        results[loss][rate] = {"steps": run.num_steps, "objective": curve, "error": run.error}
    return results


def note_times(seconds, num_notes):
    """Half of them late: these make up what a run attains. The others are denser early."""
    half = num_notes // 2
    early = [0.75 * seconds * (i / half) ** 2 for i in range(half)]
    return [round(t, 4) for t in [*early, *np.linspace(0.75 * seconds, seconds, num_notes - half)]]


def end(run):
    """What a run attains: the mean objective over the last quarter of the time."""
    return float(np.mean(run["objective"][len(run["objective"]) // 2 :]))


def promising(first):
    """Two learning rates for the other seeds: that of the comparison, and the better of the others."""
    return {
        loss: ["same", min(("third", "triple"), key=lambda rate: end(by_rate[rate]))] for loss, by_rate in first.items()
    }


def best_rate(training, loss):
    """Of the learning rates at which all seeds were run."""
    runs = [by_loss[loss] for by_loss in training["seeds"].values()]
    return min(runs[-1], key=lambda rate: np.mean([end(by_rate[rate]) for by_rate in runs]))


def scores(training, tuned):
    """The objective at the end for each seed, by loss, at its best rate or at that of the comparison."""
    found = {}
    for loss in next(iter(training["seeds"].values())):
        rate = best_rate(training, loss) if tuned else "same"
        found[loss] = np.array([end(by_loss[loss][rate]) for by_loss in training["seeds"].values()])
    return found


def difference(a, b):
    """Mean of ``a - b`` over seeds, and its standard error; a run that broke off is infinitely bad."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float(np.sign(np.isinf(a).sum() - np.isinf(b).sum())) * math.inf, 0.0
    d = a - b
    return float(d.mean()), float(d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 else math.inf


def beats(a, b):
    mean, error = difference(a, b)
    return -mean > max(STANDARD_ERRORS * error, TOLERANCE)


def judge(loss, reference, found):
    """The verdict, as above."""
    if loss is None:
        return "no advice"
    ahead = [name for name in found if name != loss and beats(found[name], found[loss])]
    if reference in ahead or (loss == reference and ahead):
        return "not borne out"
    if ahead:
        return "not the best"
    is_best = loss == min(found, key=lambda name: found[name].mean())
    return "borne out" if (is_best and loss == reference) or beats(found[loss], found[reference]) else "within noise"


def time_to(level, times, curve):
    """When a curve first comes down to a level, by linear interpolation; infinite if it never does."""
    for i, value in enumerate(curve):
        if value <= level:
            if i == 0:
                return times[0]
            share = (curve[i - 1] - level) / (curve[i - 1] - value) if math.isfinite(curve[i - 1]) else 1.0
            return times[i - 1] + share * (times[i] - times[i - 1])
    return math.inf


def best_curve(training, loss):
    rate = best_rate(training, loss)
    return np.mean([by_loss[loss][rate]["objective"] for by_loss in training["seeds"].values()], 0)


def speed_up(training, loss, reference):
    """Time that a loss needs for what the reference attains, over the time of the reference."""
    times, level = training["times"], scores(training, True)[reference].mean()
    needed = [time_to(level, times, best_curve(training, name)) for name in (loss, reference)]
    return needed[0] / needed[1] if needed[1] > 0 else math.nan


def signed(mean, error):
    """For a table."""
    if not math.isfinite(mean):
        return "broke off"
    if mean == error == 0:
        return "0"
    return cell(mean, error if math.isfinite(error) else math.nan, digits=1)


def summarise(title, advice, training):
    """A row of the table."""
    loss, reference = advice["loss"], advice["reference"]
    found = scores(training, tuned=True)
    same = scores(training, tuned=False)
    taken = loss or reference
    order = sorted(found, key=lambda name: found[name].mean())
    best = order[0]
    predicted = advice["progress_time"].get(taken)
    return {
        "model": title,
        "recommended": short(loss) if loss else "none",
        "time predicted, measured": f"{predicted:.2g}, {speed_up(training, taken, reference):.2g}",
        "gain, nats": signed(*difference(found[reference], found[taken])),
        "rank": f"{order.index(taken) + 1} of {len(order)}",
        "behind the best, nats": "" if best == taken else signed(*difference(found[taken], found[best])),
        "verdict": judge(loss, reference, found),
        "at the same rate": judge(loss, reference, same),
    }


def short(name):
    """Without arguments that all losses of a model share."""
    for long, brief in (("TraceEnum_ELBO+config_enumerate", "TraceEnum_ELBO"), (",control_variate_scale=", ":")):
        name = name.replace(long, brief)
    parts = name.split(":")
    return ":".join(part for part in parts if "particles" not in part)


def draw(models):
    """The objective above the lowest value seen, against CPU time, at each loss's best rate."""
    names = [short(loss) for entry in models.values() for loss in entry["losses"]]
    dashes = [(color, marker, line) for line in ("-", "--") for color, marker in STYLES]
    styles = dict(zip(dict.fromkeys(names), dashes))
    columns = min(2, len(models))
    fig, panels = make_panels(-(-len(models) // columns), columns, size=(3.6, 2.4))
    handles = {}
    for ax, (title, entry) in zip(panels, models.items()):
        ax.set_yscale("log", nonpositive="clip")
        times, taken = entry["training"]["times"], entry["advice"]["loss"]
        curves = {loss: best_curve(entry["training"], loss) for loss in entry["losses"]}
        lowest = min(curve.min() for curve in curves.values())
        for loss, curve in curves.items():
            color, marker, line = styles[short(loss)]
            style = dict(color=color, marker=marker, linestyle=line, markersize=4)
            ax.plot(times[1:], curve[1:] - lowest, linewidth=3.0 if loss == taken else 1.2, **style)
            handles.setdefault(short(loss), ax.plot([], [], **style)[0])
        # Where curves meet, what is left is noise.
        ax.set_ylim(bottom=1e-3 * max(curve[1:].max() - lowest for curve in curves.values()))
        ax.set(xlabel="CPU time, s", ylabel="nats above the lowest")
        ax.set_title(title, fontsize=8)
    for ax in panels[len(models) :]:
        ax.set_axis_off()
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return fig


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}


def write_json(path, results):
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")


def main(args):
    torch.set_num_threads(1)
    path = args.out / "result.json"
    results = read(path)
    results["settings"] = {
        "train_steps": args.train_steps,
        "num_samples": args.num_samples,
        "factors": FACTORS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in args.models:
        case = CASES[name]()
        entry = results["models"].setdefault(name, {"title": case.title, "lr": case.lr})
        if "advice" not in entry or args.again == "advice":
            entry["advice"] = ask(case, args)
            write_json(path, results)
        losses = entry["losses"] = list(entry["advice"]["progress_time"])
        if "training" not in entry or args.again == "training":
            entry["training"] = {"times": note_times(case.seconds * args.seconds, args.num_notes), "seeds": {}}
        done = entry["training"]["seeds"]
        for seed in args.seeds:
            if str(seed) not in done:
                rates = promising(next(iter(done.values()))) if done else dict.fromkeys(losses, FACTORS)
                with tqdm(desc=name, mininterval=0.5) as progress:
                    done[str(seed)] = train(case, losses, seed, entry["training"]["times"], rates, progress)
                write_json(path, results)
    entries = [entry for entry in map(results["models"].get, CASES) if entry and "training" in entry]
    rows = [summarise(entry["title"], entry["advice"], entry["training"]) for entry in entries]
    print(tabulate(rows, headers="keys"))
    write_table(args.out / "table.csv", rows)
    figure = draw({entry["title"]: entry for entry in entries})
    figure.savefig(args.out / "figure.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time of a run, a factor on that of the model")
    parser.add_argument("--train-steps", type=int, default=1000, help="along which the comparison measures")
    parser.add_argument("--num-samples", type=int, default=300, help="gradients of each loss at each state")
    parser.add_argument("--num-notes", type=int, default=16, help="of the objective along a run, half of them late")
    parser.add_argument("--num-burn-in", type=int, default=100)
    parser.add_argument("--again", choices=["advice", "training"], help="do not take this from result.json")
    parser.add_argument("--out", type=Path, help="folder of result.json, table.csv and figure.png")
    parser.add_argument("--smoke-test", action="store_true", help="one model and few steps, to a temporary place")
    parsed = parser.parse_args()
    if parsed.smoke_test:
        parsed.models, parsed.seeds, parsed.seconds, parsed.num_notes = ["schools"], [0, 1], 0.01, 4
        parsed.train_steps, parsed.num_samples, parsed.num_burn_in = 2, 4, 2
    if parsed.smoke_test or parsed.out is None:
        with tempfile.TemporaryDirectory() as folder:
            parsed.out = Path(folder)
            main(parsed)
    else:
        parsed.out.mkdir(parents=True, exist_ok=True)
        main(parsed)
