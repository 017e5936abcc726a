# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Bayesian neural networks on regression tables: how well do they predict, after as many
steps and after as much time, with the plain gradient and with R2G2_ELBO?

One hidden layer, AutoNormal, learned noise, random 90/10 splits. Every loss has the
analytic KL divergence. ``by hand`` is local reparameterization without Pyro's handlers.
As much time is that of the plain gradient, counted in processor time of steps that are
measured in turn, before training; so are those of ``Trace_ELBO``::

    python examples/papers/r2g2/bnn_regression.py --data-dir uci --out bnn_regression

``--data-dir`` has a file ``NAME.csv.gz`` for each of ``--tables``, without a header, the
target last. Without it the table is that of diabetes patients which scikit-learn carries
(extra ``examples``).
"""

from functools import partial
from pathlib import Path

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from tabulate import tabulate
from torch.distributions import kl_divergence
from torch.nn.functional import linear
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.diagnostics.show.palette import INK
from support.command_line import make_parser, run, set_up
from support.data import data_of
from support.gradients import draw_gradients, variance_ratio
from support.networks import BayesianMLP, MeanField, make_guide
from support.results import cell, make_panels, mean_and_error, write_results
from support.training import seconds_of_steps


def local_by_hand(model, guide, x, y):
    """The loss of Kingma, Salimans and Welling (2015) for :class:`BayesianMLP`."""
    loss, h = 0.0, x
    for i, layer in enumerate(model.layers):
        parts = [guide.parts(f"layers.{i}.{name}") for name in ("weight", "bias")]
        prior = dist.Normal(0.0, (layer.in_features + 1) ** -0.5)
        loss = loss + sum(kl_divergence(dist.Normal(*q), prior).sum() for q in parts)
        (loc, scale), (bias_loc, bias_scale) = parts
        h = h if i == 0 else torch.relu(h)
        variance = linear(h.square(), scale.square(), bias_scale.square())
        h = linear(h, loc, bias_loc) + variance.sqrt() * torch.randn_like(variance)
    likelihood = dist.Normal(h.squeeze(-1), model.noise).log_prob(y).sum()
    return loss - model.num_rows / len(x) * likelihood


def by_elbo(elbo):
    return lambda model, guide, x, y: elbo.differentiable_loss(model, guide, x, y)


#: ``solver="auto"`` would leave layers plain that have less than two inputs for each row.
#: Whether the guide is written by hand, and a function that makes the loss.
METHODS = {
    "Trace_ELBO": (False, lambda: by_elbo(Trace_ELBO())),
    "plain": (True, lambda: by_elbo(TraceMeanField_ELBO())),
    "local, by hand": (True, lambda: local_by_hand),
    "R2G2 shared": (False, lambda: by_elbo(R2G2_ELBO(solver="cholesky"))),
    "R2G2 local": (False, lambda: by_elbo(R2G2_ELBO(pre_activations="local"))),
}
TRAINED = [name for name in METHODS if name != "Trace_ELBO"]  # that one is timed only
#: For variances at given parameters.
LOSSES = {
    "plain": TraceMeanField_ELBO,
    "R2G2 shared": partial(R2G2_ELBO, solver="cholesky"),
    "R2G2 local": partial(R2G2_ELBO, pre_activations="local"),
}


def load_table(name, data_dir, max_rows):
    """A table with the target last, ``[num_rows, num_features + 1]``, in a fixed random order."""
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.csv.gz"
        if not path.is_file():
            raise SystemExit(f"--data-dir: there is no file {path}. Expected a table there.")
        table = np.loadtxt(path, delimiter=",")
    else:
        with data_of("scikit-learn", ", or tables by --data-dir"):
            from sklearn.datasets import load_diabetes
        table = np.column_stack(load_diabetes(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(table))
    return table[order[:max_rows]]


def split_table(table, seed):
    """Training and test data, standardized by the former, and the scale of the target."""
    order = np.random.default_rng(seed).permutation(len(table))
    train, test = np.split(table[order], [round(0.9 * len(table))])
    mean, scale = train.mean(0), train.std(0)
    scale[scale == 0] = 1.0
    parts = [torch.tensor((t - mean) / scale, dtype=torch.float32) for t in (train, test)]
    return [(t[:, :-1], t[:, -1]) for t in parts], float(scale[-1])


class Run:
    """A network in training, by one of the methods."""

    def __init__(self, method, data, args):
        is_by_hand, make = METHODS[method]
        x, y = data
        pyro.set_rng_seed(args.seed)  # all methods start from the same place
        self.model = BayesianMLP([x.shape[-1], args.width, 1], len(x))
        self.guide = make_guide(self.model, (x, y), args.init_scale)
        if is_by_hand:
            self.guide = MeanField(self.guide)
        self._loss = make()
        self._parameters = [*self.model.parameters(), *self.guide.parameters()]
        self._optim = torch.optim.Adam(self._parameters, args.lr)
        self._data, self._batch_size, self._batches = data, args.batch_size, []

    def step(self):
        x, y = self._data
        if not self._batches:
            rows = torch.randperm(len(x)).split(self._batch_size)
            self._batches = [r for r in rows if len(r) == self._batch_size]
        rows = self._batches.pop()
        loss = self._loss(self.model, self.guide, x[rows], y[rows])
        loss.backward()
        self._optim.step()
        self._optim.zero_grad()

    def evaluate(self, data, scale, num_draws):
        """Mean log density and root mean square error of test data, in units of the table."""
        x, y = data
        with torch.no_grad():
            predict = Predictive(self.model, guide=self.guide, num_samples=num_draws, return_sites=["mean"])
            mean = predict(x)["mean"].reshape(num_draws, -1)
            log_prob = dist.Normal(mean, self.model.noise).log_prob(y) - np.log(scale)
        log_density = torch.logsumexp(log_prob, 0) - np.log(num_draws)
        rmse = scale * (mean.mean(0) - y).square().mean().sqrt()
        return {"log_likelihood": log_density.mean().item(), "rmse": rmse.item()}


def measure_variance(run, data, args):
    """Variance of the plain gradient over that of others, at one batch, by locations and scales."""
    batch = tuple(t[: args.batch_size] for t in data)
    draws = {}
    for name, make in LOSSES.items():
        guide = MeanField(run.guide) if name == "plain" else run.guide
        draws[name] = draw_gradients(make(), run.model, guide, batch, args.num_samples)
    return {
        f"{part}, {name}": variance_ratio(draws["plain"][part], draws[name][part])
        for part in ("loc", "scale")
        for name in LOSSES
        if name != "plain"
    }


def study(name, args):
    """All methods and splits of one table."""
    table = load_table(name, args.data_dir, args.max_rows)
    (train, _), _ = split_table(table, 0)
    runs = {method: Run(method, train, args) for method in METHODS}
    seconds = seconds_of_steps({m: run.step for m, run in runs.items()}, args.num_rounds)
    cost = {m: t / seconds["plain"] for m, t in seconds.items()}
    steps = {m: {"steps": args.num_steps, "time": round(args.num_steps / c)} for m, c in cost.items()}
    scores = {m: {"steps": [], "time": []} for m in TRAINED}
    variance = {}
    for split in range(args.num_splits):
        (train, test), scale = split_table(table, split)
        for method in TRAINED:
            run = Run(method, train, args)
            if split == 0 and method == "R2G2 shared":
                variance["at the start"] = measure_variance(run, train, args)
            for step in tqdm(range(1, max(steps[method].values()) + 1), f"{name} {split} {method}", leave=False):
                run.step()
                for at, last in steps[method].items():
                    if step == last:
                        scores[method][at].append(run.evaluate(test, scale, args.num_draws))
            if split == 0 and method == "R2G2 shared":
                variance["after training"] = measure_variance(run, train, args)
    return {
        "rows": len(table),
        "features": table.shape[1] - 1,
        "splits": args.num_splits,
        "time of a step / plain": cost,
        "plain step, ms": 1e3 * seconds["plain"],
        "steps at equal time": {m: s["time"] for m, s in steps.items()},
        "scores": scores,
        "plain variance / variance": variance,
    }


def compare_with_plain(scores, method, at):
    """The mean difference on the same splits, whose own spread is gone, and its error."""
    pairs = zip(scores[method][at], scores["plain"][at])
    return mean_and_error([a["log_likelihood"] - b["log_likelihood"] for a, b in pairs])


def summarize(results):
    """Rows of the tables of scores, of variances and of times."""
    scores, variances, times = [], [], []
    for name, result in results.items():
        for method in result["scores"]:
            row = {"table": name, "gradient": method}
            for at in ("steps", "time"):
                for key, label in (("log_likelihood", "log lik."), ("rmse", "RMSE")):
                    values = [score[key] for score in result["scores"][method][at]]
                    row[f"{label}, equal {at}"] = cell(*mean_and_error(values))
                row[f"log lik. - plain, equal {at}"] = cell(*compare_with_plain(result["scores"], method, at))
            scores.append(row)
        cost = result["time of a step / plain"]
        times.append({"table": name, **{method: f"{ratio:.2f}" for method, ratio in cost.items()}})
        for when, ratios in result["plain variance / variance"].items():
            cells = {key: f"{value:.2f} ± {error:.1g}" for key, (value, error) in ratios.items()}
            variances.append({"table": name, "": when, **cells})
    return scores, variances, times


def draw(results):
    figure, axes = make_panels(1, len(results), size=(1.9 + 1 / len(results), 3.4))
    for ax, (name, result) in zip(axes, results.items()):
        others = [m for m in result["scores"] if m != "plain"]
        for at, shift, label in (("steps", -0.12, "equal steps"), ("time", 0.12, "equal time")):
            points = [compare_with_plain(result["scores"], method, at) for method in others]
            value, error = np.array(points).T
            ax.errorbar(np.arange(len(others)) + shift, value, np.nan_to_num(error), fmt="o", markersize=4, label=label)
        ax.axhline(0, color=INK, linewidth=1)
        ax.set_xticks(range(len(others)), others, rotation=60, ha="right", fontsize=9)
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("test log-likelihood - plain")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(args):
    set_up(args)
    # Networks of the same names live side by side.
    pyro.settings.set(module_local_params=True)
    if args.smoke_test:
        args.num_steps, args.num_splits, args.num_draws, args.num_samples = 5, 2, 3, 4
        args.num_rounds, args.max_rows, args.tables = 2, 200, args.tables[:1]
    tables = args.tables if args.data_dir else ["diabetes"]
    results = {}
    for name in tables:
        results[name] = study(name, args)
        scores, variances, times = summarize(results)
        endings = {"": scores, "_variance": variances, "_time": times}
        write_results(args, {"tables": results}, endings, partial(draw, results))
    print(tabulate(scores, headers="keys"))
    print("\nProcessor time of a step over that of the plain gradient:")
    print(tabulate(times, headers="keys"))
    print("\nVariance of the plain gradient over that of R2G2_ELBO:")
    print(tabulate(variances, headers="keys"))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", help="folder with tables NAME.csv.gz")
    parser.add_argument("--tables", nargs="+", default=["boston", "concrete", "wine_red", "protein"])
    parser.add_argument("--max-rows", type=int, default=5000, help="of a table, drawn at random")
    parser.add_argument("--num-splits", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--num-draws", type=int, default=200, help="of the posterior, for a prediction")
    parser.add_argument("--num-samples", type=int, default=200, help="of the gradient, for a variance")
    parser.add_argument("--num-rounds", type=int, default=100, help="of steps that are timed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=50, help="of the hidden layer")
    parser.add_argument("--init-scale", type=float, default=0.05, help="of the weights in the guide")
    parser.add_argument("--lr", type=float, default=0.01, help="of Adam")
    run(main, parser)
