# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian networks that are trained on splits of a table by compiled steps."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from tqdm import tqdm

from pyro_rb import CompiledSVI, StopRule, compile
from support.data import split_table
from support.networks import (
    BayesianMLP,
    LocalByHand,
    MeanField,
    draw_layers,
    make_guide,
    predict,
)
from support.training import Clock

BLOCK = 10  # steps whose mean loss StopRule sees


class Networks:
    """
    Bayesian networks in training, one after the other, by the same compiled steps.

    :param loss: an ELBO.
    :param bool is_by_hand: whether the model draws pre-activations itself, as :class:`LocalByHand`.
    :param args: options of the command line.
    """

    def __init__(self, loss, is_by_hand, num_features, args, is_compiled=True):
        self._args, self._num_features = args, num_features
        self._num_rows = torch.ones(())  # a tensor, so that graphs read it
        with pyro.get_param_store().scope() as self._store:
            self.model, self.guide = pair = self._make()
        if is_by_hand:
            pair = LocalByHand(*pair), lambda x, y: None
        if is_compiled:
            loss = compile(loss, args.backend, background=False)
        self._optim = pyro.optim.Adam({"lr": args.lr[0]})
        self._svi = (CompiledSVI if is_compiled else SVI)(*pair, self._optim, loss)
        self.seconds = []  # of a step, by block

    def in_scope(self):
        """Networks of the same names live side by side."""
        return pyro.get_param_store().scope(self._store)

    def _make(self):
        """A network, and a guide with locations drawn from the prior."""
        model, other = (BayesianMLP([self._num_features, self._args.width, 1], self._num_rows) for _ in range(2))
        data = torch.zeros(2, self._num_features), torch.zeros(2)
        return model, MeanField(make_guide(other, data, self._args.init_scale))

    @torch.no_grad()
    def restart(self, data, lr, seed):
        """With a seed, all losses start from the same place, and see the same batches."""
        pyro.set_rng_seed(seed)
        with pyro.get_param_store().scope():
            fresh = self._make()
        for module, start in zip((self.model, self.guide), fresh):
            for p, q in zip(module.parameters(), start.parameters()):
                p.copy_(q)
        for optim in self._optim.optim_objs.values():
            optim.param_groups[0]["lr"] = lr
            for state in optim.state.values():
                for tensor in state.values():
                    tensor.zero_()
        self._data, self._rows, self._order = data, [], torch.Generator().manual_seed(seed)
        self._num_rows.fill_(len(data[0]))

    def step(self):
        x, y = self._data
        if not self._rows:
            rows = torch.randperm(len(x), generator=self._order, device="cpu").split(self._args.batch_size)
            self._rows = [r for r in rows if len(r) == self._args.batch_size]
        rows = self._rows.pop()
        return self._svi.step(x[rows], y[rows])

    def train(self, max_steps, ends, look, desc):
        """
        Until the loss falls no more or ``max_steps`` are made, and to other ends.

        :param dict ends: numbers of steps by name.
        :param callable look: called at each end, with its name.
        :return: number of steps to convergence, and whether it has converged.
        """
        num_rows, ends = len(self._data[0]), {**ends}
        rule, done, converged = StopRule(self._args.tolerance, min_steps=80), 0, None
        with tqdm(total=max_steps, desc=desc, leave=False) as progress, self.in_scope():
            while converged is None or ends:
                with Clock() as clock:
                    loss = sum(self.step() for _ in range(BLOCK)) / (BLOCK * num_rows)
                self.seconds.append(clock.seconds / BLOCK)
                done += BLOCK
                if converged is None and (rule.update(loss) or done >= max_steps):
                    ends["converged"] = converged = done
                for name in [name for name, at in ends.items() if done >= at]:
                    look(name)
                    del ends[name]
                progress.update(BLOCK)
        return converged, rule.stopped

    @torch.no_grad()
    def evaluate(self, data, scale):
        """Mean log density and root mean square error of data, in units of the table."""
        log_density, error = [], []
        layers = draw_layers(self.guide, len(self.model.layers), self._args.num_draws)
        for x, y in zip(*(t.split(500) for t in data)):
            means = predict(layers, x)
            log_prob = dist.Normal(means, self.model.noise).log_prob(y) - np.log(scale)
            log_density.append(torch.logsumexp(log_prob, 0) - np.log(len(means)))
            error.append(scale * (means.mean(0) - y))
        rmse = torch.cat(error).square().mean().sqrt()
        return {"log_likelihood": torch.cat(log_density).mean().item(), "rmse": rmse.item()}

    def validate(self, table, lr, split, max_steps):
        """Log-likelihood of a tenth of the training data, after a training on the rest."""
        (train, rest), scale = split_table(table, split, is_validation=True)
        self.restart(train, lr, split)
        found = []
        self.train(max_steps, {}, lambda _: found.append(self.evaluate(rest, scale)), f"rate {lr}")
        return found[0]["log_likelihood"]
