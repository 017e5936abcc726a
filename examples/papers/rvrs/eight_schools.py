# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Eight schools: means and standard deviations by a mean-field guide, by RVRSGuide around it,
and by NUTS.

The model is in its centered form, whose posterior is a funnel in ten dimensions; NUTS runs on the
equivalent non-centered form. Given the mean ``mu`` and the scale ``tau``, the effects ``theta`` of
the schools are Normal, so the exact values are two-dimensional integrals, here sums over a grid.
RVRSGuide takes over the guide after half of the steps::

    python examples/papers/rvrs/eight_schools.py --out eight_schools
"""

import math

import _path  # noqa: F401
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value

from pyro_rb.diagnostics.cli.examples import (
    EIGHT_SCHOOLS_EFFECTS,
    EIGHT_SCHOOLS_ERRORS,
)
from pyro_rb.infer import RVRSGuide
from support.bounds import elbo
from support.command_line import make_parser, restart, run, set_up
from support.results import report
from support.training import Clock, fit


def observe(theta):
    effects = torch.tensor(EIGHT_SCHOOLS_EFFECTS)
    pyro.sample("effect", dist.Normal(theta, torch.tensor(EIGHT_SCHOOLS_ERRORS)), obs=effects)


def centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        observe(pyro.sample("theta", dist.Normal(mu, tau)))


def non_centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        unit = pyro.sample("unit", dist.Normal(0.0, 1.0))
        observe(pyro.deterministic("theta", mu + tau * unit))


def integrate():
    """The exact moments ``{name: (mean, standard deviation)}`` and the log evidence."""
    mus = torch.linspace(-30, 40, 1401, dtype=torch.float64)
    log_taus = torch.linspace(-14, 14, 5601, dtype=torch.float64)
    mu, log_tau = mus.unsqueeze(-1), log_taus
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    for effect, error in torch.tensor([EIGHT_SCHOOLS_EFFECTS, EIGHT_SCHOOLS_ERRORS], dtype=torch.float64).T:
        log_p = log_p + dist.Normal(mu, (tau**2 + error**2).sqrt()).log_prob(effect)
    log_cell = math.log((mus[1] - mus[0]) * (log_taus[1] - log_taus[0]))
    log_evidence = log_p.logsumexp((0, 1)).item() + log_cell
    weight = log_p.flatten().softmax(0).reshape(log_p.shape)
    variance = EIGHT_SCHOOLS_ERRORS[0] ** 2
    share = tau**2 / (tau**2 + variance)
    theta = mu + share * (EIGHT_SCHOOLS_EFFECTS[0] - mu)

    def moments(x, extra=0.0):
        mean = (weight * x).sum()
        return mean.item(), (weight * ((x - mean) ** 2 + extra)).sum().sqrt().item()

    exact = {"mu": moments(mu), "tau": moments(tau), "log tau": moments(log_tau)}
    exact["theta[0]"] = moments(theta, share * variance)
    return exact, log_evidence


def summarize(draws):
    """
    :param dict draws: ``[num_draws, *site]``.
    """
    tau = draws["tau"].flatten()
    columns = {"mu": draws["mu"].flatten(), "tau": tau, "log tau": tau.log()}
    columns["theta[0]"] = draws["theta"].reshape(len(tau), -1)[:, 0]
    return {name: (x.mean().item(), x.std().item()) for name, x in columns.items()}


def draw(guide, num_draws):
    if isinstance(guide, RVRSGuide):
        return guide.sample_posterior(num_draws)
    sites = ["mu", "tau", "theta"]
    return Predictive(centred, guide=guide, num_samples=num_draws, return_sites=sites, parallel=True)()


def make_row(name, moments, bound=None, acceptance=None, seconds=None):
    row = {"method": name}
    row.update({key: f"{mean:.2f} ± {sd:.2f}" for key, (mean, sd) in moments.items()})
    row["ELBO"] = "" if bound is None else f"{bound[0]:.3f} ± {bound[1]:.3f}"
    row["acceptance"] = "" if acceptance is None else f"{acceptance:.3f}"
    row["CPU time, s"] = "" if seconds is None else f"{seconds:.1f}"
    return row


def run_guide(args, target=None):
    restart(args.seed)
    centre = torch.tensor(EIGHT_SCHOOLS_EFFECTS).mean()
    values = {"mu": centre, "tau": torch.tensor(5.0), "theta": centre.expand(8)}
    guide = AutoDiagonalNormal(centred, init_loc_fn=init_to_value(values=values))
    half = args.num_steps // 2
    num_steps = args.num_steps if target is None else half
    seconds = fit(centred, guide, num_steps=num_steps, lr=args.lr, desc="mean field")
    name, z = "mean field", None
    if target is not None:
        name = f"RVRS, Z = {target}"
        guide = RVRSGuide(centred, guide, Z_target=target)
        seconds += fit(centred, guide, num_steps=half, lr=args.lr_rvrs, desc=name)
        z = guide.Z.item()
    moments = summarize(draw(guide, args.num_draws))
    return make_row(name, moments, elbo(centred, guide, args.num_samples), z, seconds)


def run_nuts(args):
    restart(args.seed)
    mcmc = MCMC(
        NUTS(non_centred), num_samples=args.num_nuts, warmup_steps=args.num_nuts // 3, disable_progbar=args.smoke_test
    )
    with Clock() as clock:
        mcmc.run()
    draws = mcmc.get_samples()
    draws["theta"] = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["unit"]
    return make_row("NUTS", summarize(draws), seconds=clock.seconds)


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_steps, args.num_samples, args.num_draws, args.num_nuts = 20, 200, 50, 6
    exact, log_evidence = integrate()
    rows = [run_guide(args), *(run_guide(args, target) for target in args.Z_target)]
    rows += [run_nuts(args), make_row("exact", exact)]
    report(args, rows, log_evidence=round(log_evidence, 4))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--lr-rvrs", type=float, default=0.05)
    parser.add_argument("--Z-target", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--num-samples", type=int, default=100_000, help="proposals from which the ELBO is estimated")
    parser.add_argument("--num-draws", type=int, default=20_000, help="draws from which the moments are taken")
    parser.add_argument("--num-nuts", type=int, default=1000, help="draws of NUTS, after a third as many to warm up")
    run(main, parser)
