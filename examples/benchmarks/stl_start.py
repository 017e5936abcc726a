# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Narrow or wide: at which ``init_scale`` should an AutoNormal start?

Pyro's default is 0.1, and its advice is to start narrow. There the gradient of STLTrace_ELBO:1.0 is noisy. From both
starts, guides are trained by three losses, with Adam at the same learning rate. The table says how many nats the ELBO
is below the best mean of the table after some numbers of steps: mean over seeds, with its standard error::

    python examples/benchmarks/stl_start.py --json start.json --csv start.csv
"""

import pyro
import pyro.distributions as dist
import torch
from common import make_parser, schools, write
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_median
from tqdm import tqdm

from pyro_rb.diagnostics.run.losses import make_loss
from support.bounds import elbo
from support.command_line import restart, run, set_up

LOSSES = ["Trace_ELBO", "STLTrace_ELBO", "STLTrace_ELBO:1.0"]
STARTS = [0.1, 1.0]


def regression(num_rows=200, num_features=10):
    """A linear regression with a noise, on simulated rows."""
    restart(0)
    features = torch.randn(num_rows, num_features)
    outcome = features @ torch.linspace(-1.0, 1.0, num_features) + 0.5 * torch.randn(num_rows)

    def model():
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([num_features]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("rows", num_rows):
            pyro.sample("outcome", dist.Normal((features * weights).sum(-1), noise), obs=outcome)

    return model


def train(model, loss, init_scale, seed, steps, lr, num_samples):
    """The ELBO after each of these numbers of steps."""
    restart(seed)
    guide = AutoNormal(model, init_loc_fn=init_to_median, init_scale=init_scale)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), make_loss(loss))
    found = []
    for done in range(1, max(steps) + 1):
        svi.step()
        if done in steps:
            with torch.random.fork_rng():
                torch.manual_seed(1)  # the same noise for all
                found.append(elbo(model, guide, num_samples)[0])
    return found


def main(args):
    set_up(args)
    pyro.enable_validation(False)
    steps = [2, 4] if args.smoke_test else [50, 200, 1000]
    seeds = range(2 if args.smoke_test else 3)
    num_samples = 20 if args.smoke_test else 4000
    results, rows = {}, []
    with tqdm(total=2 * len(LOSSES) * len(STARTS) * len(seeds)) as progress:
        for title, model in {"eight schools": schools(), "regression": regression()}.items():
            ends = {}
            for init_scale in STARTS:
                for loss in LOSSES:
                    found = []
                    for seed in seeds:
                        found.append(train(model, loss, init_scale, seed, steps, args.lr, num_samples))
                        progress.update()
                    ends[init_scale, loss] = torch.tensor(found)
            best = max(end.mean(0).max().item() for end in ends.values())
            for (init_scale, loss), end in ends.items():
                gap = best - end
                mean, error = gap.mean(0).tolist(), (gap.std(0) / len(seeds) ** 0.5).tolist()
                results[f"{title}, init_scale={init_scale}, {loss}"] = {"elbo": end.tolist()}
                cells = {f"{s} steps": f"{m:.2f} ± {e:.2f}" for s, m, e in zip(steps, mean, error)}
                rows.append({"Model": title, "init_scale": init_scale, "Loss": loss, **cells})
    for row in rows:
        print(" | ".join(map(str, row.values())))
    write(args, {"steps": steps, "lr": args.lr, "results": results}, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of Adam")
    run(main, parser)
