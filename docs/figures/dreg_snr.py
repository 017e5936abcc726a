# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Draws, for ``docs/source/estimators/dreg.rst``, the signal-to-noise ratio of the gradient of the
importance-weighted bound along the number of particles, and its variance along the scale
of the guide. Takes about three minutes.

Writes ``snr.png`` and ``snr.json``::

    python docs/figures/dreg_snr.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import RenyiELBO
from torch import Tensor
from tqdm import tqdm

from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.show.palette import INK, figure_style
from pyro_rb.infer import DReG_ELBO

OUT = Path(__file__).resolve().parents[1] / "source" / "_static" / "dreg"
X = 0.5
BEST_LOC, BEST_SCALE = 0.8 * X, 0.2**0.5  # of z ~ Normal(0, 1), x ~ Normal(z, 0.5)
OFFSET = 0.3  # of the guide's location, in units of BEST_SCALE
WIDE = 1.3  # the guide's scale in the left panel, in units of BEST_SCALE
NAMES = {"renyi": "RenyiELBO(alpha=0)", "dreg": "DReG_ELBO()"}


def make_problem(num_copies: int, ratio: float) -> Tuple[Any, Any]:
    """Copies of one datum, each with parameters of its own: a draw of the gradient each."""

    def model() -> None:
        with pyro.plate("copies", num_copies):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.full((num_copies,), X))

    def guide() -> None:
        loc = pyro.param("loc", torch.full((num_copies,), BEST_LOC + OFFSET * BEST_SCALE))
        scale = torch.full((num_copies,), ratio * BEST_SCALE)
        scale = pyro.param("scale", scale, constraint=constraints.positive)
        with pyro.plate("copies", num_copies):
            pyro.sample("z", dist.Normal(loc, scale))

    return model, guide


def draw_gradients(name: str, num_particles: int, ratio: float, num_calls: int) -> Tensor:
    """Draws of the gradient by location and log scale, ``[num_draws, 2]``."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    cls = {"renyi": RenyiELBO, "dreg": DReG_ELBO}[name]
    elbo = cls(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    model, guide = make_problem(1000, ratio)
    rows = []
    for _ in range(num_calls):
        elbo.loss_and_grads(model, guide)
        unconstrained = [pyro.param(p).unconstrained() for p in ("loc", "scale")]
        rows.append(torch.stack([p.grad.double() for p in unconstrained], -1))
        for p in unconstrained:
            p.grad = None
    return torch.cat(rows)


def measure_snr(particles: Sequence[int], num_calls: int) -> Dict[str, List[float]]:
    curves: Dict[str, List[float]] = {name: [] for name in NAMES}
    for num_particles in tqdm(particles):
        draws = {name: draw_gradients(name, num_particles, WIDE, num_calls) for name in NAMES}
        # Both have the same mean, and the second knows it better.
        signal = draws["dreg"].mean(0).abs()
        for name, rows in draws.items():
            curves[name].append(float(f"{(signal / rows.std(0))[0]:.4g}"))
    return curves


def fit_slope(particles: Sequence[int], curve: Sequence[float]) -> float:
    """Of log SNR on log K, from the middle of the range on."""
    start = len(particles) // 2
    x, y = np.log(particles[start:]), np.log(curve[start:])
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def measure_variance(
    ratios: Sequence[float], particles: Sequence[int], num_calls: int, num_samples: int
) -> Dict[str, List[float]]:
    """Total variance of DReG_ELBO's gradient over that of RenyiELBO's."""

    def total(rows: Tensor) -> float:
        return rows.var(0).sum().item()

    curves: Dict[str, List[float]] = {}
    for ratio in tqdm(ratios):
        for k in particles:
            base = total(draw_gradients("renyi", k, ratio, num_calls))
            plain = total(draw_gradients("dreg", k, ratio, num_calls))
            curves.setdefault(f"K = {k}", []).append(float(f"{plain / base:.4g}"))
            if k == 8:
                # One draw a step, as in training, else it would learn too well.
                pyro.clear_param_store()
                elbo = DReG_ELBO(
                    k, 1, vectorize_particles=True, control_variate_scale="adaptive"
                )
                model, guide = make_problem(1, ratio)
                guide()
                draws = sample_gradients(
                    elbo, model, guide, num_samples=num_samples, num_burn_in=200, seed=0
                )
                both = torch.cat(list(draws.values()), -1).double()
                curves.setdefault("K = 8, adaptive", []).append(
                    float(f"{total(both) / base:.4g}")
                )
    return curves


def draw(numbers: Dict[str, Any], path: Path) -> None:
    with plt.rc_context(figure_style()):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for (name, curve), color, marker in zip(numbers["snr"].items(), [INK, "C0"], "so"):
            label = f"{NAMES[name]}, slope {numbers['slope'][name]:.2f}"
            left.plot(numbers["particles"], curve, marker + "-", color=color, markersize=4, label=label)
        left.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal-to-noise ratio")
        left.set_title(f"location, guide scale {WIDE} x best")
        styles = {"K = 2": ("C0", "o-"), "K = 8": ("C1", "o-"), "K = 64": ("C2", "o-")}
        for name, curve in numbers["variance"].items():
            color, style = styles.get(name, ("C1", "s--"))
            right.plot(numbers["scale_ratio"], curve, style, color=color, markersize=4, label=name)
        right.axhline(1, color=INK, linewidth=1)
        right.set(xscale="log", yscale="log", xlabel="guide scale / best scale")
        right.set_ylabel("gradient variance / RenyiELBO")
        for ax in (left, right):
            ax.grid()
            ax.legend()
        fig.savefig(path, dpi=140)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num-calls", type=int, default=40, help="of 1000 draws each")
    parser.add_argument("--num-samples", type=int, default=2000, help="of the adaptive scale")
    parser.add_argument("--smoke-test", action="store_true", help="few draws, nothing kept")
    args = parser.parse_args()
    num_calls, num_samples = (1, 20) if args.smoke_test else (args.num_calls, args.num_samples)
    most, num_ratios = (3, 2) if args.smoke_test else (10, 9)

    particles = [2**i for i in range(1, most + 1)]
    snr = measure_snr(particles, num_calls)
    ratios = np.geomspace(0.1, 10, num_ratios).round(4).tolist()
    numbers = {
        "num_draws": 1000 * num_calls,
        "offset": OFFSET,
        "particles": particles,
        "snr": snr,
        "slope": {name: fit_slope(particles, curve) for name, curve in snr.items()},
        "scale_ratio": ratios,
        "variance": measure_variance(ratios, (2, 8, 64), num_calls, num_samples),
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.smoke_test else OUT
        out.mkdir(parents=True, exist_ok=True)
        draw(numbers, out / "snr.png")
        (out / "snr.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
