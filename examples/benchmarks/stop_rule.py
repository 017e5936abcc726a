# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
When StopRule stops: on simulated losses whose expectation is known, or, with ``--models``, with its defaults on
the fourteen models of ``support/recommendation_cases.py``.

For each kind of progress and of noise the table gives the share of runs that the rule stopped, the median step,
and the share that it stopped too early: while the expected improvement from the third quarter of the run to the
fourth was above the tolerance::

    python examples/benchmarks/stop_rule.py --json stop.json --csv stop.csv
    python examples/benchmarks/stop_rule.py --models --json stop_rule.json --csv stop_rule.csv

The models are trained by Adam with learning rate 0.01, each for a minute of CPU time. *Needed* are the steps until the
mean loss of 100 steps is first within two of its own standard deviations of where it ends. A stop is *too early* if
the loss has then more left to fall than half the noise of one step.
"""

import math
import time

import numpy as np
import pyro
from common import make_parser, write
from pyro.infer import SVI
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb import StopRule
from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import run

TOLERANCE = 0.1  # in units of the standard deviation of the noise

CURVES = {
    "exp(-t / 200)": lambda t: 100 * np.exp(-t / 200),
    "exp(-t / 2000)": lambda t: 100 * np.exp(-t / 2000),
    "1 / sqrt(t)": lambda t: 20 / np.sqrt(t + 1),
    "log t, gain = tolerance": lambda t: -TOLERANCE / math.log(7 / 5) * np.log(t + 1),
    "log t, gain = 2 tolerances": lambda t: -2 * TOLERANCE / math.log(7 / 5) * np.log(t + 1),
}


def normal(rng, count):
    return rng.normal(size=count)


def student(rng, count):
    return rng.standard_t(2, size=count)


def spikes(rng, count):
    return rng.normal(size=count) + (rng.random(count) < 0.01) * rng.pareto(1.2, size=count) * 20


def autoregressive(rng, count):
    noise, state = np.empty(count), rng.normal()
    for i, e in enumerate(rng.normal(size=count) * math.sqrt(1 - 0.9**2)):
        noise[i] = state = 0.9 * state + e
    return noise


NOISES = {
    "normal": normal,
    "Student's t, 2 degrees": student,
    "normal and Pareto spikes": spikes,
    "autoregressive, 0.9": autoregressive,
}


def is_early(curve, step):
    quarter = step // 4
    values = curve(np.arange(step - 2 * quarter, step))
    return values[:quarter].mean() - values[quarter:].mean() >= TOLERANCE


def measure(curve, noise, num_runs, num_steps):
    stops = []
    for seed in range(num_runs):
        rng = np.random.default_rng(seed)
        rule = StopRule(tolerance=TOLERANCE)
        losses = curve(np.arange(num_steps)) + noise(rng, num_steps)
        stop = next((i for i, loss in enumerate(losses.tolist(), 1) if rule.update(loss)), None)
        if stop is not None:
            stops.append(stop)
    return {
        "stopped, %": round(100 * len(stops) / num_runs, 1),
        "median step": int(np.median(stops)) if len(stops) > num_runs / 2 else None,
        "too early, %": round(100 * sum(is_early(curve, stop) for stop in stops) / num_runs, 1),
    }


WINDOW = 100


def train(case, seconds, num_steps):
    """The loss of each step."""
    svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.01}), make_loss(case.reference or "Trace_ELBO"))
    losses, end = [], time.process_time() + seconds
    while time.process_time() < end and len(losses) < num_steps:
        losses.append(svi.step(*(case.args() if callable(case.args) else case.args)))
    return np.array(losses)


def judge(losses):
    """When the rule stops by its defaults, and when it should."""
    rule = StopRule()
    stop = next((i for i, loss in enumerate(losses.tolist(), 1) if rule.update(loss)), None)
    total = np.cumsum(np.insert(losses, 0, 0.0))
    means = (total[WINDOW:] - total[:-WINDOW]) / WINDOW
    last = len(losses) // 5
    end, deviation = means[-last:].mean(), means[-last:].std()
    noise = np.median(np.abs(np.diff(losses[-last:]))) / 0.6745 / math.sqrt(2)
    needed = WINDOW + int(np.argmax(np.abs(means - end) < 2 * deviation))
    left = math.nan if stop is None else means[stop - WINDOW] - end
    return {
        "steps": len(losses),
        "needed": needed,
        "stopped at": stop,
        "times the needed": None if stop is None else round(stop / needed, 2),
        "left to fall, nats": None if stop is None else float(f"{left:.2g}"),
        "noise of a step, nats": float(f"{noise:.2g}"),
        "too early": bool(left > noise / 2),
    }


def measure_models(args):
    from support.recommendation_cases import CASES

    rows = []
    for name in tqdm(["survival"] if args.smoke_test else CASES, disable=args.smoke_test):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        case = CASES[name]()
        rows.append({"model": case.title, **judge(train(case, args.seconds, args.num_steps))})
    return rows


def main(args):
    if args.smoke_test:
        args.num_runs, args.num_steps = 2, 2000
    if args.models:
        report(args, measure_models(args), {"seconds": args.seconds})
        return
    rows = []
    for noise, make_noise in tqdm(NOISES.items(), disable=args.smoke_test):
        for name, curve in CURVES.items():
            result = measure(curve, make_noise, args.num_runs, args.num_steps)
            rows.append({"noise": noise, "progress": name, **result})
    report(args, rows, {"num_runs": args.num_runs, "num_steps": args.num_steps, "tolerance": TOLERANCE})


def report(args, rows, settings):
    print(tabulate(rows, headers="keys"))
    cells = [{k: "" if v is None else v for k, v in row.items()} for row in rows]
    write(args, {"settings": settings, "rows": rows}, cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None, device=False)
    parser.add_argument("--num-runs", type=int, default=200, help="runs of each kind, one for each seed")
    parser.add_argument("--num-steps", type=int, default=30000, help="steps of a run, if it is not stopped")
    parser.add_argument("--models", action="store_true", help="on the fourteen models, in place of simulated losses")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time for each model")
    run(main, parser)
