# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What ``papers/rao_blackwell/binary.py`` compares to: estimators of other papers, with several draws of a discrete site.

The guide has one latent site, in one plate, whose items have no effect on one another. It runs once in a step, the
model once for all draws.

Leave-one-out (Kool, van Hoof and Welling, 2019) has independent draws. DisARM (Dong, Mnih and Tucker, 2020) has
antithetic pairs of bits. The unordered set estimator (Kool, van Hoof and Welling, 2020) has draws without
replacement. VIMCO (Mnih and Rezende, 2016) has another objective: the bound of as many draws (Burda et al., 2016).
"""

import math

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample

MAX_TABLE_BITS = 10


def log_weights(model, guide, args, draw):
    """
    Log densities of model and guide at draws of the guide's site, ``[num_draws, num_items]``.

    :param callable draw: of the distribution of that site, values ``[num_draws, num_items, *event]``.
    :return: these, the distribution, and the values.
    """
    trace = poutine.trace(guide).get_trace(*args)
    (site,) = [s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
    fn = site["fn"]
    values = draw(fn)
    trace = poutine.trace(poutine.condition(model, {site["name"]: values})).get_trace(*args)
    trace.compute_log_prob()
    log_p = sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
    return log_p, fn.log_prob(values), fn, values


class SeveralDraws(Trace_ELBO):
    """
    :param int num_draws: of the site, which are as many evaluations of the model.
    """

    def __init__(self, num_draws):
        super().__init__(num_particles=num_draws)

    def draw(self, fn):
        return fn.sample((self.num_particles,))

    def parts(self, log_p, log_q, fn, values):
        """The objective of each item, and what has its gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def loss(self, model, guide, *args):
        return -self.parts(*log_weights(model, guide, args, self.draw))[0].sum().item()

    def loss_and_grads(self, model, guide, *args):
        objective, surrogate = self.parts(*log_weights(model, guide, args, self.draw))
        (-surrogate.sum()).backward()
        return -objective.sum().item()


class LeaveOneOut(SeveralDraws):
    """The baseline is the mean cost of the other draws."""

    def parts(self, log_p, log_q, fn, values):
        cost = (log_p - log_q).detach()
        advantage = (cost - cost.mean(0)) * self.num_particles / (self.num_particles - 1)
        return cost.mean(0), (log_p + advantage * log_q).mean(0)


class Disarm(SeveralDraws):
    """The mean over antithetic pairs (Equation 9)."""

    def draw(self, fn):
        p = fn.base_dist.probs
        u = torch.rand((self.num_particles // 2,) + p.shape)
        return torch.cat([u < p, 1 - u < p]).to(p.dtype)

    def parts(self, log_p, log_q, fn, values):
        cost = (log_p - log_q).detach()
        (one, other), logits = values.chunk(2), fn.base_dist.logits
        score = ((one - other) * logits.detach().abs().sigmoid() * logits).sum(-1)
        difference = cost.chunk(2)[0] - cost.chunk(2)[1]
        return cost.mean(0), log_p.mean(0) + (0.5 * difference * score).mean(0)


class Vimco(SeveralDraws):
    """The baseline of a draw has the geometric mean of the other weights in place of its own."""

    def parts(self, log_p, log_q, fn, values):
        log_w = log_p - log_q
        fixed, num = log_w.detach(), self.num_particles
        bound = fixed.logsumexp(0) - math.log(num)
        others = (fixed.sum(0) - fixed) / (num - 1)
        instead = torch.where(torch.eye(num, dtype=torch.bool).unsqueeze(-1), others.unsqueeze(1), fixed)
        advantage = bound - (instead.logsumexp(1) - math.log(num))
        return bound, (fixed.softmax(0) * log_w + advantage * log_q).sum(0)


class UnorderedSet(SeveralDraws):
    """Draws without replacement, their weights, and the built-in baseline (Equation 12)."""

    def draw(self, fn):
        return draw_distinct(fn, self.num_particles)

    def parts(self, log_p, log_q, fn, values):
        cost = (log_p - log_q).detach()
        weights, baseline_weights = set_weights(log_q.detach().double().exp())
        baseline = torch.einsum("ijn,jn->in", baseline_weights.to(cost), cost)
        weights = weights.to(cost)
        return (weights * cost).sum(0), (weights * (log_p + (cost - baseline) * log_q)).sum(0)


def draw_distinct(fn, num_draws):
    """
    Draws of bits without replacement, in the order of the Gumbel top-k trick. A few bits have a table of all codes, as
    some may be likely. Of more bits a code is drawn again where it is an earlier one, which has the same
    distribution, and that of stochastic beam search.
    """
    num_bits = fn.event_shape[0]
    if num_bits <= MAX_TABLE_BITS:
        codes = torch.cartesian_prod(*num_bits * [torch.arange(2.0)]).reshape(-1, num_bits)
        log_q = fn.log_prob(codes.unsqueeze(1))
        noise = -torch.empty_like(log_q).exponential_().log()
        return codes[(log_q + noise).topk(num_draws, 0).indices]
    values = fn.sample((num_draws,))
    earlier = torch.ones(num_draws, num_draws, dtype=torch.bool).tril(-1).unsqueeze(-1)
    while True:
        is_late = ((values.unsqueeze(0) == values.unsqueeze(1)).all(-1) & earlier).any(1)
        if not is_late.any():
            return values
        values = torch.where(is_late.unsqueeze(-1), fn.sample((num_draws,)), values)


def set_weights(q):
    """
    Of a set ``S`` of values drawn without replacement, given their probabilities ``[num_draws, num_items]``.

    Let ``A(C)`` be the probability of drawing the rest of ``S`` in any order once ``C`` has been drawn, over the
    product of the probabilities of this rest. It is the sum of ``A(C + t)`` over ``t`` in the rest, over ``1 - q(C)``.

    :return: the weights ``q(s) R(S, s) = A({s}) / A({})``, as ``q``, and those of the baseline of ``s``, the values
        ``A({s, t}) / A({s})`` for ``t`` other than ``s``, and ``q(s)``, ``[num_draws, num_draws, num_items]``.
    """
    num = len(q)
    everything = 2**num - 1
    table = {everything: torch.ones_like(q[0])}
    for drawn in range(everything - 1, -1, -1):
        members = [drawn >> i & 1 for i in range(num)]
        rest = sum(table[drawn | 1 << i] for i in range(num) if not members[i])
        mass = q[[i for i in range(num) if members[i]]].sum(0)
        table[drawn] = rest / (1 - mass).clamp(min=torch.finfo(q.dtype).eps)
    ones = torch.stack([table[1 << i] for i in range(num)])
    pairs = torch.stack([torch.stack([table[1 << i | 1 << j] for j in range(num)]) for i in range(num)])
    baseline = torch.where(torch.eye(num, dtype=torch.bool).unsqueeze(-1), q, pairs / ones.unsqueeze(1))
    return ones / table[0], baseline
