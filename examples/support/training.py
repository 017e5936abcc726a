# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Clocks, and training runs that take turns."""

import math
import time

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from tqdm import tqdm


def now():
    """
    Seconds. On a CPU those of the process, which other programs do not stretch; on CUDA those of
    the wall, once the device has done its work.
    """
    if torch.empty(0).device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Clock:
    """Adds up the seconds inside of ``with`` blocks."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = now()
        return self

    def __exit__(self, *error):
        self.seconds += now() - self._start


def set_fast_floats():
    """
    Takes numbers that are nearly 0 for 0. A confident guide makes many of these, as
    probabilities and in gradients, and CPUs take several times as long for them.
    """
    torch.set_flush_denormal(True)


def fit(model, guide, loss=None, *, num_steps, lr, desc, look=None, every=1):
    """
    Trains by Adam, with a learning rate that falls to a hundredth of ``lr``.

    :param loss: default: ``Trace_ELBO()``.
    :param look: called after every ``every`` steps, with their number; not timed.
    :return: seconds, as of :class:`Clock`.
    """
    options = {"lr": lr, "lrd": 0.01 ** (1 / num_steps), "clip_norm": math.inf}
    loss = Trace_ELBO() if loss is None else loss
    svi = SVI(model, guide, pyro.optim.ClippedAdam(options), loss)
    clock, done = Clock(), 0
    with tqdm(total=num_steps, desc=desc, leave=False) as progress:
        while done < num_steps:
            block = min(every if look is not None else num_steps, num_steps - done)
            with clock:
                for _ in range(block):
                    svi.step()
                    progress.update()
            done += block
            if look is not None and done % every == 0:
                look(done)
    return clock.seconds


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
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam(optim), loss)

    def epoch(self, make_batches):
        """
        A step for each tuple of arguments.

        :param callable make_batches: returns these; draws from the run's random numbers.
        :return: seconds, and the sum of the losses.
        """
        pyro.set_rng_seed(1000 * self.seed + self.num_epochs)
        batches = make_batches()
        with pyro.get_param_store().scope(self.store), Clock() as clock:
            loss = sum(self.svi.step(*batch) for batch in batches)
        self.num_epochs += 1
        self.seconds += clock.seconds
        return clock.seconds, loss


class TimedRun(Run):
    """
    A run for a given time that makes notes along it.

    :param float limit: seconds of training.
    """

    num_notes = 10

    def __init__(self, make, loss, optim, seed, limit):
        super().__init__(make, loss, optim, seed)
        self.limit, self.num_steps, self.notes = limit, 0, []

    def batch(self):
        """The arguments of a step, by its number or at random."""
        raise NotImplementedError

    def make_batches(self, num_steps=5):
        batches = []
        for _ in range(num_steps):
            batches.append(self.batch())
            self.num_steps += 1
        return batches

    def note(self):
        """Appends to ``notes``, of which the first is to be made before training."""
        raise NotImplementedError

    def go_on(self):
        """As far as the next note."""
        while self.seconds < self.limit * len(self.notes) / self.num_notes:
            self.epoch(self.make_batches)
        self.note()


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


def train_tuned(make_run, names, rates, seeds, num_turns):
    """
    Trains by each of some losses at several learning rates with the first seed, and at the best with the others.

    :param callable make_run: of a name, a rate and a seed. The run goes on by ``go_on()``, ``num_turns`` times in
        turn with the others, and has a ``result``, which is to be small.
    :return: by name, the rate and a run for each seed.
    """
    first, *others = seeds

    def train_all(choices):
        runs = {choice: make_run(*choice) for choice in choices}
        for _ in tqdm(range(num_turns), leave=False):
            for run in runs.values():
                run.go_on()
        return runs

    runs = train_all((name, rate, first) for name in names for rate in rates)
    best = {name: min(rates, key=lambda rate: runs[name, rate, first].result) for name in names}
    runs.update(train_all((name, best[name], seed) for name in names for seed in others))
    return {name: (best[name], [runs[name, best[name], seed] for seed in seeds]) for name in names}


def end_of(histories, name):
    """
    Of a run of :func:`take_turns`, with several seeds: what was noted last, ``[num_seeds]`` for each key;
    ``epoch`` is the median time of an epoch.
    """
    ends = [history[name][-1] for history in histories]
    values = {key: np.array([end[key] for end in ends]) for key in ends[0]}
    return {**values, "epoch": np.median([note["epoch"] for history in histories for note in history[name]])}


def seconds_of_steps(steps, num_rounds):
    """
    Median seconds of each of some functions, called in turn.

    :param dict steps: functions by name.
    """
    times = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            with Clock() as clock:
                step()
            times[name].append(clock.seconds)
    return {name: float(np.median(t)) for name, t in times.items()}
