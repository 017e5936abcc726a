# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance of the plain gradient over that of R2G2_ELBO, both with analytic KL terms.

The table gives the ratio of the total variances, summed over locations and over scales: above 1,
R2G2_ELBO is better. ``shared`` has one draw of the weights for all rows, ``local`` one for each
row. Parameters are held fixed::

    python examples/benchmarks/r2g2_variance.py --json variance.json --csv variance.csv
"""

import argparse
from functools import partial
from typing import Any, Callable, Dict, Iterator, Tuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from common import make_parser, write
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_mean
from pyro.nn import PyroModule, PyroSample
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.diagnostics import sample_gradients
from support.command_line import run, set_up

Pair = Tuple[Callable, Callable]


class Net(PyroModule):
    """A multi-layer perceptron with one output and standard normal weights."""

    def __init__(self, sizes: Tuple[int, ...], rows: int) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        self.x, self.y = torch.randn(rows, sizes[0]), torch.randn(rows)
        for i, (k, h) in enumerate(zip(sizes, sizes[1:])):
            layer = PyroModule[torch.nn.Linear](k, h)
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([h, k]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([h]).to_event(1))
            setattr(self, f"layer{i}", layer)

    def forward(self) -> None:
        x = self.x
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x if i == 0 else torch.relu(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x.squeeze(-1), 1.0), obs=self.y)


def autoguide(make: Any, sizes: Tuple[int, ...], rows: int) -> Pair:
    model = Net(sizes, rows)
    guide = make(model, init_loc_fn=init_to_mean, init_scale=0.1)
    guide()
    return model, guide


def he(width: int, rows: int) -> Pair:
    """Three layers, He-initialized locations, scales of 0.3 / sqrt(width)."""
    model = Net((width, width, width, 1), rows)
    guide = AutoNormal(model, init_loc_fn=init_to_mean, init_scale=0.3 * width**-0.5)
    guide()
    with torch.no_grad():
        for name, p in guide.locs.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, (2 / width) ** 0.5)
    return model, guide


def vector(kind: str, n: int, predict: Callable, y: torch.Tensor, is_binary: bool) -> Pair:
    """One Gaussian vector with a hand-written guide."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        z = predict(w)
        fn = dist.Bernoulli(logits=z) if is_binary else dist.Normal(z, 0.3)
        pyro.sample("y", fn.to_event(z.dim()), obs=y)

    def guide() -> None:
        loc = pyro.param("loc", lambda: 0.3 * torch.randn(n))
        if kind == "diagonal":
            scale = pyro.param("scale", lambda: 0.5 * torch.ones(n), constraint=constraints.positive)
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))
        else:
            tril = pyro.param("scale", lambda: 0.5 * torch.eye(n), constraint=constraints.lower_cholesky)
            pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))

    guide()
    return model, guide


def cases() -> Iterator[Tuple[str, Callable[[], Pair]]]:
    x, y = torch.randn(6, 60), torch.ones(6)
    for kind in ("diagonal", "scale_tril"):
        name = f"logistic regression, 60 inputs, 6 rows, {kind}"
        yield name, partial(vector, kind, 60, lambda w: x @ w, y, True)
    k = (-0.5 * (torch.randn(5, 1) - torch.randn(30)).square()).exp()
    yield "Gaussian process, 30 values, 5 rows", partial(
        vector, "scale_tril", 30, lambda w: k @ w, y[:5], False
    )
    image = 0.1 * torch.randn(1, 16, 4, 4)

    def conv(w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(image, w.reshape(16, 16, 3, 3)).tanh()

    yield "convolution, 16 channels, 3 x 3, 4 positions", partial(
        vector, "diagonal", 16 * 144, conv, torch.ones(1, 16, 2, 2), False
    )
    for make in (AutoNormal, AutoDiagonalNormal):
        name = f"BNN 60-40-40-1, 6 rows, {make.__name__}"
        yield name, partial(autoguide, make, (60, 40, 40, 1), 6)
    for width, rows in ((64, 2), (64, 4), (64, 8), (64, 16), (64, 32), (256, 8), (256, 32)):
        name = f"3 layers of width {width}, {rows} rows"
        yield name, partial(he, width, rows)


def variances(elbo: R2G2_ELBO, pair: Pair, num_samples: int, seed: int) -> Dict[str, float]:
    found = {"locations": 0.0, "scales": 0.0}
    samples = sample_gradients(elbo, *pair, num_samples=num_samples, seed=seed)
    for name, values in samples.items():
        kind = "scales" if "scale" in name else "locations"
        found[kind] += values.var(0).sum().item()
    return found


def main(args: argparse.Namespace) -> None:
    set_up(args, args.num_threads)
    num_samples = 5 if args.smoke_test else args.num_samples
    results: Dict[str, Dict[str, Any]] = {}
    for name, make in tqdm(list(cases())[: 2 if args.smoke_test else None], disable=args.smoke_test):
        pyro.clear_param_store()
        pair = make()
        plain = R2G2_ELBO(num_steps=1)
        plain.loss_and_grads(*pair)
        base = variances(plain, pair, num_samples, args.seed)
        row = {}
        for mode in ("shared", "local"):
            elbo = R2G2_ELBO(pre_activations=mode, solver="cg")
            ours = variances(elbo, pair, num_samples, args.seed + 1)
            for kind in base:
                row[f"{mode}, {kind}"] = round(base[kind] / ours[kind], 2)
        results[name] = row
        print(name, row)
    about = {"samples": num_samples, "seed": args.seed, "torch": torch.__version__}
    rows = [{"": name, **row} for name, row in results.items()]
    write(args, {**about, "ratios": results}, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-samples", type=int, default=300, help="draws of each gradient")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of PyTorch")
    run(main, parser)
