# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A variational autoencoder of handwritten digits whose encoder is a proposal: RVRSGuide with
an acceptance for each image, against the plain and the importance-weighted autoencoder.

An image's threshold is found anew in each call, from 32 pilot draws; or it is kept and adapted
from epoch to epoch. An image that was not trained on has none that is kept: it has pilots too, or a
network that was fitted to those of the training images (amortized). The table has, for images
that were not trained on and in nats an image, the bound that was trained, and that of 1,000
importance samples from the encoder::

    python examples/papers/rvrs/vae.py --out vae

Networks and digits are those of vae.py: 8 x 8 pixels from scikit-learn (extra "examples"),
or MNIST from the folder --data-dir.
"""

import math
from functools import partial

import _path  # noqa: F401
import numpy as np
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

#: How training images come by theirs.
THRESHOLDS = ["pilots", "kept"]


class NumberedVae(Vae):
    """Of images that come with their numbers, so that each can have a threshold that is kept."""

    num_images, index = 0, None

    def plate(self, images):
        if self.index is None:
            return super().plate(images)
        return pyro.plate("images", self.num_images, subsample=self.index)

    def with_numbers(self, program):
        def numbered(images, index):
            self.index = index
            program(images)
            self.index = None

        return numbered


def make_methods(args):
    """Names, losses, the bound's number of particles, and the RVRSGuide's acceptance and thresholds."""
    iwae = RenyiELBO(num_particles=args.num_particles, vectorize_particles=True, max_plate_nesting=1)
    yield "VAE", Trace_ELBO(), 1, None, ""
    yield f"IWAE, K = {args.num_particles}", iwae, args.num_particles, None, ""
    for target in args.Z_target:
        for thresholds in args.thresholds:
            yield f"RVRS, Z = {target}", Trace_ELBO(), None, target, thresholds


def train(code_size, name, loss, target, thresholds, train_images, args):
    """A new autoencoder, its RVRSGuide if it has one, and the seconds that it took."""
    restart(args.seed)
    vae = NumberedVae(train_images.shape[1], code_size, args.width)
    vae.num_images, is_kept = len(train_images), thresholds == "kept"
    model, guide, rvrs, num_plain = vae.model, vae.guide, None, 0
    if target is not None:
        options = {"Z_target": target, "local_plate": "images"}
        if is_kept:
            model, guide, options["local_size"] = vae.with_numbers(model), vae.with_numbers(guide), vae.num_images
        rvrs = guide = RVRSGuide(model, guide, **options)
        # It starts from an encoder that has seen some epochs of the plain loss.
        num_plain = math.ceil(args.num_epochs * args.plain)
    if is_kept:  # the plate stands for all images, others for those of a batch
        scale = partial(pyro.poutine.scale, scale=args.batch_size / len(train_images))
        model, guide = scale(model), scale(guide)
    optim = pyro.optim.Adam({"lr": args.lr})
    plain = SVI(vae.model, vae.guide, optim, Trace_ELBO())
    own = SVI(model, guide, optim if target is None else pyro.optim.Adam({"lr": args.lr_rvrs}), loss)
    with Clock() as clock:
        for epoch in tqdm(range(args.num_epochs), desc=name, leave=False):
            svi = plain if epoch < num_plain else own
            for index in torch.randperm(len(train_images)).split(args.batch_size):
                svi.step(train_images[index], *([index] if is_kept and svi is own else []))
    return vae, rvrs, clock.seconds


def fit_thresholds(rvrs, images, args):
    """A network from an image to its threshold, by least squares."""
    network = Vae.network(images.shape[1], args.width, 1)
    is_known = ~rvrs.T.isnan()
    images, T = images[is_known], rvrs.T[is_known]
    mean, scale = T.mean(), T.std()
    optim = torch.optim.Adam(network.parameters(), args.lr)
    for _ in range(args.num_network_epochs):
        for index in torch.randperm(len(images)).split(args.batch_size):
            optim.zero_grad()
            error = network(images[index]).squeeze(-1) - (T[index] - mean) / scale
            error.square().mean().backward()
            optim.step()
    return lambda images: (network(images).squeeze(-1) * scale + mean).detach()


def evaluate_rvrs(vae, target, network, images, args):
    """The bound of an image, and its acceptance, by thresholds from a network, or from pilots if it is None."""
    bound, acceptance = 0.0, []
    for batch in images.split(args.batch_size):
        options = {} if network is None else {"local_size": len(batch), "T": 0.0, "adaptation": "fixed"}
        guide = RVRSGuide(vae.model, vae.guide, Z_target=target, local_plate="images", **options)
        if network is not None:
            guide.T.copy_(network(batch))
        bound += guide.elbo(100, batch)[0]
        Trace_ELBO().differentiable_loss(vae.model, guide, batch)
        acceptance.append(guide.Z.item())
    return bound / len(images), np.mean(acceptance)


def make_rows(code_size, name, loss, num_particles, target, thresholds, train_images, test_images, args):
    """Trains a new autoencoder. Yields rows of the table."""
    vae, rvrs, seconds = train(code_size, name, loss, target, thresholds, train_images, args)
    marginal = evaluate(vae, test_images, args.num_test_particles)
    networks = {"": None} if target is None else {"pilots": None}
    if thresholds == "kept":
        networks["amortized"] = fit_thresholds(rvrs, train_images, args)
    for way, network in networks.items():
        if target is None:
            bound, acceptance = evaluate(vae, test_images, num_particles), np.nan
        else:
            bound, acceptance = evaluate_rvrs(vae, target, network, test_images, args)
        yield {
            "code": code_size,
            "method": name,
            "thresholds": thresholds,
            "for the test": way,
            "own bound": f"{bound:.3f}",
            f"bound, {args.num_test_particles}": f"{marginal:.3f}",
            "acceptance": "" if target is None else f"{acceptance:.3f}",
            "CPU time, s": f"{seconds:.1f}",
        }


def main(args):
    set_up(args)
    train_images, test_images = (images.to(args.device) for images in load_digits(args.data_dir, args.seed))
    test_images = test_images[: args.num_test]
    if args.smoke_test:
        train_images, test_images, args.batch_size = train_images[:64], test_images[:16], 32
        args.num_epochs, args.num_test_particles, args.code_sizes = 2, 10, args.code_sizes[:1]
        args.thresholds, args.num_network_epochs, args.Z_target = THRESHOLDS, 1, args.Z_target[:1]
    rows = []
    for code_size in args.code_sizes:
        for method in make_methods(args):
            rows.extend(make_rows(code_size, *method, train_images, test_images, args))
    report(args, rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-epochs", type=int, default=60)
    parser.add_argument("--plain", type=float, default=0.1, help="share of epochs before RVRSGuide takes over")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--lr-rvrs", type=float, default=1e-3, help="the same for RVRSGuide")
    parser.add_argument("--code-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--width", type=int, default=100, help="of the hidden layers")
    parser.add_argument("--num-particles", type=int, default=8, help="K of IWAE")
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--thresholds", nargs="+", choices=THRESHOLDS, default=["pilots"])
    parser.add_argument("--num-network-epochs", type=int, default=100, help="to fit thresholds that are amortized")
    parser.add_argument("--num-test", type=int, default=1000, help="images")
    parser.add_argument("--num-test-particles", type=int, default=1000)
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    run(main, parser)
