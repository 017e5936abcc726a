# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A variational autoencoder of handwritten digits whose encoder is a proposal: RVRSGuide with
an acceptance for each image, against the plain and the importance-weighted autoencoder.

Images come in batches without numbers, so RVRSGuide finds their thresholds anew in each
call, from 32 pilot draws. The table has, for images that were not trained on and in nats an
image, the bound that was trained, and that of 1,000 importance samples from the encoder::

    python examples/papers/rvrs/vae.py --out vae

Networks and digits are those of vae.py: 8 x 8 pixels from scikit-learn (extra "examples"),
or MNIST from the folder --data-dir.
"""

import math

import _path  # noqa: F401
import pyro
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from tqdm import tqdm

from models.vae import Vae
from papers.dreg.vae_iwae import evaluate
from pyro_rb.infer import RVRSGuide
from support.command_line import make_parser, restart, run, set_up
from support.data import load_digits
from support.results import report
from support.training import Clock


def make_methods(args):
    """By name: the loss, the bound's number of particles, and the RVRSGuide's acceptance."""
    iwae = RenyiELBO(num_particles=args.num_particles, vectorize_particles=True, max_plate_nesting=1)
    methods = {
        "VAE": (Trace_ELBO(), 1, None),
        f"IWAE, K = {args.num_particles}": (iwae, args.num_particles, None),
    }
    for target in args.Z_target:
        methods[f"RVRS, Z = {target}"] = (Trace_ELBO(), None, target)
    return methods


def train(name, method, train_images, test_images, args):
    """Trains a new autoencoder. Returns a row of the table."""
    loss, num_particles, target = method
    restart(args.seed)
    vae = Vae(train_images.shape[1], args.code_size, args.width)
    guide = vae.guide
    if target is not None:
        guide = RVRSGuide(vae.model, vae.guide, Z_target=target, local_plate="images")
    # RVRSGuide starts from an encoder that has seen some epochs of the plain loss.
    num_plain = 0 if target is None else math.ceil(args.num_epochs * args.plain)
    optim = pyro.optim.Adam({"lr": args.lr})
    plain, own = SVI(vae.model, vae.guide, optim, Trace_ELBO()), SVI(vae.model, guide, optim, loss)
    with Clock() as clock:
        for epoch in tqdm(range(args.num_epochs), desc=name, leave=False):
            svi = plain if epoch < num_plain else own
            for batch in train_images[torch.randperm(len(train_images))].split(args.batch_size):
                svi.step(batch)
    if target is None:
        bound = evaluate(vae, test_images, num_particles)
    else:
        batches = test_images.split(args.batch_size)
        bound = sum(guide.elbo(100, batch)[0] for batch in batches) / len(test_images)
    return {
        "method": name,
        "own bound": f"{bound:.3f}",
        f"bound, {args.num_test_particles}": f"{evaluate(vae, test_images, args.num_test_particles):.3f}",
        "acceptance": "" if target is None else f"{guide.Z.item():.3f}",
        "CPU time, s": f"{clock.seconds:.1f}",
    }


def main(args):
    set_up(args)
    train_images, test_images = (images.to(args.device) for images in load_digits(args.data_dir, args.seed))
    if args.smoke_test:
        train_images, test_images = train_images[:64], test_images[:16]
        args.num_epochs, args.num_test_particles = 2, 10
    rows = [
        train(name, method, train_images, test_images, args)
        for name, method in make_methods(args).items()
    ]
    report(args, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-epochs", type=int, default=60)
    parser.add_argument("--plain", type=float, default=0.1, help="share of epochs before RVRSGuide takes over")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--code-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=100, help="of the hidden layers")
    parser.add_argument("--num-particles", type=int, default=8, help="K of IWAE")
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--num-test-particles", type=int, default=1000)
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    run(main, parser)
