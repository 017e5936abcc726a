# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Time of a step of SVI, and how many times faster compiled steps are.

All kinds of steps of a model take turns, block by block, in one process. The table gives the time of a step
of ``SVI`` with the same loss, in microseconds of process CPU time (of wall time on CUDA); the ratio of this
time to that of each other kind of step, as the median over blocks; and the seconds of wall-clock time that
capturing and compiling took. ``replay``, ``Inductor`` and ``unrolled`` are ``CompiledSVI``; ``Inductor in SVI`` is a
compiled loss in ``SVI``. ``RVRSGuide`` is ``Trace_ELBO`` with that guide around ``AutoNormal``::

    python examples/benchmarks/compiled.py --json compiled.json --csv compiled.csv
"""

import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import Vae, make_parser, schools, write
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from tqdm import tqdm

import pyro_rb
from pyro_rb import (
    R2G2_ELBO,
    CompiledSVI,
    DReG_ELBO,
    RaoBlackwell_ELBO,
    RaoBlackwellTopK_ELBO,
    RVRSGuide,
    STLTrace_ELBO,
)
from support.command_line import restart, run, set_up
from support.training import now

VAE = "VAE 784-400-20, batch 256"
#: Steps before a block is timed: adaptive losses learn at each of the first 50.
WARM_UP = 70
LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "STLTrace_ELBO:1.0": lambda: STLTrace_ELBO(control_variate_scale=1.0),
    "STLTrace_ELBO": STLTrace_ELBO,
    "RaoBlackwell_ELBO": RaoBlackwell_ELBO,
    "RaoBlackwellTopK_ELBO": RaoBlackwellTopK_ELBO,
    "R2G2_ELBO": R2G2_ELBO,
    "DReG_ELBO": lambda: DReG_ELBO(num_particles=2, vectorize_particles=True),
    "RVRSGuide": Trace_ELBO,
}
KINDS = ("SVI", "replay", "Inductor in SVI", "Inductor", "unrolled")


def logistic():
    """Seventeen weights, 200 rows."""
    x = torch.randn(200, 17)
    y = torch.bernoulli((x @ torch.randn(17)).sigmoid())

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(17), 1.0).to_event(1))
        with pyro.plate("data", 200):
            logits = (x @ w.unsqueeze(-1)).squeeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


def hierarchical():
    """Five latent sites: intercepts and slopes of ten groups, and what they have in common."""
    x, groups = torch.randn(100), torch.arange(100) % 10
    y = 0.5 * x + 0.3 * groups + 0.2 * torch.randn(100)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 10):
            a = pyro.sample("a", dist.Normal(mu[..., :1], tau[..., :1]))
            b = pyro.sample("b", dist.Normal(mu[..., 1:], tau[..., 1:]))
        with pyro.plate("data", 100):
            pyro.sample("y", dist.Normal(a[..., groups] + b[..., groups] * x, sigma), obs=y)

    return model


def cases():
    """Yields names with models, guides and names of losses."""
    for name, model in (
        ("eight schools", schools()),
        ("logistic, 17 weights", logistic()),
        ("hierarchical, 5 sites", hierarchical()),
    ):
        yield name, model, AutoNormal(model), list(LOSSES)
    vae = Vae(batch_size=256)
    yield VAE, vae.model, vae.guide, ["Trace_ELBO", "STLTrace_ELBO:1.0"]


def make_steps(make_loss, model, guide, kinds, unroll):
    """By kind: a function that makes steps, how many, and seconds that it took to be ready."""
    steps = {}
    for kind in kinds:
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 0.001})
        start = time.perf_counter()
        if kind == "SVI":
            svi = SVI(model, guide, optim, make_loss())
        elif kind == "Inductor in SVI":
            svi = SVI(model, guide, optim, pyro_rb.compile(make_loss(), background=False))
        else:
            backend = "replay" if kind == "replay" else "inductor"
            loss = pyro_rb.compile(make_loss(), backend, background=False)
            svi = CompiledSVI(model, guide, optim, loss, unroll=unroll if kind == "unrolled" else 1)
        for _ in range(WARM_UP):
            svi.step()
        if kind == "unrolled":
            svi.run(2 * unroll, progress_bar=False)
        store = pyro.get_param_store().get_state()
        steps[kind] = svi, store, time.perf_counter() - start
    return steps


def make_block(svi, size):
    if isinstance(svi, CompiledSVI):
        svi.run(size, progress_bar=False)
    else:
        for _ in range(size):
            svi.step()


def measure(make_loss, model, guide, is_large, args):
    kinds = [k for k in KINDS if k in ("SVI", *args.kinds) and (k != "unrolled" or args.unroll > 1)]
    if args.smoke_test:
        kinds = kinds[:2]
    steps = make_steps(make_loss, model, guide, kinds, args.unroll)
    times = {kind: [] for kind in kinds}
    for _ in range(1 if args.smoke_test else args.num_blocks):
        for kind, (svi, store, _) in steps.items():
            pyro.get_param_store().set_state(store)
            size = args.block_size // (10 if kind == "SVI" or is_large else 1) or 1
            make_block(svi, 1)
            start = now()
            make_block(svi, size)
            times[kind].append((now() - start) / size)
    base = np.array(times["SVI"])
    row = {"SVI, us": round(1e6 * float(np.median(base)), 1)}
    plain = steps["SVI"][2]
    for kind in kinds[1:]:
        row[kind] = round(float(np.median(base / np.array(times[kind]))), 2)
        row[f"{kind}, s"] = round(max(steps[kind][2] - plain, 0.0), 1)
    return row


def main(args):
    set_up(args)
    results = {}
    for name, model, guide, losses in cases():
        if args.model not in name:
            continue
        losses = args.loss or (losses[:3] if args.smoke_test else losses)
        for loss in tqdm(losses, disable=args.smoke_test, desc=name):
            restart(args.seed)
            key = f"{name}, {loss}"
            used = RVRSGuide(model, AutoNormal(model)) if loss == "RVRSGuide" else guide
            results[key] = measure(LOSSES[loss], model, used, name == VAE, args)
            print(key, results[key], flush=True)
        if args.smoke_test:
            break
    write(args, results, [{"": name, **row} for name, row in results.items()])


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, default=9)
    parser.add_argument("--block-size", type=int, default=300, help="steps in a block; a tenth of them for SVI")
    parser.add_argument("--unroll", type=int, default=1, help="steps in one graph; timed too if 2 or more")
    parser.add_argument("--model", default="", help="run only models with this in the name")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS, help="of steps, beside those of SVI")
    parser.add_argument("--loss", nargs="+", choices=list(LOSSES), help="instead of all")
    run(main, parser)
