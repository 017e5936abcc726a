# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by R2G2_ELBO, for one layer and for whole models.

For one layer: the time that the projection takes, as a multiple of the layer's own plain
step (draw the weights, apply them, take the gradient to inputs, locations and scales),
by width, number of rows and solver. The scales vary by a factor of about 1.35 from
weight to weight, or are shared. For whole models: ``loss_and_grads``, as a multiple of
the plain gradient with analytic KL terms. All that is compared takes turns; the tables give the
medians of the ratios over turns::

    python examples/benchmarks/r2g2_cost.py --json cost.json --csv cost
"""

import argparse
import json
from typing import Any, Callable, Dict, Iterator, Tuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from common import make_parser, medians, ratios, seconds, take_turns, write
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from tqdm import tqdm

from pyro_rb import R2G2_ELBO
from pyro_rb.ops.projection import find_means
from support.command_line import run, set_up
from support.results import write_table

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
        return lambda: find_means(x.detach(), s.detach(), eps, solver)

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
        "auto": R2G2_ELBO(pre_activations="auto"),
    }

    def call(elbo: Any) -> Callable[[], Any]:
        def step() -> None:
            elbo.loss_and_grads(model, guide, *args)
            for p in guide.parameters():
                p.grad = None

        return step

    return {name: call(elbo) for name, elbo in elbos.items()}


def measure(calls: Dict[str, Callable[[], Any]], turns: int, repeats: int) -> Dict[str, Any]:
    """Ratios to ``plain``: median and quartiles over turns."""
    steps = {}
    for name, call in calls.items():
        seconds(call)  # warms up
        steps[name] = lambda call=call: call
    return ratios(take_turns(steps, turns, repeats), "plain", digits=2)


def main(args: argparse.Namespace) -> None:
    set_up(args, args.num_threads)
    widths, batches = ((64,), (32,)) if args.smoke_test else (WIDTHS, ROWS)
    turns = 1 if args.smoke_test else args.num_turns
    results: Dict[str, Any] = {"layers": {}, "models": {}}
    for width in tqdm(widths, disable=args.smoke_test):
        for rows in batches:
            if rows < width:
                repeats = 1 if width * rows > 2**14 else 5
                row = measure(layer_calls(width, rows), turns, repeats)
                results["layers"][f"width {width}, {rows} rows"] = row
    for name, model, data in tqdm(list(models())[: 1 if args.smoke_test else None]):
        pyro.clear_param_store()
        results["models"][name] = measure(model_calls(model, data), turns, 3)
    print(json.dumps(results, indent=1))
    about = {"threads": args.num_threads, "device": args.device, "turns": turns}
    write(args, {**about, "torch": torch.__version__, **results})
    if args.csv:
        for name in ("layers", "models"):
            write_table(f"{args.csv}_{name}.csv", medians(results[name]))


if __name__ == "__main__":
    parser = make_parser(__doc__, csv=False)
    parser.add_argument("--csv", metavar="PREFIX", help="write medians to PREFIX_layers.csv and PREFIX_models.csv")
    parser.add_argument("--num-turns", type=int, default=15, help="blocks of steps of each")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of PyTorch")
    run(main, parser)
