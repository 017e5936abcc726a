# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Importance-weighted autoencoders on handwritten digits, trained by RenyiELBO and by
DReG_ELBO.

Both losses have the same objective, the bound of Burda, Grosse and Salakhutdinov (2016)
with K particles. The table gives, for each loss and K, the bound on digits that were not
trained on, in nats for each image::

    python examples/vae_iwae.py --json iwae.json

The digits are the 1797 images of 8 x 8 pixels that scikit-learn carries (extra
``examples``). With ``--data-dir`` they are those of MNIST, from the files
``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` in that folder, or the same
with ``.gz``.
"""

import argparse
import csv
import json

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from pyro_rb.infer import DReG_ELBO
from utils import read_idx

LOSSES = {
    "RenyiELBO": lambda k: RenyiELBO(
        num_particles=k, vectorize_particles=True, max_plate_nesting=1
    ),
    "DReG_ELBO": lambda k: DReG_ELBO(k, max_plate_nesting=1),
    "DReG_ELBO:adaptive": lambda k: DReG_ELBO(
        k, control_variate_scale="adaptive", max_plate_nesting=1
    ),
}


def load_digits(data_dir, seed):
    """Binary training and test images, ``[num_images, num_pixels]``."""
    if data_dir is not None:
        names = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
        train, test = (read_idx(data_dir, name).reshape(-1, 28 * 28) / 255.0 for name in names)
    else:
        try:
            from sklearn.datasets import load_digits as load
        except ImportError as error:
            raise SystemExit(
                "The digits are those of scikit-learn, which is not installed. Expected the "
                'extra "examples": pip install "pyro_rb[examples]", or MNIST by --data-dir.'
            ) from error
        images = load().data / 16.0
        order = np.random.default_rng(seed).permutation(len(images))
        train, test = np.split(images[order], [1500])
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.bernoulli(torch.tensor(images, dtype=torch.float32), generator=generator)
        for images in (train, test)
    )


class Vae(nn.Module):
    """
    Bernoulli pixels, a Normal code.

    :param int num_pixels: of an image.
    :param int code_size: dimension of the code.
    :param int width: of the hidden layers.
    """

    def __init__(self, num_pixels, code_size, width):
        super().__init__()
        self.code_size = code_size
        self.encoder = self.network(num_pixels, width, 2 * code_size)
        self.decoder = self.network(code_size, width, num_pixels)

    @staticmethod
    def network(size_in, width, size_out):
        return nn.Sequential(
            nn.Linear(size_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, size_out)
        )

    def model(self, images):
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(images)):
            prior = dist.Normal(images.new_zeros(self.code_size), 1.0).to_event(1)
            code = pyro.sample("code", prior)
            pixels = dist.Bernoulli(logits=self.decoder(code), validate_args=False)
            pyro.sample("pixels", pixels.to_event(1), obs=images)

    def guide(self, images):
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(images)):
            loc, log_scale = self.encoder(images).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


def evaluate(vae, images, num_particles, batch_size=50):
    """The bound for an image, in nats."""
    elbo = DReG_ELBO(num_particles, max_plate_nesting=1)
    losses = [elbo.loss(vae.model, vae.guide, batch) for batch in images.split(batch_size)]
    return -sum(losses) / len(images)


def train(name, num_particles, train_images, test_images, args):
    """Trains a new autoencoder. Returns a row of the table."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = Vae(train_images.shape[1], args.code_size, args.width).to(args.device)
    optim = pyro.optim.Adam({"lr": args.lr})
    svi = SVI(vae.model, vae.guide, optim, LOSSES[name](num_particles))
    progress = tqdm(range(args.num_epochs), desc=f"{name}, K = {num_particles}", leave=False)
    for _ in progress:
        batches = train_images[torch.randperm(len(train_images))].split(args.batch_size)
        loss = sum(svi.step(batch.to(args.device)) for batch in batches)
        progress.set_postfix(bound=f"{-loss / len(train_images):.2f}")
    test_images = test_images.to(args.device)
    return {
        "loss": name,
        "K": num_particles,
        "test bound, K": round(evaluate(vae, test_images, num_particles), 3),
        f"test bound, {args.num_test_particles}": round(
            evaluate(vae, test_images, args.num_test_particles), 3
        ),
    }


def main(args):
    train_images, test_images = load_digits(args.data_dir, args.seed)
    if args.smoke_test:
        train_images, test_images = train_images[:64], test_images[:16]
        args.num_epochs, args.num_test_particles = 1, 10
    rows = [
        train(name, num_particles, train_images, test_images, args)
        for num_particles in args.num_particles
        for name in args.loss
    ]
    print(tabulate(rows, headers="keys"))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "csv", "data_dir")}
        with open(args.json, "w") as file:
            json.dump({"settings": settings, "rows": rows}, file, indent=1)
    if args.csv:
        with open(args.csv, "w") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument(
        "--loss", nargs="+", choices=LOSSES, default=["RenyiELBO", "DReG_ELBO"], metavar="LOSS",
        help=f"any of {', '.join(LOSSES)}; default: the first two",
    )
    parser.add_argument("--num-particles", type=int, nargs="+", default=[8, 64], help="K")
    parser.add_argument("--num-test-particles", type=int, default=1000)
    parser.add_argument("--num-epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--code-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=100, help="of the hidden layers")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the table and the settings to this file")
    parser.add_argument("--csv", help="write the table to this file")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
