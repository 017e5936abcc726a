# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian neural networks on regression tables: how well do they predict at convergence, and after
equal time, if they are trained by the plain gradient, by R2G2_ELBO and by RaoBlackwell_ELBO?

The networks have one hidden layer, a mean-field guide and learned noise. Splits are random, 90/10;
all is in float64. A run ends when :class:`~pyro_rb.StopRule` says that it has converged, by the
mean losses of ten steps each, or at ``--max-steps``. The learning rate of each method is the one
with the best log-likelihood at that point, on a tenth of the training data of some splits. Steps
are compiled. Equal time is the time of half of ``--max-steps`` by the plain gradient, counted once
in processor time of compiled steps and once in that of eager ones::

    python examples/papers/r2g2/bnn_regression.py --data-dir uci --out bnn_regression

``--data-dir`` has a file ``NAME.csv.gz`` for each of ``--tables``, without a header, the target
last. Without ``--data-dir`` the table is that of diabetes patients that comes with scikit-learn
(extra ``examples``).
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tabulate import tabulate

from pyro_rb import R2G2_ELBO, RaoBlackwell_ELBO
from pyro_rb.diagnostics.show.palette import INK
from support.command_line import make_parser, run, set_up
from support.data import load_table, split_table
from support.gradients import draw_gradients, variance_ratio
from support.regression import Networks
from support.results import cell, make_panels, mean_and_error, write_results
from support.training import now, seconds_of_steps

#: ``solver="auto"`` would leave layers plain that have less than two inputs for each row.
METHODS = {
    "plain": TraceMeanField_ELBO,
    "local, by hand": Trace_ELBO,
    "R2G2 shared": partial(R2G2_ELBO, solver="cholesky"),
    "R2G2 local": partial(R2G2_ELBO, pre_activations="local"),
    "mixed, shared": partial(RaoBlackwell_ELBO, pre_activations="shared", solver="cholesky"),
    "mixed, auto": RaoBlackwell_ELBO,
}
#: The last is timed only: it draws row by row here, by the same steps as R2G2 local.
TRAINED = list(METHODS)[:-1]
#: Test log-likelihoods found in secondary sources, by method.
CLAIMED = {
    "boston": {"plain": -2.72, "local, by hand": -2.65, "R2G2 shared": -2.62},
    "concrete": {"plain": -3.18, "local, by hand": -3.09, "R2G2 shared": -3.05},
    "wine_red": {"plain": -0.98, "local, by hand": -0.94, "R2G2 shared": -0.92},
    "protein": {"plain": -2.85, "local, by hand": -2.79, "R2G2 shared": -2.76},
}
ENDS = {"converged": "at convergence", "compiled": "equal compiled time", "eager": "equal eager time"}
LARGE = 20000  # rows


def make(method, num_features, args, **options):
    return Networks(METHODS[method](), method == "local, by hand", num_features, args, **options)


def measure_variance(networks, data, args):
    """Variance of the plain gradient over that of others, at one batch, by locations and scales."""
    batch = tuple(t[: args.batch_size] for t in data)
    with networks.in_scope():
        draws = {
            name: draw_gradients(METHODS[name](), networks.model, networks.guide, batch, args.num_samples)
            for name in ("plain", "R2G2 shared", "R2G2 local")
        }
    plain = draws.pop("plain")
    return {
        f"{part}, {name}": variance_ratio(plain[part], other[part])
        for part in ("loc", "scale")
        for name, other in draws.items()
    }


def measure_eager(num_features, train, args):
    """Seconds of an eager step by method, in turn."""
    steps = {}
    for method in METHODS:
        networks = make(method, num_features, args, is_compiled=False)
        networks.restart(train, args.lr[0], 0)
        steps[method] = networks.in_scope()(networks.step)
    return seconds_of_steps(steps, args.num_rounds)


def study(name, args):
    """All methods and splits of one table."""
    start = now()
    table = load_table(name, args.data_dir, args.max_rows)
    num_features = table.shape[1] - 1
    num_splits = args.num_splits if len(table) < LARGE else min(args.num_splits, 5)
    splits = [split_table(table, split) for split in range(num_splits)]
    seconds = {"eager": measure_eager(num_features, splits[0][0][0], args), "compiled": {}}
    max_steps = max(args.max_steps, args.min_epochs * round(0.9 * len(table)) // args.batch_size)
    methods, variance = {}, {}
    for method in args.methods:
        networks = make(method, num_features, args)
        tried = {
            lr: [networks.validate(table, lr, split, max_steps) for split in range(args.num_tuning_splits)]
            for lr in args.lr
        }
        lr = max(tried, key=lambda lr: np.mean(tried[lr]))
        seconds["compiled"][method] = float(np.median(networks.seconds))
        ends = {end: max_steps / 2 * by["plain"] / by[method] for end, by in seconds.items()}
        found = {"lr": lr, "validation": tried, "ends": ends, "converged": [], "scores": []}
        for split, ((train, test), scale) in enumerate(splits):
            networks.restart(train, lr, split)
            is_measured = split == 0 and method == "R2G2 shared"
            if is_measured:
                variance["at the start"] = measure_variance(networks, train, args)
            scores = {}

            def look(end):
                scores[end] = networks.evaluate(test, scale)

            found["converged"].append(networks.train(max_steps, ends, look, f"{name} {method}"))
            found["scores"].append(scores)
            if is_measured:
                variance["after training"] = measure_variance(networks, train, args)
        methods[method] = found
    return {
        "rows": len(table),
        "features": num_features,
        "max_steps": max_steps,
        "seconds of a step": seconds,
        "methods": methods,
        "plain variance / variance": variance,
        "seconds in all": now() - start,
    }


def compare_with_plain(methods, method, end):
    """The mean difference on the same splits, whose own spread is gone, and its error."""
    pairs = zip(methods[method]["scores"], methods["plain"]["scores"])
    return mean_and_error([a[end]["log_likelihood"] - b[end]["log_likelihood"] for a, b in pairs])


def summarize(results):
    """Rows of the tables of scores, of variances and of times."""
    scores, variances, times = [], [], []
    for name, result in results.items():
        methods = result["methods"]
        for method, found in methods.items():
            steps, stopped = zip(*found["converged"])
            claimed = CLAIMED.get(name, {}).get(method, "")
            row = {"table": name, "gradient": method, "claimed log lik.": claimed}
            for key, label in (("log_likelihood", "log lik."), ("rmse", "RMSE")):
                row[label] = cell(*mean_and_error([split["converged"][key] for split in found["scores"]]))
            for end, label in ENDS.items():
                is_itself = method == "plain"
                row[f"- plain, {label}"] = "" if is_itself else cell(*compare_with_plain(methods, method, end))
            at_cap = f"{1 - np.mean(stopped):.0%}"
            row.update({"rate": found["lr"], "steps": f"{np.mean(steps):.0f}", "at the cap": at_cap})
            scores.append(row)
        for kind, by in result["seconds of a step"].items():
            ratios = {method: f"{t / by['plain']:.2f}" for method, t in by.items()}
            times.append({"table": name, "steps": kind, "plain, ms": f"{1e3 * by['plain']:.2f}", **ratios})
        for when, ratios in result["plain variance / variance"].items():
            cells = {key: f"{value:.2f} ± {error:.1g}" for key, (value, error) in ratios.items()}
            variances.append({"table": name, "": when, **cells})
    return scores, variances, times


def draw(results):
    figure, axes = make_panels(1, len(results), size=(1.9 + 1 / len(results), 3.4))
    for ax, (name, result) in zip(axes, results.items()):
        others = [method for method in result["methods"] if method != "plain"]
        for shift, (end, label) in zip((-0.2, 0.0, 0.2), ENDS.items()):
            value, error = np.array([compare_with_plain(result["methods"], method, end) for method in others]).T
            ax.errorbar(np.arange(len(others)) + shift, value, np.nan_to_num(error), fmt="o", markersize=4, label=label)
        ax.axhline(0, color=INK, linewidth=1)
        ax.set_xticks(range(len(others)), others, rotation=60, ha="right", fontsize=9)
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("test log-likelihood - plain")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENDS))
    return figure


def main(args):
    set_up(args)
    # Where the projection is badly conditioned, compiled steps of single precision round differently from eager ones.
    torch.set_default_dtype(torch.float64)
    if args.smoke_test:
        args.max_steps, args.min_epochs, args.num_tuning_splits = 20, 0, 1
        args.num_splits, args.num_draws, args.num_samples, args.num_rounds = 2, 3, 4, 2
        args.max_rows, args.tables, args.lr, args.backend = 200, args.tables[:1], args.lr[:1], "replay"
        args.methods = ["plain", "R2G2 shared"]
    tables = args.tables if args.data_dir else ["diabetes"]
    results = {}
    for name in tables:
        results[name] = study(name, args)
        scores, variances, times = summarize(results)
        endings = {"": scores, "_variance": variances, "_time": times}
        write_results(args, {"tables": results}, endings, partial(draw, results))
    for rows in (scores, times, variances):
        print(tabulate(rows, headers="keys"), end="\n\n")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", help="folder with tables NAME.csv.gz")
    parser.add_argument("--tables", nargs="+", default=list(CLAIMED))
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=TRAINED, help="to train by, plain first")
    parser.add_argument("--max-rows", type=int, help="most rows of a table, drawn at random; all by default")
    parser.add_argument("--num-splits", type=int, default=20, help="5 at most where a table is large")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01], help="learning rates to choose from")
    parser.add_argument("--num-tuning-splits", type=int, default=3, help="splits for that choice")
    parser.add_argument("--max-steps", type=int, default=2000, help="end of a run whose loss still falls")
    parser.add_argument("--min-epochs", type=int, default=3, help="epochs at least, if they are more steps")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of StopRule, in nats a row")
    parser.add_argument("--backend", choices=["inductor", "replay"], default="inductor", help="of compiled steps")
    parser.add_argument("--num-draws", type=int, default=200, help="draws of the posterior for a prediction")
    parser.add_argument("--num-samples", type=int, default=100, help="draws of the gradient for a variance")
    parser.add_argument("--num-rounds", type=int, default=50, help="rounds of steps that are timed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=50, help="width of the hidden layer")
    parser.add_argument("--init-scale", type=float, default=0.05, help="scale of the weights in the guide at the start")
    run(main, parser)
