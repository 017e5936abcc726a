# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Training with an optimizer of PyTorch, in the manner of Lightning, in one or several processes.

loss(model, guide) is a torch.nn.Module; from there on all is PyTorch. The class Training has the
methods that a LightningModule has, and fit does what its trainer does. With --num-processes 2
each process has its part of the data and DistributedDataParallel averages the gradients, by gloo
on this machine::

    python examples/lightning_style.py --loss Trace_ELBO STLTrace_ELBO --num-processes 2

The model is probabilistic principal component analysis with an amortised guide, on simulated
data. The guide can be exact, so the ELBO ought to come up to the highest likelihood, which linear
algebra gives (Tipping and Bishop 1999). The table gives the ELBO of an item in nats, how far it is
from there, and the seconds of training.
"""

import math
import socket
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

from pyro_rb import GradientGuard
from pyro_rb.diagnostics.run.losses import make_loss
from utils.command_line import make_parser, run
from utils.losses import add_loss_option, train_each
from utils.results import report
from utils.training import Clock

NUM_FEATURES, NUM_FACTORS = 10, 3


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.loadings = nn.Parameter(0.1 * torch.randn(NUM_FACTORS, NUM_FEATURES))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("items", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_FACTORS), 1.0).to_event(1))
            features = dist.Normal(z @ self.loadings, self.log_noise.exp())
            pyro.sample("x", features.to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(NUM_FEATURES, NUM_FACTORS)
        self.log_scale = nn.Parameter(torch.zeros(NUM_FACTORS))

    def forward(self, x):
        with pyro.plate("items", len(x)):
            code = dist.Normal(self.encoder(x), self.log_scale.exp())
            pyro.sample("z", code.to_event(1))


class Training(nn.Module):
    """With ``lightning`` installed, this would be a LightningModule as it stands."""

    def __init__(self, loss, lr, num_steps):
        super().__init__()
        self.guard = GradientGuard(make_loss(loss))
        self.elbo = self.guard(Model(), Guide())
        self.lr, self.num_steps = lr, num_steps

    def forward(self, batch):
        return self.elbo(batch) / len(batch)

    def training_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        optim = self.guard.watch(torch.optim.Adam(self.parameters(), lr=self.lr))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.03 ** (1 / self.num_steps))
        return [optim], [schedule]


def fit(training, data, batch_size, device, progress):
    """What the trainer does. The module may be that of several processes."""
    data = data.to(device)
    parallel = torch.distributed.is_initialized()
    step_of = DistributedDataParallel(training) if parallel else training
    (optim,), (schedule,) = training.configure_optimizers()
    for i in progress:
        batch = data[torch.randint(len(data), (batch_size,))]
        optim.zero_grad()
        loss = step_of(batch)
        loss.backward()
        optim.step()
        schedule.step()
        if i % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def simulate(num_items):
    randn = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    z = randn(num_items, NUM_FACTORS)
    return z @ randn(NUM_FACTORS, NUM_FEATURES) + 0.5 * randn(num_items, NUM_FEATURES)


def highest_likelihood(data):
    """The highest log likelihood of an item, from the eigenvalues of the covariance."""
    eigenvalues = torch.linalg.eigvalsh(data.T @ data / len(data)).flip(0)
    noise = eigenvalues[NUM_FACTORS:].mean()
    log_det = eigenvalues[:NUM_FACTORS].log().sum() + (NUM_FEATURES - NUM_FACTORS) * noise.log()
    return -0.5 * (NUM_FEATURES * math.log(2 * math.pi) + log_det.item() + NUM_FEATURES)


def evaluate(training, data, num_draws=100):
    """The ELBO of an item, in nats."""
    elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(training.elbo.model, training.elbo.guide, data) / len(data)


def train(name, rank, args):
    """Training by the loss of that name, in one process of several; a row of the table."""
    pyro.set_rng_seed(args.seed)  # the same start in all processes
    training = Training(name, args.lr, args.num_steps)
    pyro.set_rng_seed(args.seed + rank)  # and other random numbers
    data = simulate(args.num_items)
    part = data.chunk(args.num_processes)[rank]
    progress = trange(args.num_steps, desc=name, leave=False, disable=rank > 0 or None)
    with Clock() as clock:
        fit(training, part, args.batch_size, args.device, progress)
    elbo, highest = evaluate(training, data.to(args.device)), highest_likelihood(data)
    return {
        "loss": name,
        "processes": args.num_processes,
        "ELBO": f"{elbo:.3f}",
        "below the highest likelihood": f"{highest - elbo:.3f}",
        "seconds": f"{clock.seconds:.1f}",
    }


def work(rank, args, port=None):
    """One process, of ``args.num_processes``; the first one reports."""
    torch.set_default_device(args.device)
    if port is not None:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=args.num_processes,
        )
    try:
        # Parameters belong to the modules, and not to Pyro's param store.
        with pyro.settings.context(module_local_params=True):
            rows = train_each(args.loss, train, rank, args)
        if rank == 0:
            report(args, rows)
    finally:
        if port is not None:
            torch.distributed.destroy_process_group()


def work_quietly(rank, args, port):
    """Of several processes, the first one says why they end."""
    try:
        work(rank, args, port)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as error:
        if rank == 0:
            print(error, file=sys.stderr)
        sys.exit(1)


def main(args):
    if args.smoke_test:
        args.num_steps, args.num_items = 10, 200
        work(0, args)
        args.num_processes = 2
    if args.num_processes == 1:
        return work(0, args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        torch.multiprocessing.start_processes(
            work_quietly, (args, port), args.num_processes, start_method="spawn"
        )
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "STLTrace_ELBO")
    parser.add_argument("--num-processes", type=int, default=1, help="on this machine; in the smoke test 1, then 2")
    parser.add_argument("--num-items", type=int, default=2000, help="rows of data that are simulated")
    parser.add_argument("--num-steps", type=int, default=3000, help="of training")
    parser.add_argument("--batch-size", type=int, default=100, help="of each process")
    parser.add_argument("--lr", type=float, default=0.02, help="of Adam; 3%% of it at the end")
    run(main, parser)
