# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Path gradients of flows: time and variance of a gradient by STLTrace_ELBO, as multiples of Trace_ELBO's.

Times are those of CPU, of losses that take turns call by call, without an optimiser: medians over blocks of 16
calls, each of which holds one update of the adaptive loss. Variances are total variances over all parameters, with
one standard error, after training by the adaptive loss. The model has a curved posterior, a chain of
parabolas::

    python examples/benchmarks/flow_cost.py --json flow_cost.json --csv flow_cost.csv
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from common import (
    BLOCK,
    START_UP,
    gradient,
    make_parser,
    ratios,
    seconds,
    take_turns,
    write,
)
from pyro.distributions import transforms as T
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from pyro.optim import ClippedAdam
from tqdm import tqdm

from pyro_rb import STLTrace_ELBO
from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.stats import summary as stats
from utils.command_line import restart, run, set_up

LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "c = 1": partial(STLTrace_ELBO, control_variate_scale=1.0),
    "adaptive": STLTrace_ELBO,
}


def parabolas(dim):
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    bend = z[..., 1:] - 0.5 * z[..., :-1].square()
    pyro.sample("x", dist.Normal(bend, 0.5).to_event(1), obs=torch.zeros(dim - 1))


def layers(count):
    return f"{count} layer" + "s" * (count > 1)


def cases():
    """Yields names, models and guides, and whether they are trained."""
    for dim, count in ((5, 1), (20, 1), (50, 1), (50, 2), (50, 5), (200, 1), (200, 2)):
        model = partial(parabolas, dim)
        guide = AutoIAFNormal(model, num_transforms=count)
        yield f"AutoIAFNormal, {dim} dimensions, {layers(count)}", model, guide, count == 1 and dim < 100
    others = (
        ("planar", T.planar, 20, 8, True),
        ("planar", T.planar, 50, 4, False),
        ("planar", T.planar, 200, 4, False),
        ("spline autoregressive", T.spline_autoregressive, 10, 1, True),
        ("block autoregressive", T.block_autoregressive, 10, 1, True),
        ("neural autoregressive", T.neural_autoregressive, 10, 1, False),
        ("radial", T.radial, 20, 4, False),
    )
    for name, layer, dim, count, is_trained in others:
        model = partial(parabolas, dim)
        guide = AutoNormalizingFlow(model, partial(T.iterated, count, layer))
        yield f"{name}, {dim} dimensions, {layers(count)}", model, guide, is_trained


def measure_time(model, guide, num_blocks, block_size, start_up):
    steps = {}
    for name, make in LOSSES.items():
        step = partial(gradient, make(), model, guide)
        seconds(step, start_up)
        steps[name] = lambda step=step: step
    return ratios(take_turns(steps, num_blocks, block_size), "Trace_ELBO", 2)


def measure_variance(model, guide, num_steps, num_samples):
    adaptive = STLTrace_ELBO()
    optim = ClippedAdam({"lr": 0.003, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(model, guide, optim, adaptive)
    for _ in range(num_steps):
        svi.step()
    squares = {}
    for name, make in LOSSES.items():
        loss = adaptive if name == "adaptive" else make()
        found = sample_gradients(loss, model, guide, num_samples=num_samples, seed=0)
        rows = torch.cat([g.reshape(num_samples, -1) for g in found.values()], -1).double()
        squares[name] = (rows - rows.mean(0)).square().sum(-1)
    plain = squares.pop("Trace_ELBO")
    return {f"variance, {name}": stats.ratio_of_means(x, plain) for name, x in squares.items()}


def main(args):
    set_up(args)
    sizes = (1, 2, 1) if args.smoke_test else (args.num_blocks, BLOCK, START_UP)
    num_steps, num_samples = (1, 4) if args.smoke_test else (args.train_steps, args.num_samples)
    results = {}
    for name, model, guide, is_trained in tqdm(list(cases()), disable=args.smoke_test):
        restart(args.seed)
        Trace_ELBO().loss(model, guide)  # sets the guide up
        results[name] = measure_time(model, guide, *sizes)
        if is_trained:
            results[name].update(measure_variance(model, guide, num_steps, num_samples))
        tqdm.write(f"{name} {results[name]}")
    write(args, results, [row(*item) for item in results.items()])


def row(name, result):
    cells = {key: "" for key in ("variance, c = 1", "variance, adaptive")}
    for key, value in result.items():
        is_variance = key.startswith("variance")
        cells[key] = "{:.2g} ± {:.1g}".format(*value) if is_variance else value if key.endswith("ms") else value[0]
    order = ("Trace_ELBO, ms", "c = 1", "adaptive", "variance, c = 1", "variance, adaptive")
    return {"": name, **{key: cells[key] for key in order}}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=20, help="of 16 steps of each loss")
    parser.add_argument("--train-steps", type=int, default=3000, help="before variances are measured")
    parser.add_argument("--num-samples", type=int, default=1000, help="of each gradient")
    run(main, parser)
