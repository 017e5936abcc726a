# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A sparse gamma deep exponential family on images of digits, by any loss of Pyro or pyro_rb.

The model is that of Ranganath, Tang, Charlin and Blei (2015), "Deep Exponential Families"
(https://arxiv.org/abs/1411.2581): three layers of gamma variables with little weight, on top
of Poisson counts, here the pixels of the 8 x 8 digits of scikit-learn (extra ``examples``),
which are counts from 0 to 16. The guide is a gamma for each variable, with a shape and a mean
of its own::

    python examples/sparse_gamma_def.py --loss STLTrace_ELBO:adaptive

Gammas with a small shape come so close to zero that a float can no longer tell, and their
density is then infinite. So values are kept away from zero, and a
:class:`~pyro_rb.diagnostics.guard.GradientGuard` skips what goes wrong nevertheless, and
counts it.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch.nn.functional import softplus
from tqdm import trange

from pyro_rb import GradientGuard
from pyro_rb.diagnostics.losses import make_loss

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
                rate = layer @ weight
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


def load_counts(num_images):
    """Pixels of digits, ``[num_images, 64]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            "The digits are those of scikit-learn, which is not installed. Expected the extra "
            '"examples": pip install "pyro_rb[examples]".'
        ) from error
    return torch.tensor(load_digits().data[:num_images], dtype=torch.get_default_dtype())


def main(args):
    if args.smoke_test:
        args.num_images, args.num_steps = 50, 10
    torch.set_default_device(args.device)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    images = load_counts(args.num_images).to(args.device)
    family = SparseGammaDEF(args.widths, images.shape[1])
    guard = GradientGuard(make_loss(args.loss), on_bad="skip")
    optim = pyro.optim.AdagradRMSProp({"eta": args.eta, "t": 0.1})
    svi = SVI(family.model, family.guide, optim, loss=guard)
    losses = []
    steps = trange(args.num_steps, disable=args.smoke_test)
    for step in steps:
        losses.append(svi.step(images))
        if step % 20 == 0:
            steps.set_postfix(loss=f"{losses[-1] / len(images):.1f}")
    last = torch.tensor(losses[-max(1, args.num_steps // 10) :])
    mean = last.nanmean().item() / len(images)
    print(f"{args.loss}: loss for an image {mean:.2f}, mean of the last {len(last)} steps")
    print(guard.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--loss", default="STLTrace_ELBO:adaptive", help="as Trace_ELBO:num_particles=4")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 20, 40], help="from the top")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--eta", type=float, default=0.5, help="step size of AdagradRMSProp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
