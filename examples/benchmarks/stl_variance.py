# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance of the gradient of STLTrace_ELBO, as a multiple of Trace_ELBO's.

Parameters are held fixed. The variance is the total over all parameters, with one particle and the
same random numbers for all losses. The adaptive loss is given 100 steps first. The cold start is
about a new adaptive loss: the mean square of its gradient about the true mean at each of the first
30 steps, over many starts. For it the table gives the largest ratio, and the ratio at the 10th and
30th step::

    python examples/benchmarks/stl_variance.py --csv variance.csv
"""

from functools import partial
from itertools import islice

import pyro
import pyro.distributions as dist
import torch
from common import make_parser, write
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from tqdm import tqdm

from pyro_rb import STLTrace_ELBO
from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.cli.examples import EXAMPLES
from pyro_rb.diagnostics.stats import summary as stats
from support.command_line import run, set_up

X = (0.5, -1.2, 2.0, 0.3)


def conjugate():
    x = torch.tensor(X)
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def conjugate_guide(width):
    """Off by 0.3 in the location, and ``width`` times as wide as the posterior."""
    loc = pyro.param("loc", lambda: 0.8 * torch.tensor(X) + 0.3)
    init = torch.full((4,), width * 0.2**0.5)
    scale = pyro.param("scale", init, constraint=constraints.positive)
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(loc, scale))


def mixed():
    """Real, positive and bounded latents; not conjugate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros(()), 0.7))
    w = pyro.sample("w", dist.Beta(torch.tensor(2.0), 3.0))
    with pyro.plate("data", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(theta * w, 0.8), obs=torch.tensor(X))


def states(num_train_steps):
    """Yields names with triples of a model, a guide and arguments."""
    for name, width in (("fitted", 1.0), ("5 times too narrow", 0.2), ("4 times too wide", 4.0)):
        pyro.clear_param_store()
        yield f"conjugate, {name}", conjugate, partial(conjugate_guide, width), ()
    schools, baseball = EXAMPLES["eight_schools"], EXAMPLES["baseball"]
    cases = [
        ("mixed, AutoNormal", mixed, AutoNormal, ()),
        ("mixed, AutoDiagonalNormal", mixed, AutoDiagonalNormal, ()),
        ("eight schools, AutoNormal", schools.model, AutoNormal, schools.make_args()),
        ("eight schools, AutoMultivariateNormal", schools.model, AutoMultivariateNormal, schools.make_args()),
        ("batting averages, AutoNormal", baseball.model, AutoNormal, baseball.make_args()),
    ]
    for name, model, guide_type, args in cases:
        # Models have sites of the same names, and automatic guides would share their parameters.
        pyro.clear_param_store()
        guide = guide_type(model)
        yield f"{name}, untrained", model, guide, args
        svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(num_train_steps):
            svi.step(*args)
        yield f"{name}, after {num_train_steps} steps", model, guide, args
        if guide_type is AutoNormal and model is not baseball.model:
            with torch.no_grad():
                for site, scale in guide.median(*args).items():
                    raw = getattr(guide.scales, f"{site}_unconstrained")
                    raw += (3 * getattr(guide.scales, site)).expm1().log() - raw
            yield f"{name}, then 3 times as wide", model, guide, args


def flat_gradients(loss, model, guide, args, num_samples, **options):
    """``[num_samples, number of parameter values]``"""
    gradients = sample_gradients(loss, model, guide, args, num_samples=num_samples, **options)
    return torch.cat([g.reshape(num_samples, -1) for g in gradients.values()], -1).double()


def ratio(a, b, mean=None):
    """Of mean squares about the mean, and its standard error; draws are paired."""
    squares = [(x - (x.mean(0) if mean is None else mean)).square().sum(-1) for x in (a, b)]
    return stats.ratio_of_means(*squares)


def measure(model, guide, args, num_samples, num_starts, num_burn_in):
    draw = partial(flat_gradients, model=model, guide=guide, args=args)
    plain = draw(Trace_ELBO(), num_samples=num_samples, seed=0)
    path = draw(STLTrace_ELBO(control_variate_scale=1.0), num_samples=num_samples, seed=0)
    adaptive = STLTrace_ELBO()
    adapted = draw(adaptive, num_samples=num_samples, seed=0, num_burn_in=num_burn_in)
    starts = [
        [draw(make(), num_samples=30, seed=seed) for seed in range(num_starts)]
        for make in (STLTrace_ELBO, Trace_ELBO)
    ]
    cold, reference = (torch.stack(s).transpose(0, 1) for s in starts)  # [step, start, values]
    steps = [ratio(c, r, plain.mean(0))[0] for c, r in zip(cold, reference)]
    return {
        "c = 1": ratio(path, plain),
        "adaptive": ratio(adapted, plain),
        "cold start, worst": (max(steps), None),
        "step 10": (steps[9], None),
        "step 30": (steps[29], None),
    }


def main(args):
    torch.set_default_dtype(torch.float64)
    set_up(args)
    num_samples, num_starts, num_burn_in, num_states = args.num_samples, args.num_starts, 100, 16
    if args.smoke_test:
        num_samples, num_starts, num_burn_in, num_states, args.train_steps = 4, 1, 5, 5, 1
    rows = []
    for name, model, guide, model_args in tqdm(islice(states(args.train_steps), num_states), total=num_states):
        row = measure(model, guide, model_args, num_samples, num_starts, num_burn_in)
        rows.append({"": name, **{key: cell(*value) for key, value in row.items()}})
        tqdm.write(str(rows[-1]))
    write(args, rows, rows)


def cell(value, error):
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of each gradient")
    parser.add_argument("--num-starts", type=int, default=40, help="starts of the adaptive loss")
    parser.add_argument("--train-steps", type=int, default=1000, help="training before a second measurement")
    run(main, parser)
