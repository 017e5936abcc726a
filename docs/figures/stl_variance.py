# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Draws the variance of the STL gradient relative to Trace_ELBO, along the scale of a
Normal guide, for ``docs/source/estimators/stl.rst``. Takes about four minutes.

Writes ``variance.png`` and ``variance.json``::

    python docs/figures/stl_variance.py
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_rb import STLTrace_ELBO
from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.show.palette import INK, figure_style

OUT = Path(__file__).resolve().parents[1] / "source" / "_static" / "stl"
OFFSET = 0.3  # of the guide's locations, in standard deviations of the best guide
LOSSES: Dict[str, Callable[[], Trace_ELBO]] = {
    "Trace_ELBO()": Trace_ELBO,
    "STLTrace_ELBO:1.0": partial(STLTrace_ELBO, control_variate_scale=1.0),
    "STLTrace_ELBO()": STLTrace_ELBO,
}


class Problem(NamedTuple):
    title: str
    likelihood: Callable[[Tensor], Any]
    data: Tensor
    best_loc: Tensor
    best_scale: Tensor


def normal_problem() -> Problem:
    """z ~ Normal(0, 1), x ~ Normal(z, 0.5): the best guide is the posterior."""
    x = torch.tensor([0.5, -1.2, 2.0, 0.3])
    return Problem(
        "Normal posterior",
        lambda z: dist.Normal(z, 0.5),
        x,
        best_loc=0.8 * x,
        best_scale=torch.full_like(x, 0.2**0.5),
    )


def poisson_problem() -> Problem:
    """z ~ Normal(0, 1), x ~ Poisson(exp(z)): the best guide by Newton's method."""
    x = torch.tensor([0.0, 1.0, 3.0, 7.0])
    loc, scale = torch.zeros(4), torch.ones(4)
    for _ in range(100):
        mean_rate = (loc + scale**2 / 2).exp()
        loc = loc + (x - mean_rate - loc) / (mean_rate + 1)
        scale = (mean_rate + 1) ** -0.5
    return Problem("Poisson counts", lambda z: dist.Poisson(z.exp()), x, loc, scale)


def measure(
    problem: Problem, ratios: Sequence[float], num_samples: int, num_burn_in: int
) -> Dict[str, list]:
    """Total variance of the gradient at each scale ratio, relative to Trace_ELBO."""

    def model() -> None:
        with pyro.plate("data", len(problem.data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", problem.likelihood(z), obs=problem.data)

    curves: Dict[str, list] = {name: [] for name in LOSSES}
    for ratio in ratios:

        def guide() -> None:
            loc = pyro.param("loc", problem.best_loc + OFFSET * problem.best_scale)
            scale = pyro.param(
                "scale", ratio * problem.best_scale, constraint=constraints.positive
            )
            with pyro.plate("data", len(problem.data)):
                pyro.sample("z", dist.Normal(loc, scale))

        pyro.clear_param_store()
        for name, make_loss in LOSSES.items():
            draws = sample_gradients(
                make_loss(), model, guide, num_samples=num_samples, num_burn_in=num_burn_in, seed=0
            )
            curves[name].append(sum(d.double().var(0).sum().item() for d in draws.values()))
    base = curves.pop("Trace_ELBO()")
    # Four digits are more than the noise leaves.
    return {
        name: [float(f"{v / b:.4g}") for v, b in zip(curve, base)] for name, curve in curves.items()
    }


def exact_normal_ratio(r: np.ndarray) -> np.ndarray:
    """The curve of c = 1 for :func:`normal_problem`, locations and log scales."""
    precision = 5.0
    path = precision * (r - 1 / r) ** 2 + 2 * (r**2 - 1) ** 2 + (r * OFFSET) ** 2
    total = precision * r**2 + 2 * r**4 + (r * OFFSET) ** 2
    return path / total


def draw(ratios: Sequence[float], panels: Dict[str, Dict[str, list]], path: Path) -> None:
    with plt.rc_context(figure_style()):
        fig, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True, layout="constrained")
        for ax, (title, curves) in zip(axes, panels.items()):
            ax.axhline(1, color=INK, linewidth=1)
            ax.text(0.1, 1.15, "Trace_ELBO()", va="bottom", fontsize=8)
            for (name, curve), color, marker in zip(curves.items(), ["C0", "C1"], "os"):
                ax.plot(ratios, curve, marker, color=color, markersize=4, label=name)
            if title == "Normal posterior":
                fine = np.geomspace(min(ratios), max(ratios), 400)
                ax.plot(fine, exact_normal_ratio(fine), color="C0", linewidth=1, label="exact")
            ax.set(title=title, xscale="log", yscale="log", xlabel="guide scale / best scale")
            ax.grid()
        axes[0].set_ylabel("gradient variance / Trace_ELBO()")
        axes[0].legend()
        fig.savefig(path, dpi=140)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--smoke-test", action="store_true", help="few draws, nothing kept")
    args = parser.parse_args()
    num_points, num_samples, num_burn_in = (2, 20, 5) if args.smoke_test else (13, args.num_samples, 200)

    ratios = np.geomspace(0.1, 10, num_points).round(4).tolist()
    problems = [normal_problem(), poisson_problem()]
    panels = {p.title: measure(p, ratios, num_samples, num_burn_in) for p in problems}

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.smoke_test else OUT
        out.mkdir(parents=True, exist_ok=True)
        draw(ratios, panels, out / "variance.png")
        numbers = {"num_samples": num_samples, "offset": OFFSET, "scale_ratio": ratios, **panels}
        text = json.dumps(numbers, indent=1)
        (out / "variance.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
