# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Path gradients by the family of the guide: noise at the start and after training, and what training makes of it.

Roeder, Wu and Duvenaud (2017) expect more of path gradients for flexible guides, such as flows, and for
importance-weighted bounds. Here two posteriors are fitted by a mean field, a full-rank Normal and flows, and an
autoencoder is fitted to digits. The ELBO is maximized by Trace_ELBO, STLTrace_ELBO and RaoBlackwell_ELBO, and the
bound of 8 particles by RenyiELBO and DReG_ELBO::

    python examples/papers/stl/families.py --out families

All losses have the same CPU time and start, and take turns. The learning rate falls with time to a hundredth. For
each loss it is the best of several at the first seed, by the loss's own objective. Noise is the variance of the
gradient over that of Trace_ELBO or RenyiELBO, with a new guide and with one that Trace_ELBO has trained.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Callable

import _path  # noqa: F401
import numpy as np
import pyro
import torch
from pyro.distributions import transforms as T
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from tqdm import tqdm

from models.vae import Vae
from pyro_rb import DReG_ELBO, RaoBlackwell_ELBO, STLTrace_ELBO
from pyro_rb.diagnostics.run.parameters import find_parameters
from support.bounds import importance_bound, log_weights
from support.command_line import make_parser, run, set_up
from support.data import data_of, load_digits
from support.gradients import draw_gradients, variance_ratio
from support.posteriors import centred_schools, logistic
from support.results import cell, make_panels, mean_and_error, report, write_results
from support.training import TimedRun, set_fast_floats, train_tuned

NUM_PARTICLES = 8
several = {"num_particles": NUM_PARTICLES, "max_plate_nesting": 1, "vectorize_particles": True}
#: By objective; the first is what others are compared to.
LOSSES = {
    "ELBO": {
        "Trace_ELBO": Trace_ELBO,
        "STL, c = 1": partial(STLTrace_ELBO, control_variate_scale=1.0),
        "STL, adaptive": STLTrace_ELBO,
        "RaoBlackwell_ELBO": partial(RaoBlackwell_ELBO, max_plate_nesting=1),
    },
    f"bound of {NUM_PARTICLES}": {
        "RenyiELBO": partial(RenyiELBO, alpha=0, **several),
        "DReG, c = 1": partial(DReG_ELBO, **several),
        "DReG, adaptive": partial(DReG_ELBO, control_variate_scale="adaptive", **several),
    },
}


@dataclass
class Case:
    """
    :param callable make: returns model and guide.
    :param callable batch: draws the arguments of both.
    :param callable bounds: of model and guide, those of one draw and of several.
    :param float weight: of its time of training.
    :param float lr: of the training before noise is measured.
    :param str part: in the names of the parameters whose gradient's variance counts.
    """

    posterior: str
    guide: str
    make: Callable[[], Any]
    bounds: Callable[..., Any]
    batch: Callable[[], Any] = tuple
    weight: float = 1.0
    part: str = ""
    lr: float = 0.02


def spline(dim):
    """Rational splines between -3 and 3, moved and stretched by an affine layer."""
    return T.ComposeTransformModule([T.spline_autoregressive(dim), T.affine_autoregressive(dim)])


def bounds_of_posterior(model, guide, num_draws):
    weights = log_weights(model, guide, num_draws)
    return weights.mean().item(), importance_bound(weights.unflatten(0, (NUM_PARTICLES, -1))).mean().item()


def bounds_of_images(images, model, guide, num_draws):
    """Of an image."""
    elbo = Trace_ELBO(num_particles=min(num_draws, 40), max_plate_nesting=1, vectorize_particles=True)
    bound = LOSSES[f"bound of {NUM_PARTICLES}"]["RenyiELBO"]()
    few = [bound.loss(model, guide, images) for _ in range(elbo.num_particles // NUM_PARTICLES)]
    return -elbo.loss(model, guide, images) / len(images), -np.mean(few) / len(images)


def cases(args):
    flow = partial(AutoIAFNormal, num_transforms=2)
    splines = partial(AutoNormalizingFlow, init_transform_fn=spline)
    guides = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal, "AutoIAFNormal": flow}
    with data_of("scikit-learn"):
        train, test = load_digits(None, 0)
    regression = logistic()

    def make_vae():
        vae = Vae(train.shape[1], code_size=8, width=100)
        return vae.model, vae.guide

    def batch():
        return (train[torch.randint(len(train), (100,))],)

    bounds = partial(bounds_of_images, test)
    yield Case("autoencoder of digits", "encoder", make_vae, bounds, batch, 1.5, "encoder", 0.005)

    def make(model, guide_type):
        return lambda: (model, guide_type(model))

    for posterior, model, types in (
        ("eight schools, centred", centred_schools, {**guides, "spline flow": splines}),
        ("logistic regression, breast cancer", regression, guides),
    ):
        for guide, guide_type in types.items():
            weight = 1.0 if guide in ("AutoNormal", "AutoMultivariateNormal") else 1.5
            yield Case(posterior, guide, make(model, guide_type), bounds_of_posterior, weight=weight)


class Training(TimedRun):
    """A run at a falling rate."""

    def __init__(self, case, objective, name, lr, seed, limit, num_draws):
        super().__init__(case.make, LOSSES[objective][name](), {"lr": lr}, seed, limit)
        self.case, self.lr, self.num_draws, self.is_lost = case, lr, num_draws, False
        self.index = list(LOSSES).index(objective)
        self.note()

    def batch(self):
        return self.case.batch()

    def note(self):
        self.notes.append((self.seconds, self.num_steps))

    def epoch(self, make_batches):
        for optimizer in self.svi.optim.optim_objs.values():
            optimizer.param_groups[0]["lr"] = self.lr * 0.01 ** (self.seconds / self.limit)
        try:
            super().epoch(make_batches)
        except ValueError:  # a distribution says that a parameter is not finite
            self.is_lost, self.seconds = True, self.limit

    @cached_property
    def bounds(self):
        """At the end. Infinitely low for a run that has gone astray."""
        if self.is_lost:
            return -np.inf, -np.inf
        with pyro.get_param_store().scope(self.store), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            found = np.array(self.case.bounds(self.model, self.guide, self.num_draws))
        return np.where(np.isnan(found), -np.inf, found).tolist()

    @property
    def result(self):
        return -self.bounds[self.index]


def measure(training, objective, args):
    """By loss, the variance of the gradient over that of the first, with its standard error."""
    draws, part = {}, training.case.part
    with pyro.get_param_store().scope(training.store):
        pyro.set_rng_seed(0)
        batch = training.case.batch()
        training.guide(*batch)  # a new guide has no parameters yet
        named = find_parameters(training.model, training.guide, batch)
        for name, make in LOSSES[objective].items():
            called = make(), training.model, training.guide, batch
            draws[name] = draw_gradients(*called, args.num_gradients, (part,), named, args.num_burn_in)[part]
    reference, *others = draws
    return {name: variance_ratio(draws[name], draws[reference]) for name in others}


def measure_states(case, args):
    """Noise of all losses with a new guide, and with one trained by the first loss."""
    one = Training(case, "ELBO", "Trace_ELBO", case.lr, args.seeds[0], args.seconds * case.weight, args.num_draws)
    states = {"start": {name: measure(one, name, args) for name in LOSSES}}
    for _ in range(Training.num_notes):
        one.go_on()
    states["trained"] = {name: measure(one, name, args) for name in LOSSES}
    return {"steps": one.num_steps, "bounds": one.bounds, "noise": states}


def train(case, objective, args):
    """By loss, learning rate, steps and bounds."""

    def make_run(name, lr, seed):
        return Training(case, objective, name, lr, seed, args.seconds * case.weight, args.num_draws)

    for name in LOSSES[objective]:  # what the first steps import is not to count
        first = make_run(name, args.rates[0], 0)
        first.epoch(first.make_batches)
    found = train_tuned(make_run, LOSSES[objective], args.rates, args.seeds, Training.num_notes)
    return {
        name: {"rate": lr, "steps": [one.num_steps for one in runs], "bounds": [one.bounds for one in runs]}
        for name, (lr, runs) in found.items()
    }


def make_tables(results):
    tables = {"_variance": [], "_training": []}
    for (posterior, guide), found in results.items():
        title = {"posterior": posterior, "guide": guide}
        for state, noise in found["noise"].items():
            row = {**title, "state": state}
            for ratios in noise.values():
                row.update({name: f"{value:.3g} ± {error:.1g}" for name, (value, error) in ratios.items()})
            tables["_variance"].append(row)
        for i, (objective, by_loss) in enumerate(found["training"].items()):
            (first, one), *others = by_loss.items()
            start, steps = np.array(one["bounds"])[:, i], np.mean(one["steps"])
            shares = [np.mean(other["steps"]) / steps for _, other in others]
            row = {
                **title,
                "objective": objective,
                "by the first": cell(*mean_and_error(start)),
                "steps": f"{steps:.0f}",
                "of others": f"{min(shares):.0%} to {max(shares):.0%}",
            }
            for name, other in others:
                row[name] = cell(*mean_and_error(np.array(other["bounds"])[:, i] - start))
            tables["_training"].append(row)
    return {ending: rows for ending, rows in tables.items() if rows}


def draw(results):
    """Noise by guide: hollow at the start, full when trained."""
    posteriors = list(dict.fromkeys(posterior for posterior, _ in results))
    fig, axes = make_panels(1, len(posteriors), size=(4.5, 4.0))
    for ax, posterior in zip(axes, posteriors):
        noise = {guide: found["noise"] for (name, guide), found in results.items() if name == posterior}
        for state, fill in (("start", "none"), ("trained", "full")):
            rows = [{k: v for ratios in states[state].values() for k, v in ratios.items()} for states in noise.values()]
            for i, name in enumerate(rows[0]):
                x = np.arange(len(rows)) + 0.12 * (i - 2)
                values, label = [row[name][0] for row in rows], name if state == "trained" else None
                ax.plot(x, values, "o", color=f"C{i}", fillstyle=fill, label=label)
        ax.axhline(1.0, color="grey")
        ax.set(title=posterior, yscale="log", ylabel="variance over that without path gradient")
        ax.set_xticks(range(len(noise)), noise, rotation=15)
    axes[0].legend(fontsize="x-small")
    return fig


def main(args):
    set_up(args)
    set_fast_floats()
    if args.smoke_test:
        args.seconds, args.seeds, args.rates = 1e-3, [0], [1e-3]
        args.num_gradients, args.num_burn_in, args.num_draws = 2, 2, 16
        Training.num_notes = 1
    results, chosen = {}, [case for case in cases(args) if args.case in case.posterior + case.guide]
    if args.smoke_test:
        chosen = chosen[::4]
    for case in tqdm(chosen):
        objectives = [] if args.noise_only else LOSSES
        training = {name: train(case, name, args) for name in objectives}
        results[case.posterior, case.guide] = {**measure_states(case, args), "training": training}
        # What is there, should the rest be interrupted.
        write_results(args, by_case(results), make_tables(results), lambda: draw(results))
    report(args, make_tables(results), lambda: draw(results), **by_case(results))


def by_case(results):
    return {"cases": {", ".join(key): found for key, found in results.items()}}


if __name__ == "__main__":
    parser = make_parser(__doc__, seed=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of training runs")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.005, 0.02], help="learning rates to choose from")
    help = "of CPU time for a run; half as many again for flows and the autoencoder"
    parser.add_argument("--seconds", type=float, default=7.0, help=help)
    parser.add_argument("--noise-only", action="store_true", help="do not compare training")
    parser.add_argument("--num-gradients", type=int, default=100, help="gradients of each loss in each state")
    parser.add_argument("--num-burn-in", type=int, default=50, help="steps before, in which a scale is learned")
    parser.add_argument("--num-draws", type=int, default=4000, help="draws for the bounds of a posterior")
    parser.add_argument("--case", default="", help="run only cases with this in the name")
    run(main, parser)
