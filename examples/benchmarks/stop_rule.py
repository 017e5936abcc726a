# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
When StopRule stops, on simulated losses whose expectation is known.

For each kind of progress and of noise: the share of runs that it stopped, the median step,
and the share that it stopped too early, while the expected improvement from the third quarter
of the run to the fourth was above the tolerance::

    python examples/benchmarks/stop_rule.py --json stop.json --csv stop.csv
"""

import math

import numpy as np
from common import make_parser, write
from tabulate import tabulate
from tqdm import tqdm

from pyro_rb import StopRule
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


def main(args):
    if args.smoke_test:
        args.num_runs, args.num_steps = 2, 2000
    rows = []
    for noise, make_noise in tqdm(NOISES.items(), disable=args.smoke_test):
        for name, curve in CURVES.items():
            result = measure(curve, make_noise, args.num_runs, args.num_steps)
            rows.append({"noise": noise, "progress": name, **result})
    print(tabulate(rows, headers="keys"))
    settings = {"num_runs": args.num_runs, "num_steps": args.num_steps, "tolerance": TOLERANCE}
    cells = [{k: "" if v is None else v for k, v in row.items()} for row in rows]
    write(args, {"settings": settings, "rows": rows}, cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None, device=False)
    parser.add_argument("--num-runs", type=int, default=200, help="of each kind, one for each seed")
    parser.add_argument("--num-steps", type=int, default=30000, help="of a run, if it is not stopped")
    run(main, parser)
