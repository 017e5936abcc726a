# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A variational autoencoder on handwritten digits, by any loss of Pyro or pyro_rb.

It prints the loss of each epoch, on training and test images, in nats for each image::

    python examples/vae.py --loss STLTrace_ELBO:adaptive

The digits are those that scikit-learn carries (extra ``examples``), or with ``--data-dir``
those of MNIST, as for ``vae_iwae.py``.
"""

import argparse

import pyro
import torch
from pyro.infer import SVI
from tqdm import trange
from vae_iwae import Vae, load_digits

from pyro_rb.diagnostics.losses import make_loss


def main(args):
    train_images, test_images = load_digits(args.data_dir, args.seed)
    if args.smoke_test:
        train_images, test_images, args.num_epochs = train_images[:200], test_images[:50], 1
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    vae = Vae(train_images.shape[1], args.code_size, args.width).to(args.device)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": args.lr}), loss=make_loss(args.loss))
    test_images = test_images.to(args.device)
    epochs = trange(args.num_epochs, disable=args.smoke_test)
    for _ in epochs:
        batches = train_images[torch.randperm(len(train_images))].split(args.batch_size)
        train = sum(svi.step(batch.to(args.device)) for batch in batches) / len(train_images)
        test = svi.evaluate_loss(test_images) / len(test_images)
        epochs.set_postfix(train=f"{train:.2f}", test=f"{test:.2f}")
    print(f"{args.loss}: loss for an image {train:.2f} in training, {test:.2f} in test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--loss", default="STLTrace_ELBO:adaptive", help="as Trace_ELBO:num_particles=4")
    parser.add_argument("--num-epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--code-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=100, help="of the hidden layers")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
