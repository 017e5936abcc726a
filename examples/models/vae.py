# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A variational autoencoder on handwritten digits, by any loss of Pyro or pyro_rb.

For each loss the table gives the ELBO of a test image in nats, and the seconds of training::

    python examples/models/vae.py --loss Trace_ELBO STLTrace_ELBO

The digits are those of 8 x 8 pixels that come with scikit-learn (extra "examples"). With --data-dir
they are those of MNIST, from the files train-images-idx3-ubyte and t10k-images-idx3-ubyte in that
folder, or the same with .gz.
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from tqdm import trange

from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import make_parser, restart, run, set_up
from support.data import load_digits
from support.losses import add_loss_option, train_each
from support.results import report
from support.training import Clock


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

    def plate(self, images):
        return pyro.plate("images", len(images))

    def model(self, images):
        pyro.module("decoder", self.decoder)
        with self.plate(images):
            prior = dist.Normal(images.new_zeros(self.code_size), 1.0).to_event(1)
            code = pyro.sample("code", prior)
            pixels = dist.Bernoulli(logits=self.decoder(code), validate_args=False)
            pyro.sample("pixels", pixels.to_event(1), obs=images)

    def guide(self, images):
        pyro.module("encoder", self.encoder)
        with self.plate(images):
            loc, log_scale = self.encoder(images).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


def evaluate(vae, images, num_draws=100):
    """The ELBO of an image, in nats."""
    elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(vae.model, vae.guide, images) / len(images)


def train(name, train_images, test_images, args):
    """A new autoencoder by the loss of that name; a row of the table."""
    restart(args.seed)
    vae = Vae(train_images.shape[1], args.code_size, args.width)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": args.lr}), loss=make_loss(name))
    clock = Clock()
    epochs = trange(args.num_epochs, desc=name, leave=False, disable=None)
    for epoch in epochs:
        batches = train_images[torch.randperm(len(train_images))].split(args.batch_size)
        with clock:
            for batch in batches:
                svi.step(batch)
        if epoch % 10 == 0:
            epochs.set_postfix(elbo=f"{evaluate(vae, test_images, 1):.2f}")
    elbo = evaluate(vae, test_images)
    return {"loss": name, "test ELBO": f"{elbo:.2f}", "seconds": f"{clock.seconds:.1f}"}


def main(args):
    set_up(args, num_threads=None)
    train_images, test_images = (images.to(args.device) for images in load_digits(args.data_dir, args.seed))
    if args.smoke_test:
        train_images, test_images, args.num_epochs = train_images[:200], test_images[:50], 1
    report(args, train_each(args.loss, train, train_images, test_images, args))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "STLTrace_ELBO")
    parser.add_argument("--num-epochs", type=int, default=100, help="epochs of training")
    parser.add_argument("--batch-size", type=int, default=100, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--code-size", type=int, default=8, help="size of the latent code")
    parser.add_argument("--width", type=int, default=100, help="width of the hidden layers")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    run(main, parser)
