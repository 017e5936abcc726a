# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Autoencoders whose codes are bits, by estimators with equally many evaluations of the decoder: noise, time, training.

Digits of 14 x 14 pixels have codes of 200 bits or of 8. REINFORCE, leave-one-out, DisARM, the unordered set estimator
and VIMCO, written by hand in ``support/several_draws.py``, are compared with RaoBlackwell_ELBO: by default, with pairs,
with independent draws, and, where there are few codes, with a budget. VIMCO has another objective, the
importance-weighted bound of as many draws::

    python examples/papers/rao_blackwell/binary.py --out binary

Noise is the variance of the gradient of encoder and decoder at fixed parameters, early and late in a training run.
Each method is trained for the same CPU time at the learning rate that is best for its own objective on validation
images at the first seed. Runs take turns.
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from tqdm import tqdm

from pyro_rb import RaoBlackwell_ELBO
from pyro_rb.diagnostics.run.parameters import find_parameters
from support.bounds import importance_bound
from support.command_line import make_digit_parser, restart, run, set_up
from support.data import load_mnist
from support.gradients import draw_gradients, variance_ratio
from support.mixed_models import binary_autoencoder, shrink
from support.results import cell, make_panels, mean_and_error, report
from support.several_draws import Disarm, LeaveOneOut, UnorderedSet, Vimco, log_weights
from support.training import TimedRun, seconds_of_steps, set_fast_floats, train_tuned

BATCH_SIZE = 100
PARTS = ("encoder", "decoder")
REFERENCE = "leave-one-out"


def methods(num_evaluations, num_bits):
    """By name, what makes the loss, and what it asks of the guide's site."""
    num = num_evaluations
    ours = partial(RaoBlackwell_ELBO, max_plate_nesting=1)
    found = {
        "REINFORCE": (partial(Trace_ELBO, num, 1, vectorize_particles=True), {}),
        REFERENCE: (partial(LeaveOneOut, num), {}),
        "DisARM": (partial(Disarm, num), {}),
        "unordered set": (partial(UnorderedSet, num), {}),
        "VIMCO": (partial(Vimco, num), {}),
        "RaoBlackwell_ELBO, pairs": (ours, {"draws": num, "antithetic": True}),
        "RaoBlackwell_ELBO, draws": (ours, {"draws": num, "antithetic": False}),
    }
    if 2**num_bits * BATCH_SIZE <= 2**16:
        found["RaoBlackwell_ELBO, budget"] = (ours, {"topk": {"budget": num}})
    return found


def make_method(name, num_evaluations, num_bits):
    """The loss, and what marks the guide."""
    if name == "RaoBlackwell_ELBO":
        return RaoBlackwell_ELBO(max_plate_nesting=1), lambda guide: guide
    make, infer = methods(num_evaluations, num_bits)[name]
    return make(), partial(poutine.infer_config, config_fn=lambda site: infer)


def load(args):
    """Images for training, validation and tests."""
    (train, _), (rest, _) = load_mnist(args.data_dir, args.num_train, 2 * args.num_test, args.seeds[0])
    return [shrink(images) for images in (train, *rest.chunk(2))]


@torch.no_grad()
def evaluate(model, guide, images, num_draws, sizes):
    """Bounds of an image in nats, each of so many draws: of one, the ELBO."""
    bounds = []
    for batch in images.split(BATCH_SIZE):
        log_p, log_q, *_ = log_weights(model, guide, (batch,), lambda fn: fn.sample((num_draws,)))
        weights = (log_p - log_q).double()
        groups = [weights.unflatten(0, (-1, size)) for size in sizes]
        bounds.append([importance_bound(w, 1).mean(0) for w in groups])
    return [torch.cat(bound).mean().item() for bound in zip(*bounds)]


# -- Noise --------------------------------------------------------------------------------------


def states(num_bits, seed, train, args):
    """Yields the number of steps with model and guide, early and late in one training run."""
    restart(seed)
    model, guide = binary_autoencoder(num_bits)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), LeaveOneOut(4))
    done = 0
    for num_steps in args.states:
        while done < num_steps:
            svi.step(train[torch.randint(len(train), (BATCH_SIZE,))])
            done += 1
        yield done, model, guide


def measure(model, guide, batch, num_evaluations, num_bits, args):
    """By method: variance over that of leave-one-out, of encoder and decoder, and its standard error; milliseconds."""
    named = find_parameters(model, guide, (batch,))
    draws, steps = {}, {}
    for name in methods(num_evaluations, num_bits):
        loss, mark = make_method(name, num_evaluations, num_bits)
        marked = mark(guide)
        draws[name] = draw_gradients(loss, model, marked, (batch,), args.num_gradients, PARTS, named)
        steps[name] = partial(loss.loss_and_grads, model, marked, batch)
    times = seconds_of_steps(steps, args.num_gradients // 2)
    return {
        name: {
            **{part: variance_ratio(draws[name][part], draws[REFERENCE][part]) for part in PARTS},
            "ms": 1e3 * times[name],
        }
        for name in steps
    }


def measure_all(num_bits, train, args):
    """By number of evaluations and of steps, for each seed."""
    found = {}
    for seed in tqdm(args.seeds[:2], desc=f"{num_bits} bits, noise", leave=False):
        for steps, model, guide in states(num_bits, seed, train, args):
            for num in args.num_evaluations:
                at_seed = measure(model, guide, train[:BATCH_SIZE], num, num_bits, args)
                found.setdefault(num, {}).setdefault(steps, []).append(at_seed)
    return found


def noise_rows(num_bits, found):
    """Means over seeds. Time is of all states."""
    for num, by_steps in found.items():
        for name in next(iter(by_steps.values()))[0]:
            row = {"bits": num_bits, "evaluations": num, "method": name}
            for steps, seeds in by_steps.items():
                for part in PARTS:
                    row[f"{part}, step {steps}"] = f"{np.mean([at_seed[name][part][0] for at_seed in seeds]):.3g}"
            times = {n: np.mean([s[n]["ms"] for seeds in by_steps.values() for s in seeds]) for n in (name, REFERENCE)}
            late = np.mean([at_seed[name]["encoder"][0] for at_seed in seeds])
            row["ms"] = f"{times[name]:.2f}"
            row["encoder, late x time"] = f"{late * times[name] / times[REFERENCE]:.3g}"
            yield row


# -- Training -----------------------------------------------------------------------------------


class Training(TimedRun):
    """A run that notes two bounds of validation images along its time."""

    def __init__(self, name, lr, seed, num_bits, limit, train, validation):
        loss, mark = make_method(name, 4, num_bits)

        def make():
            model, guide = binary_autoencoder(num_bits)
            return model, mark(guide)

        super().__init__(make, loss, {"lr": lr}, seed, limit)
        self.train, self.validation = train, validation
        self.column = 3 if name == "VIMCO" else 2
        self.note()

    def batch(self):
        return (self.train[torch.randint(len(self.train), (BATCH_SIZE,))],)

    def evaluate(self, images, num_draws, sizes):
        with pyro.get_param_store().scope(self.store), torch.random.fork_rng():
            torch.manual_seed(0)
            return evaluate(self.model, self.guide, images, num_draws, sizes)

    def note(self):
        self.notes.append((self.seconds, self.num_steps, *self.evaluate(self.validation, 12, (1, 4))))

    @property
    def result(self):
        """Minus what it maximizes, the mean of the last notes."""
        value = -np.mean([note[self.column] for note in self.notes[-3:]])
        return value if np.isfinite(value) else np.inf


def train_all(num_bits, sets, args):
    limit = args.seconds[args.num_bits.index(num_bits)]
    names = ["RaoBlackwell_ELBO", *methods(4, num_bits)]

    def make_run(name, lr, seed):
        return Training(name, lr, seed, num_bits, limit, *sets[:2])

    for name in names:  # what the first steps import is not to count
        warm = make_run(name, args.rates[0], 0)
        warm.epoch(warm.make_batches)
    found = train_tuned(make_run, names, args.rates, args.seeds, Training.num_notes)
    least = min(run.num_steps for _, runs in found.values() for run in runs)
    rows = []
    for name, (lr, runs) in found.items():
        ends = np.array([run.evaluate(sets[2], args.num_draws, (1, 4, args.num_draws)) for run in runs])
        notes = np.array([run.notes for run in runs])
        at_least = [np.interp(least, note[:, 1], note[:, 2]) for note in notes]
        rows.append({
            "bits": num_bits,
            "method": name,
            "learning rate": f"{lr:g}",
            "steps": round(notes[:, -1, 1].mean()),
            "test ELBO": cell(*mean_and_error(ends[:, 0])),
            "bound, 4": cell(*mean_and_error(ends[:, 1])),
            f"bound, {args.num_draws}": cell(*mean_and_error(ends[:, 2])),
            "validation ELBO, equal steps": cell(*mean_and_error(at_least)),
        })  # fmt: skip
    return rows, {name: [run.notes for run in runs] for name, (_, runs) in found.items()}


def draw(curves):
    """The ELBO of validation images by time and by steps."""
    fig, axes = make_panels(len(curves), 2)
    for i, (num_bits, by_name) in enumerate(curves.items()):
        for number, (name, notes) in enumerate(by_name.items()):
            seconds, steps, elbo, _ = np.mean(notes, 0).T
            for ax, x in zip(axes[2 * i:], (seconds, steps)):
                ax.plot(x[1:], elbo[1:], ("-", "--")[number // 7], label=name)
        ends = [np.mean(notes, 0)[-1, 2] for notes in by_name.values()]
        for ax, label in zip(axes[2 * i:], ("CPU seconds", "steps")):
            ax.set(title=f"{num_bits} bits", xlabel=label, ylabel="ELBO of a validation image")
            ax.set_ylim(bottom=min(ends) - (max(ends) - min(ends)) - 1e-3)
    axes[0].legend(fontsize="x-small", loc="lower right")
    return fig


def main(args):
    set_up(args, args.num_threads)
    set_fast_floats()
    if args.smoke_test:
        args.num_train, args.num_test, args.states, args.num_gradients, args.num_draws = 200, 20, [1, 2], 4, 4
        args.seeds, args.rates, args.seconds, args.num_evaluations, args.num_bits = [0], [1e-3], [1e-3, 1e-3], [2], [8]
        Training.num_notes = 2
    sets = load(args)
    noise, trained, curves, measured = [], [], {}, {}
    for num_bits in args.num_bits:
        measured[num_bits] = measure_all(num_bits, sets[0], args)
        noise.extend(noise_rows(num_bits, measured[num_bits]))
    for num_bits in args.num_bits:
        rows, curves[num_bits] = train_all(num_bits, sets, args)
        trained.extend(rows)
    tables = {"_noise": noise, "_training": trained}
    report(args, tables, lambda: draw(curves), noise=measured, training=curves)


if __name__ == "__main__":
    parser = make_digit_parser(__doc__)
    parser.add_argument("--num-bits", type=int, nargs="+", default=[200, 8], help="of a code")
    parser.add_argument("--num-evaluations", type=int, nargs="+", default=[2, 4, 8], help="where noise is measured")
    parser.add_argument("--num-gradients", type=int, default=60, help="gradients of each method in each state")
    parser.add_argument("--states", type=int, nargs="+", default=[50, 1000], help="steps before noise is measured")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 4.0], help="of a run, for each size of code")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="to choose from")
    parser.add_argument("--num-train", type=int, default=4000, help="digits for training")
    parser.add_argument("--num-test", type=int, default=500, help="digits for tests, and as many for validation")
    parser.add_argument("--num-draws", type=int, default=100, help="draws for the test bounds")
    run(main, parser)
