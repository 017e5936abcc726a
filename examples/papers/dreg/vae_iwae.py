# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Importance-weighted autoencoders on handwritten digits, trained by RenyiELBO and by
DReG_ELBO.

Both losses have the same objective, the bound of Burda, Grosse and Salakhutdinov (2016)
with K particles. The table gives, for each loss and K, the bound on digits that were not trained
on, in nats per image::

    python examples/papers/dreg/vae_iwae.py --out iwae

Networks and digits are those of vae.py: 8 x 8 pixels from scikit-learn (extra "examples"),
or MNIST from the folder --data-dir.
"""

import _path  # noqa: F401
import pyro
import torch
from pyro.infer import SVI, RenyiELBO
from tqdm import tqdm

from models.vae import Vae
from pyro_rb.infer import DReG_ELBO
from support.command_line import make_parser, restart, run, set_up
from support.data import load_digits
from support.results import report

LOSSES = {
    "RenyiELBO": lambda k: RenyiELBO(
        num_particles=k, vectorize_particles=True, max_plate_nesting=1
    ),
    "DReG_ELBO": lambda k: DReG_ELBO(k, 1, vectorize_particles=True),
    "DReG_ELBO:adaptive": lambda k: DReG_ELBO(
        k, 1, vectorize_particles=True, control_variate_scale="adaptive"
    ),
}


def evaluate(vae, images, num_particles, batch_size=50):
    """The bound for an image, in nats."""
    elbo = DReG_ELBO(num_particles, 1, vectorize_particles=True)
    losses = [elbo.loss(vae.model, vae.guide, batch) for batch in images.split(batch_size)]
    return -sum(losses) / len(images)


def train(name, num_particles, train_images, test_images, args):
    """Trains a new autoencoder. Returns a row of the table."""
    restart(args.seed)
    vae = Vae(train_images.shape[1], args.code_size, args.width)
    optim = pyro.optim.Adam({"lr": args.lr})
    svi = SVI(vae.model, vae.guide, optim, LOSSES[name](num_particles))
    progress = tqdm(range(args.num_epochs), desc=f"{name}, K = {num_particles}", leave=False)
    for _ in progress:
        batches = train_images[torch.randperm(len(train_images))].split(args.batch_size)
        loss = sum(svi.step(batch) for batch in batches)
        progress.set_postfix(bound=f"{-loss / len(train_images):.2f}")
    return {
        "loss": name,
        "K": num_particles,
        "test bound, K": round(evaluate(vae, test_images, num_particles), 3),
        f"test bound, {args.num_test_particles}": round(
            evaluate(vae, test_images, args.num_test_particles), 3
        ),
    }


def main(args):
    set_up(args, num_threads=None)
    train_images, test_images = (images.to(args.device) for images in load_digits(args.data_dir, args.seed))
    if args.smoke_test:
        train_images, test_images = train_images[:64], test_images[:16]
        args.num_epochs, args.num_test_particles = 1, 10
    rows = [
        train(name, num_particles, train_images, test_images, args)
        for num_particles in args.num_particles
        for name in args.loss
    ]
    report(args, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument(
        "--loss", nargs="+", choices=LOSSES, default=["RenyiELBO", "DReG_ELBO"], metavar="LOSS",
        help=f"any of {', '.join(LOSSES)}",
    )
    parser.add_argument("--num-particles", type=int, nargs="+", default=[8, 64], help="number of particles, K")
    parser.add_argument("--num-test-particles", type=int, default=1000)
    parser.add_argument("--num-epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--code-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=100, help="width of the hidden layers")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    run(main, parser)
