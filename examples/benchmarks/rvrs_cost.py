# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a step with RVRSGuide, as a multiple of one with the guide that it is made of.

Both are steps of SVI with ``Trace_ELBO`` and Adam, on the same model, taken in turn. The proposal
was fitted before. The results are the median of the ratio over blocks, and the quartiles; the
number of proposals for an accepted draw; and where the time goes. For latents in a local plate the
ratio is given with and without ``local_size``. On a CPU the time is that of one thread of the
processor, which other programs do not stretch::

    python examples/benchmarks/rvrs_cost.py --json cost.json
"""

import contextlib
import json
import warnings
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import make_parser, quartiles, schools, seconds, take_turns, write
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from tqdm import tqdm

from pyro_rb import RVRSGuide
from pyro_rb.infer import rvrs_guide, rvrs_proposals
from support.command_line import restart, run, set_up
from support.training import Clock

BLOCK = 10

#: Parts of a step: where they are, and what they do.
PARTS = {
    "propose: guide and model": (rvrs_guide.RVRSGuide, "_sample"),
    "of this, the guide": (rvrs_proposals.Proposer, "draw"),
    "of this, the model": (rvrs_proposals.Proposer, "evaluate"),
    "weights and path of log q": (rvrs_guide, "compute_surrogate"),
    "emit": (rvrs_guide.RVRSGuide, "_emit"),
    "adapt the threshold": (rvrs_guide.RVRSGuide, "_adapt"),
    "traces of Trace_ELBO, with all of the above": (Trace_ELBO, "_get_trace"),
    "backward": (torch.Tensor, "backward"),
}


def one():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=torch.tensor(3.0))


class Logistic:
    def __init__(self, num_rows=100, num_features=17, is_vectorized=True):
        self.x = torch.randn(num_rows, num_features)
        self.y = torch.bernoulli((1.5 * self.x[:, 0] - self.x[:, 1]).sigmoid())
        self.is_vectorized = is_vectorized

    def __call__(self):
        zeros = torch.zeros(self.x.shape[1])
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        logits = w @ self.x.T
        if self.is_vectorized and w.dim() > 1:
            logits = logits.squeeze(-2)  # the dim of the plate
        with pyro.plate("rows", len(self.x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=self.y)


def cases():
    yield "one latent", one
    yield "logistic regression, 17 features", Logistic()
    yield "the same, by torch.vmap", Logistic(is_vectorized=False)
    yield "eight schools", schools()


def make(model, proposal, **options):
    guide = RVRSGuide(model, proposal, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    return guide, svi


def measure(model, args, fit_steps):
    proposal = AutoDiagonalNormal(model, init_scale=0.3)
    base = SVI(model, proposal, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    seconds(base.step, fit_steps)
    base = SVI(model, proposal, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    pairs = {}
    for num_samples in args.num_samples:
        pairs[num_samples] = make(model, proposal, num_samples=num_samples)
        # RVRSGuide warns of the model that is run by torch.vmap.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            seconds(pairs[num_samples][1].step, 20 if not args.smoke_test else 2)
    svis = {"base": base, **{num_samples: svi for num_samples, (_, svi) in pairs.items()}}
    times = take_turns({name: lambda svi=svi: svi.step for name, svi in svis.items()}, args.num_blocks, BLOCK)
    base_times = np.array(times["base"])
    result = {"base, ms": round(1e3 * float(np.median(base_times)), 3)}
    for num_samples, (guide, svi) in pairs.items():
        result[f"S = {num_samples}"] = {
            "ratio": quartiles(np.array(times[num_samples]) / base_times),
            "acceptance": round(guide.Z.item(), 3),
            "proposed / accepted": proposed(guide, svi, 5 if args.smoke_test else 50),
        }
    guide, svi = pairs[args.num_samples[0]]
    result["share of the step"] = shares(svi, 3 if args.smoke_test else 100)
    return result


class Items:
    """A latent and an observation for each of many items."""

    def __init__(self, num_items):
        self.x = 1.0 + torch.randn(num_items)

    def __call__(self):
        with pyro.plate("items", len(self.x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=self.x)


def measure_local(num_items, args):
    model = Items(num_items)
    proposal = AutoNormal(model, init_scale=0.3)
    base = SVI(model, proposal, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svis = {"base": base}
    for name, options in {"local_size": {"local_size": num_items}, "none": {}}.items():
        _, svis[name] = make(model, proposal, local_plate="items", **options)
    for svi in svis.values():
        seconds(svi.step, 2 if args.smoke_test else 20)
    times = take_turns({name: lambda svi=svi: svi.step for name, svi in svis.items()}, args.num_blocks // 4 or 1, 2)
    base_times = np.array(times.pop("base"))
    return {name: quartiles(np.array(x) / base_times) for name, x in times.items()}


def proposed(guide, svi, num_steps):
    """Proposals up to the last one that is needed, and made, for an accepted draw."""
    needed = made = 0
    sample = type(guide)._sample

    def counted(self, *args):
        nonlocal needed, made
        accepted = sample(self, *args)
        needed += int(accepted.num_proposed)
        made += accepted.num_log_weights
        return accepted

    with mock.patch.object(type(guide), "_sample", counted):
        seconds(svi.step, num_steps)
    total = num_steps * guide.num_samples
    return [round(needed / total, 2), round(made / total, 2)]


def shares(svi, num_steps):
    clocks = {name: Clock() for name in PARTS}

    def timed(clock, fn):
        def wrapper(*args, **kwargs):
            with clock:
                return fn(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            fn = timed(clocks[name], getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, fn))
        total = seconds(svi.step, num_steps)
    return {name: round(clock.seconds / total, 3) for name, clock in clocks.items()}


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_blocks, args.num_samples, args.num_items = 1, [2], [100]
    results = {"torch": torch.__version__, "pyro": pyro.__version__, "device": args.device}
    for name, model in tqdm(list(cases())[: 2 if args.smoke_test else None], disable=args.smoke_test):
        restart(args.seed)
        results[name] = measure(model, args, 10 if args.smoke_test else 1000)
        print(name, json.dumps(results[name]))
    for num_items in args.num_items:
        restart(args.seed)
        name = f"local plate, {num_items} items"
        results[name] = measure_local(num_items, args)
        print(name, json.dumps(results[name]))
    write(args, results)


if __name__ == "__main__":
    parser = make_parser(__doc__, csv=False)
    parser.add_argument("--num-blocks", type=int, default=40, help="blocks of 10 steps of each")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[2, 8, 32, 128], help="accepted draws per step")
    parser.add_argument("--num-items", type=int, nargs="+", default=[100, 10000, 100000], help="items of a local plate")
    run(main, parser)
