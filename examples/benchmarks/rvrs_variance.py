# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Variance of the pathwise gradient of RVRSGuide, and of the score-function form.

Both are computed from the same accepted draws of a fitted mean-field guide, two at a time.
Variances are summed over the parameters of the guide. The score-function form is the covariance of
f and ``rho`` times the score::

    python examples/benchmarks/rvrs_variance.py --json variance.json
"""

import json

import pyro
import pyro.distributions as dist
import torch
from common import make_parser, schools, write
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from tqdm import tqdm

from pyro_rb import RVRSGuide
from pyro_rb.ops.rejection import acceptance
from support.command_line import restart, run, set_up


def one():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.5 * z + 1.5 * (2 * z).tanh(), 0.8), obs=torch.tensor(2.0))


def logistic(num_features):
    x = torch.randn(100, num_features)
    y = torch.bernoulli((1.5 * x[:, 0] - x[:, 1]).sigmoid())

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(num_features), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            logits = w @ x.T
            logits = logits.squeeze(-2) if w.dim() > 1 else logits
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


def cases(smoke_test):
    yield "one latent", one
    yield "eight schools, 10 latents", schools()
    for num_features in (3, 17) if smoke_test else (17, 50):
        yield f"logistic regression, {num_features} latents", logistic(num_features)


def gradients(guide, num_draws):
    """Both forms, ``[num_draws, parameters]``."""
    proposal = guide.guide
    parameters = list(proposal.parameters())
    path, score = [], []
    for _ in range(num_draws):
        for p in parameters:
            p.grad = None
        Trace_ELBO().differentiable_loss(guide.model, guide).backward()
        path.append(torch.cat([-p.grad.reshape(-1) for p in parameters]))
        proposer = guide._make_proposer((), {})
        accepted = guide._sample(proposer, 2)
        lw, T = accepted.log_weight, accepted.T
        s, odds = (lw + T).sigmoid(), guide.epsilon / (1 - guide.epsilon)
        f = lw - acceptance(lw, T, guide.epsilon).log()
        rho = (odds + s * s) / (odds + s)
        weight = 2 * (f - f.mean()) * rho
        values = {n: v.detach() for n, v in accepted.rounds[0].tap.path.values.items()}
        size = len(accepted.rounds[0].log_weight)
        if len(accepted.rounds) > 1:
            path.pop()  # keep to calls of one round, in both
            continue
        log_q = proposer.log_prob_sum(proposer.run(proposal, size, values))
        total = (weight / 2 * log_q[accepted.position]).sum()
        grads = torch.autograd.grad(total, parameters)
        score.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(path), torch.stack(score)


def measure(model, epsilon, Z_target, args):
    restart(args.seed)
    proposal = AutoDiagonalNormal(model, init_scale=0.3)
    num_steps, num_draws = (5, 4) if args.smoke_test else (800, args.num_draws)
    svi = SVI(model, proposal, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step()
    guide = RVRSGuide(model, proposal, epsilon=epsilon, Z_target=Z_target)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(num_steps // 10):
        svi.step()
    guide.adaptation = "fixed"
    path, score = gradients(guide, num_draws)
    distance = (path.mean(0) - score.mean(0)).abs()
    error = (path.var(0) / len(path) + score.var(0) / len(score)).sqrt()
    return {
        "variance, score / path": round((score.var(0).sum() / path.var(0).sum()).item(), 2),
        "largest z of the difference": round((distance / error).max().item(), 1),
    }


def main(args):
    set_up(args)
    results = {}
    settings = [(1e-4, 0.33), (0.01, 0.33), (0.1, 0.33), (0.01, 0.1)]
    for name, model in tqdm(list(cases(args.smoke_test)), disable=args.smoke_test):
        for epsilon, Z_target in settings[:1] if args.smoke_test else settings:
            key = f"{name}, epsilon = {epsilon:g}, Z = {Z_target}"
            results[key] = measure(model, epsilon, Z_target, args)
            print(key, json.dumps(results[key]))
    write(args, results)


if __name__ == "__main__":
    parser = make_parser(__doc__, csv=False)
    parser.add_argument("--num-draws", type=int, default=400, help="draws of each gradient")
    run(main, parser)
