# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a gradient by a loss in a GradientGuard, as a multiple of that of the loss alone.

Both take turns, call by call and without an optimizer. The table gives the median of the ratio over
blocks of 16 calls, and the quartiles. A bad step is one whose gradient is NaN; its time includes
the search for the first bad number::

    python examples/benchmarks/guard_cost.py --json cost.json --csv cost.csv
"""

from functools import partial

import pyro
import pyro.distributions as dist
from common import (
    BLOCK,
    Vae,
    gradient,
    make_parser,
    quartiles,
    schools,
    seconds,
    take_turns,
    write,
)
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from tqdm import tqdm

from pyro_rb import GradientGuard, STLTrace_ELBO
from support.command_line import restart, run, set_up


def bad_schools():
    """The eight schools, with a term of value 0 whose derivative is not finite."""
    schools()()
    extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
    pyro.factor("root", (0 * extra).sqrt())


def cases():
    """Yields names with losses, models and guides, and whether steps are bad."""
    model = schools()
    guide = AutoNormal(model)
    yield "eight schools, AutoNormal, Trace_ELBO", Trace_ELBO, model, guide, False
    stl = partial(STLTrace_ELBO, control_variate_scale=1.0)
    yield "eight schools, AutoNormal, STLTrace_ELBO:1.0", stl, model, guide, False
    vae = Vae(batch_size=256)
    yield "VAE 784-400-20, batch 256, Trace_ELBO", Trace_ELBO, vae.model, vae.guide, False
    yield "eight schools, bad steps, Trace_ELBO", Trace_ELBO, bad_schools, AutoNormal(bad_schools), True


def measure(make_loss, model, guide, num_blocks, is_bad):
    losses = {"plain": make_loss(), "guarded": GradientGuard(make_loss(), on_bad="skip", max_skipped=10**9)}
    block_size = 1 if is_bad else BLOCK
    steps = {}
    for name, loss in losses.items():
        step = partial(gradient, loss, model, guide)
        seconds(step, block_size)
        steps[name] = lambda step=step: step
    times = take_turns(steps, num_blocks, block_size)
    guard = losses["guarded"]
    assert guard.num_skipped == (guard.num_steps if is_bad else 0)
    return quartiles([a / b for a, b in zip(times["guarded"], times["plain"])])


def main(args):
    set_up(args)
    results = {}
    for name, make_loss, model, guide, is_bad in tqdm(list(cases()), disable=args.smoke_test):
        restart(args.seed)
        Trace_ELBO().loss(model, guide)  # sets the guide up
        num_blocks = 1 if args.smoke_test else args.num_blocks
        results[name] = measure(make_loss, model, guide, num_blocks, is_bad)
        print(name, results[name])
    columns = ("median", "lower quartile", "upper quartile")
    write(args, results, [{"": name, **dict(zip(columns, row))} for name, row in results.items()])


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=60, help="blocks of 16 calls of each")
    run(main, parser)
