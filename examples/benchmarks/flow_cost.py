# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Path gradients of flows: time and variance of a gradient by STLTrace_ELBO, as multiples of Trace_ELBO's.

Times are CPU times. The losses take turns, call by call and without an optimizer; the table gives medians over blocks
of 16 calls, each of which holds one update of the adaptive loss. Variances are total variances over all parameters,
with one standard error, after training by the adaptive loss. The model has a curved posterior, a chain of parabolas.
A second table has the time of other estimators with an AutoIAFNormal, and how many times slower they are if the
density is taken through the inverse of the flow::

    python examples/benchmarks/flow_cost.py --json flow_cost.json --csv flow_cost.csv --inverse-csv flow_inverse.csv
"""

from functools import partial
from unittest import mock

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

from pyro_rb import DReG_ELBO, RVRSGuide, STLTrace_ELBO
from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.stats import summary as stats
from pyro_rb.poutine.path_flow import PathFlow
from support.command_line import restart, run, set_up
from support.results import write_table

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


def measure_inverse(dim, count, num_blocks, block_size, start_up):
    """Quartiles of the time through the inverse, as a multiple of that by the draw."""
    model = partial(parabolas, dim)
    guide = AutoIAFNormal(model, num_transforms=count)
    guide()
    rejection = RVRSGuide(model, guide, Z_target=0.3, num_samples=4)
    two = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 0}
    results = {}
    for name, loss, around in (
        ("STLTrace_ELBO, c = 1", STLTrace_ELBO(control_variate_scale=1.0), guide),
        ("DReG_ELBO, 2 particles", DReG_ELBO(**two), guide),
        ("RVRSGuide, 4 samples", Trace_ELBO(), rejection),
    ):
        by_draw = partial(gradient, loss, model, around)

        def through_inverse(by_draw=by_draw):
            with mock.patch.object(PathFlow, "find", lambda fn: None):
                by_draw()

        steps = {"by the draw": lambda by_draw=by_draw: by_draw, "slower": lambda step=through_inverse: step}
        seconds(by_draw, start_up)
        results[name] = ratios(take_turns(steps, num_blocks, block_size), "by the draw", 2)
    return results


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
    rows, inverse = [row(*item) for item in results.items()], []
    for dim, count in ((5, 1), (20, 1), (50, 1), (50, 2))[: 1 if args.smoke_test else None]:
        restart(args.seed)
        name = f"AutoIAFNormal, {dim} dimensions, {layers(count)}"
        results[f"{name}, inverse"] = found = measure_inverse(dim, count, *(min(size, 8) for size in sizes))
        tqdm.write(f"{name} {found}")
        inverse.append(inverse_row(name, found))
    write(args, results, rows)
    if args.inverse_csv:
        write_table(args.inverse_csv, inverse)


def inverse_row(name, found):
    cells = {}
    for key, times in found.items():
        cells[f"{key}: ms"] = times["by the draw, ms"]
        cells[f"{key}: through the inverse"] = times["slower"][0]
    return {"": name, **cells}


def row(name, result):
    cells = {key: "" for key in ("variance, c = 1", "variance, adaptive")}
    for key, value in result.items():
        is_variance = key.startswith("variance")
        cells[key] = "{:.2g} ± {:.1g}".format(*value) if is_variance else value if key.endswith("ms") else value[0]
    order = ("Trace_ELBO, ms", "c = 1", "adaptive", "variance, c = 1", "variance, adaptive")
    return {"": name, **{key: cells[key] for key in order}}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--inverse-csv", help="write the second table to this file")
    parser.add_argument("--num-blocks", type=int, default=20, help="blocks of 16 calls of each loss")
    parser.add_argument("--train-steps", type=int, default=3000, help="training before variances are measured")
    parser.add_argument("--num-samples", type=int, default=1000, help="draws of each gradient")
    run(main, parser)
