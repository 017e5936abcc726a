# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A sparse gamma deep exponential family on images of digits, by any loss of Pyro or pyro_rb.

The model is that of Ranganath, Tang, Charlin and Blei (2015), "Deep Exponential Families"
(https://arxiv.org/abs/1411.2581): three layers of sparse gamma variables on top of Poisson counts.
The counts, from 0 to 16, are the pixels of the 8 x 8 digits of scikit-learn (extra "examples"). The
guide is a gamma for each variable, with a shape and a mean of its own::

    python examples/models/sparse_gamma_def.py --loss Trace_ELBO STLTrace_ELBO

The table gives the ELBO of an image in nats, and the seconds of training.

Gammas with a small shape come so close to zero that a float can no longer tell them from it, and
their density is then infinite. So values are kept away from zero. A GradientGuard skips and counts
the steps that go wrong nevertheless.
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.nn.functional import softplus
from tqdm import trange

from pyro_rb import GradientGuard
from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import make_parser, restart, run, set_up
from support.data import load_counts
from support.losses import add_loss_option, train_each
from support.results import report
from support.training import Clock

SHAPE = 0.1  # of the priors of all layers: sparse
SMALLEST = 1e-5


class Positive(dist.Gamma):
    """A gamma whose draws stay away from zero."""

    def rsample(self, sample_shape=torch.Size()):
        return super().rsample(sample_shape).clamp(min=SMALLEST)


class SparseGammaDEF:
    """
    :param list widths: numbers of variables of the layers, from the top.
    :param int num_pixels: of an image.
    """

    def __init__(self, widths, num_pixels):
        self.widths = list(widths)
        self.shapes = list(zip(self.widths, [*self.widths[1:], num_pixels]))

    def model(self, images):
        weights = [
            pyro.sample(f"weights_{i}", Positive(SHAPE, 0.3).expand(shape).to_event(2))
            for i, shape in enumerate(self.shapes)
        ]
        with pyro.plate("images", len(images)):
            rate = images.new_full((self.widths[0],), SHAPE)
            for i, weight in enumerate(weights):
                layer = pyro.sample(f"layer_{i}", Positive(SHAPE, SHAPE / rate.clamp(min=SMALLEST)).to_event(1))
                # With several particles, weights have a dim of size 1 where images are.
                rate = layer @ (weight if weight.dim() == 2 else weight.squeeze(-3))
            pyro.sample("pixels", dist.Poisson(rate.clamp(min=SMALLEST)).to_event(1), obs=images)

    def guide(self, images):
        for i, shape in enumerate(self.shapes):
            pyro.sample(f"weights_{i}", self.gamma(f"weights_{i}", shape, mean=0.0).to_event(2))
        with pyro.plate("images", len(images)):
            for i, width in enumerate(self.widths):
                gamma = self.gamma(f"layer_{i}", (len(images), width), mean=0.5)
                pyro.sample(f"layer_{i}", gamma.to_event(1))

    @staticmethod
    def gamma(name, shape, mean):
        """A gamma with parameters on the real line, the inverse of softplus of its own."""
        raw_shape = pyro.param(f"{name}_shape", lambda: 0.5 + 0.1 * torch.randn(shape))
        raw_mean = pyro.param(f"{name}_mean", lambda: mean + 0.1 * torch.randn(shape))
        shape = softplus(raw_shape).clamp(min=0.1)
        return Positive(shape, shape / softplus(raw_mean).clamp(min=1e-3))


def evaluate(family, images, num_draws=20):
    """The ELBO of an image, in nats."""
    elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(family.model, family.guide, images) / len(images)


def train(name, images, args):
    """A new guide by the loss of that name; a row of the table."""
    restart(args.seed)
    family = SparseGammaDEF(args.widths, images.shape[1])
    guard = GradientGuard(make_loss(name), on_bad="skip")
    optim = pyro.optim.AdagradRMSProp({"eta": args.eta, "t": 0.1})
    svi = SVI(family.model, family.guide, optim, loss=guard)
    clock = Clock()
    steps = trange(args.num_steps, desc=name, leave=False, disable=None)
    for step in steps:
        with clock:
            svi.step(images)
        if step % 100 == 0:
            steps.set_postfix(elbo=f"{evaluate(family, images, 1):.1f}")
    return {
        "loss": name,
        "ELBO": f"{evaluate(family, images):.2f}",
        "steps skipped": guard.num_skipped,
        "seconds": f"{clock.seconds:.1f}",
    }


def main(args):
    set_up(args, num_threads=None)
    if args.smoke_test:
        args.num_images, args.num_steps = 50, 10
    images = torch.tensor(load_counts()[: args.num_images], dtype=torch.get_default_dtype())
    report(args, train_each(args.loss, train, images, args))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "STLTrace_ELBO")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 20, 40], help="widths of layers, from the top")
    parser.add_argument("--num-images", type=int, default=1000, help="images that are fitted")
    parser.add_argument("--num-steps", type=int, default=1500, help="steps of training")
    parser.add_argument("--eta", type=float, default=0.5, help="step size of AdagradRMSProp")
    run(main, parser)
