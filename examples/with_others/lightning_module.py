# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Lightning: a loss inside of a LightningModule, in one or several processes, with a checkpoint on the way.

``loss(model, guide)`` is a ``torch.nn.Module``; from there on all is PyTorch's and Lightning's. What a loss has
learned is not a parameter, so two methods put it into the checkpoint and take it out. After the checkpoint, a
callback ends the training when the loss no longer falls. With ``--num-processes 2`` each process has its part of the
data, and the gradients are averaged, by gloo on this machine::

    python examples/with_others/lightning_module.py --loss Trace_ELBO STLTrace_ELBO --num-processes 2

The model is probabilistic principal component analysis with an amortized guide, on simulated data. The guide can be
exact, so the ELBO should reach the highest likelihood, which linear algebra gives (Tipping and Bishop 1999).
"""

import logging
import math
import tempfile
import warnings

import lightning
import pyro
import pyro.distributions as dist
import torch
from common import run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_rb import GradientGuard, StopRule
from pyro_rb.diagnostics.run.losses import make_loss

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


class Training(lightning.LightningModule):
    def __init__(self, name, lr):
        super().__init__()
        self.loss = make_loss(name)
        self.guard = GradientGuard(self.loss)
        self.elbo = self.guard(Model(), Guide())
        self.lr = lr

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.elbo(x) / len(x)

    def configure_optimizers(self):
        optim = self.guard.watch(torch.optim.Adam(self.parameters(), lr=self.lr))
        return [optim], [torch.optim.lr_scheduler.StepLR(optim, 50, 0.5)]

    def on_save_checkpoint(self, checkpoint):
        if hasattr(self.loss, "state_dict"):
            checkpoint["loss"] = self.loss.state_dict()

    def on_load_checkpoint(self, checkpoint):
        if "loss" in checkpoint:
            self.loss.load_state_dict(checkpoint["loss"])


class Stop(lightning.Callback):
    """
    Ends the training when the loss falls no more.

    :param options: of :class:`~pyro_rb.StopRule`.
    """

    def __init__(self, **options):
        self.rule = StopRule(**options)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # The same in all processes.
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        trainer.should_stop = trainer.should_stop or self.rule.update(loss)


def simulate(num_items=2000):
    z = torch.randn(num_items, NUM_FACTORS)
    return z @ torch.randn(NUM_FACTORS, NUM_FEATURES) + 0.5 * torch.randn(num_items, NUM_FEATURES)


def highest_likelihood(data):
    """The highest log likelihood of an item, from the eigenvalues of the covariance."""
    eigenvalues = torch.linalg.eigvalsh(data.T @ data / len(data)).flip(0)
    noise = eigenvalues[NUM_FACTORS:].mean()
    log_det = eigenvalues[:NUM_FACTORS].log().sum() + (NUM_FEATURES - NUM_FACTORS) * noise.log()
    return -0.5 * (NUM_FEATURES * math.log(2 * math.pi) + log_det.item() + NUM_FEATURES)


def fit(training, data, args, num_steps, to_folder=None, from_file=None):
    """
    Up to that number of steps, the last of which is saved if there is a folder for it, or from a checkpoint until the
    loss falls no more.
    """
    parallel = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    callback = ModelCheckpoint(to_folder, "half", every_n_train_steps=num_steps) if to_folder else Stop(tolerance=0.001)
    trainer = lightning.Trainer(
        max_steps=num_steps,
        devices=args.num_processes,
        strategy=parallel if args.num_processes > 1 else "auto",
        accelerator="cpu" if args.device == "cpu" else "gpu",
        gradient_clip_val=100.0,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=to_folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, DataLoader(TensorDataset(data), 100, shuffle=True), ckpt_path=from_file)


def train(name, args):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = simulate()
    # Parameters belong to the modules, and not to Pyro's param store.
    with pyro.settings.context(module_local_params=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: on workers, and the spawned processes
        with tempfile.TemporaryDirectory() as folder:
            fit(Training(name, args.lr), data, args, args.num_steps // 2, to_folder=folder)
            training = Training(name, args.lr)
            fit(training, data, args, args.num_steps, from_file=f"{folder}/half.ckpt")
        print(f"{name}: the highest likelihood of an item is {highest_likelihood(data):.3f}")
        elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        return -elbo.loss(training.elbo.model, training.elbo.guide, data) / len(data)


if __name__ == "__main__":
    run(
        __doc__, train, 3000, 0.02,
        options={"--num-processes": dict(type=int, default=1, help="processes on this machine")},
    )  # fmt: skip
