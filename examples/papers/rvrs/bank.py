# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The logistic regression of Jankowiak and Phan (2024), Section 7.2, with the settings of the authors' own script.

The data are those of the authors, ``bank.csv`` of https://github.com/martinjankowiak/rvrs_example_code, of which that
script takes 100 rows. Without its folder rows of the same shape are simulated. A mean-field guide is trained first, and
RVRSGuide takes over from where it ends. Each learning rate falls to a tenth after a third of the steps, and again after
two thirds. Steps are compiled; those of SVI are timed for comparison::

    python examples/papers/rvrs/bank.py --data-dir rvrs_example_code --out bank
"""

from pathlib import Path

import _path  # noqa: F401
import numpy as np
import pyro
import torch
from logistic import make_model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from tqdm import tqdm

import pyro_rb
from pyro_rb import CompiledSVI, RVRSGuide
from support.bounds import elbo
from support.command_line import make_parser, restart, run, set_up
from support.results import report
from support.training import Clock

#: Of the mean-field guide, and of RVRSGuide.
LR, LR_RVRS = 1e-3, 1e-4


def load(folder, num_rows):
    """Features ``[num_rows, 17]``, labels ``[num_rows]``."""
    if folder is None:
        features = torch.randn(num_rows, 17)
        return features, torch.bernoulli((features @ torch.randn(17)).sigmoid())
    table = np.loadtxt(Path(folder) / "bank.csv", delimiter=",", skiprows=1)[:, 1:]  # the first column counts
    rows = np.random.RandomState(0).permutation(len(table))[:num_rows]
    table = torch.tensor(table[rows], dtype=torch.get_default_dtype())
    return table[:, :-1], table[:, -1]


def make_optimizer(lr):
    return pyro.optim.MultiStepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "milestones": [1, 2]})


def train(model, guide, lr, num_steps, args):
    """Microseconds of a step of SVI, and of a compiled one."""
    svi = SVI(model, guide, make_optimizer(0.0), Trace_ELBO())
    svi.step()  # sets the guide up
    with Clock() as eager:
        for _ in range(args.num_timed):
            svi.step()
    optimizer = make_optimizer(lr)
    loss = pyro_rb.compile(Trace_ELBO(), args.backend, background=False)
    svi = CompiledSVI(model, guide, optimizer, loss)
    svi.run(min(100, num_steps), progress_bar=False)
    with Clock() as compiled:
        for _ in range(3):
            svi.run(num_steps // 3, progress_bar=False)
            optimizer.step()
    return 1e6 * eager.seconds / args.num_timed, 1e6 * compiled.seconds / (num_steps // 3 * 3)


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_fit_steps, args.num_steps, args.num_timed, args.num_samples = 6, 6, 2, 100
        args.Z_target, args.seeds, args.backend = [0.3], [0], "replay"
    rows = []

    def add(name, seed, model, guide, lr, num_steps):
        eager, compiled = train(model, guide, lr, num_steps, args)
        bound, error = elbo(model, guide, args.num_samples)
        acceptance = f"{guide.Z.item():.3f}" if isinstance(guide, RVRSGuide) else ""
        row = {"guide": name, "seed": seed, "ELBO": f"{bound:.3f}", "standard error": f"{error:.3f}"}
        row.update({"acceptance": acceptance, "SVI, us": round(eager), "compiled, us": round(compiled)})
        tqdm.write(str(row))
        rows.append(row)

    for seed in args.seeds:
        restart(seed)
        model = make_model(*load(args.data_dir, args.num_rows))
        guide = AutoDiagonalNormal(model, init_scale=0.1)
        add("mean field", seed, model, guide, LR, args.num_fit_steps)
        state = {name: value.detach().clone() for name, value in guide.state_dict().items()}
        for target in args.Z_target:
            guide.load_state_dict(state)
            rvrs = RVRSGuide(model, guide, Z_target=target, epsilon=args.epsilon)
            add(f"RVRS, Z = {target}", seed, model, rvrs, LR_RVRS, args.num_steps)
    report(args, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--data-dir", metavar="FOLDER", help="with bank.csv; default: simulated rows")
    parser.add_argument("--num-rows", type=int, default=100)
    parser.add_argument("--num-fit-steps", type=int, default=30_000, help="of the mean-field guide")
    parser.add_argument("--num-steps", type=int, default=30_000, help="of RVRSGuide")
    parser.add_argument("--num-timed", type=int, default=300, help="steps of SVI that are timed")
    parser.add_argument("--num-samples", type=int, default=100_000, help="of which the ELBO is estimated")
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--epsilon", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--backend", default="inductor", help="of compiled steps")
    run(main, parser)
