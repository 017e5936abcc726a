# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by R2G2_ELBO, for one layer and for whole models.

For one layer: the time that the projection takes, as a multiple of the layer's own plain
step (draw the weights, apply them, take the gradient to inputs, locations and scales),
by width, number of rows and solver. The scales vary by a factor of about 1.35 from
weight to weight, or are shared. For whole models: ``loss_and_grads``, as a multiple of
the plain gradient with analytic KL terms. All that is compared takes turns; given are
the medians over turns of the ratios::

    python examples/benchmarks/r2g2_cost.py --json cost.json --csv cost
"""

import argparse
import csv
import json
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.ops.projection import project_rows

WIDTHS = (64, 128, 256, 512, 1024)
ROWS = (32, 64, 128, 256)
#: Cholesky and QR are left out where they take this many operations.
TOO_LONG = 2e10


class BayesianMLP(PyroModule):
    """Weights and biases N(0, 1 / inputs), and ten classes."""

    def __init__(self, sizes: Tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        for i, (k, h) in enumerate(zip(sizes, sizes[1:])):
            layer = PyroModule[torch.nn.Linear](k, h)
            prior = dist.Normal(0.0, k**-0.5)
            layer.weight = PyroSample(prior.expand([h, k]).to_event(2))
            layer.bias = PyroSample(prior.expand([h]).to_event(1))
            setattr(self, f"layer{i}", layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x if i == 0 else torch.relu(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x), obs=y)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], repeats: int) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    sync()
    return (time.perf_counter() - start) / repeats


def layer_calls(width: int, rows: int) -> Dict[str, Callable[[], Any]]:
    """The plain step of a layer, and the projection by each solver."""
    x = torch.randn(rows, width).relu().requires_grad_()
    loc = (torch.randn(width, width) * width**-0.5).requires_grad_()
    scale = (0.1 * width**-0.5 * (0.3 * torch.randn(width, width)).exp()).requires_grad_()
    shared = torch.full((width, width), 0.1 * width**-0.5)
    eps = torch.randn(width, width)

    def plain() -> None:
        z = F.linear(x, loc + scale * torch.randn_like(scale))
        torch.autograd.grad(z.sum(), [x, loc, scale])

    def solve(solver: str, s: torch.Tensor) -> Callable[[], Any]:
        return lambda: project_rows(x.detach(), s.detach(), eps, solver)

    calls = {"plain": plain, "cg": solve("cg", scale), "cg, shared scale": solve("cg", shared)}
    if width * rows * rows * (width + rows) <= TOO_LONG:
        calls["cholesky"] = solve("cholesky", scale)
        calls["qr"] = solve("qr", scale)
    return calls


def models() -> Iterator[Tuple[str, Any, Tuple[torch.Tensor, ...]]]:
    for sizes, rows in (
        ((60, 40, 40, 10), 6),
        ((784, 400, 400, 10), 16),
        ((784, 400, 400, 10), 64),
        ((784, 400, 400, 10), 256),
    ):
        name = "-".join(map(str, sizes)) + f", batch {rows}"
        x, y = torch.rand(rows, sizes[0]), torch.randint(0, 10, (rows,))
        yield name, BayesianMLP(sizes), (x, y)


def model_calls(model: Any, args: Tuple[torch.Tensor, ...]) -> Dict[str, Callable[[], Any]]:
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.01)
    guide(*args)
    with torch.no_grad():
        for name, p in guide.named_parameters():
            if name.startswith("scales"):
                p.add_(0.3 * torch.randn_like(p))
    spent = R2G2_ELBO(num_steps=1)
    spent.loss_and_grads(model, guide, *args)
    elbos = {
        "plain": spent,
        "Trace_ELBO": Trace_ELBO(),
        "shared": R2G2_ELBO(),
        "shared, always": R2G2_ELBO(solver="cg"),
        "local": R2G2_ELBO(pre_activations="local"),
    }

    def call(elbo: Any) -> Callable[[], Any]:
        def step() -> None:
            elbo.loss_and_grads(model, guide, *args)
            for p in guide.parameters():
                p.grad = None

        return step

    return {name: call(elbo) for name, elbo in elbos.items()}


def take_turns(calls: Dict[str, Callable[[], Any]], turns: int, repeats: int) -> Dict[str, Any]:
    """Ratios to ``plain``: median and quartiles over turns."""
    times: Dict[str, List[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats))
    base = np.array(times["plain"])
    found: Dict[str, Any] = {"plain, ms": round(1e3 * float(np.median(base)), 3)}
    for name, values in times.items():
        if name != "plain":
            quartiles = np.quantile(np.array(values) / base, [0.5, 0.25, 0.75])
            found[name] = [round(float(q), 2) for q in quartiles]
    return found


def write(path: str, rows: Dict[str, Dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    with open(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *columns])
        for name, row in rows.items():
            cells = [row.get(c, "") for c in columns]
            writer.writerow([name, *(c[0] if isinstance(c, list) else c for c in cells)])


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.num_threads)
    torch.set_default_device(args.device)
    pyro.set_rng_seed(args.seed)
    widths, batches = ((64,), (32,)) if args.smoke_test else (WIDTHS, ROWS)
    turns = 1 if args.smoke_test else args.num_turns
    results: Dict[str, Any] = {"layers": {}, "models": {}}
    for width in tqdm(widths, disable=args.smoke_test):
        for rows in batches:
            if rows < width:
                repeats = 1 if width * rows > 2**14 else 5
                row = take_turns(layer_calls(width, rows), turns, repeats)
                results["layers"][f"width {width}, {rows} rows"] = row
    for name, model, data in tqdm(list(models())[: 1 if args.smoke_test else None]):
        pyro.clear_param_store()
        results["models"][name] = take_turns(model_calls(model, data), turns, 3)
    print(json.dumps(results, indent=1))
    if args.json:
        about = {"threads": args.num_threads, "device": args.device, "turns": turns}
        with open(args.json, "w") as file:
            json.dump({**about, "torch": torch.__version__, **results}, file, indent=1)
    if args.csv:
        for name in ("layers", "models"):
            write(f"{args.csv}_{name}.csv", results[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-turns", type=int, default=15)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write medians and quartiles to this file")
    parser.add_argument("--csv", help="write medians to two files with this prefix")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
