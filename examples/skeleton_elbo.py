# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A skeleton for a new estimator: Pyro's ``Trace_ELBO`` with one change, a leave-one-out baseline.

Sites without a reparameterized draw have the gradient ``cost * d log q``. Here the cost of a particle is taken relative
to the mean cost of the others, which does not depend on its draw: the expectation is the same, and the noise is less.
Copy the file within this folder, put your change in place of ``_baseline_terms``, and run the contract on it, as
``tests/test_skeleton_elbo.py`` does. The script shows the change in variance::

    python examples/skeleton_elbo.py
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import is_identically_zero, torch_item
from pyro.util import warn_if_nan

from pyro_rb.diagnostics import gradient_moments
from support.command_line import make_parser, run


class LeaveOneOut_ELBO(Trace_ELBO):
    """
    :class:`~pyro.infer.trace_elbo.Trace_ELBO` with a leave-one-out baseline over particles, for each item of a plate.

    **Requirements.** Those of ``Trace_ELBO``, and two particles or more: with one it is ``Trace_ELBO``. A site that is
    not in all particles, or has another shape in them, has no baseline.

    :param args: as of ``Trace_ELBO``.
    """

    # Two methods: SVI calls the first, and ``loss(model, guide)``, as a module, the second. Both
    # get their gradient from one surrogate, so that they cannot differ.

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss, surrogate, traces = self._estimate(model, guide, args, kwargs)
        trainable = any(site["type"] == "param" for pair in traces for trace in pair for site in trace.nodes.values())
        if trainable and getattr(surrogate, "requires_grad", False):
            surrogate.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model, guide, *args, **kwargs):
        loss, surrogate, _ = self._estimate(model, guide, args, kwargs)
        warn_if_nan(surrogate, "loss")
        return loss + (surrogate - torch_item(surrogate))

    def _estimate(self, model, guide, args, kwargs):
        # All particles at once, as the change needs them jointly. If they are looped there is a pair of traces for
        # each; if they are vectorized there is one pair, whose tensors have all particles in a dim of their own.
        # Either way the sum over particles is taken, and 1 / K makes it a mean.
        traces = list(self._get_traces(model, guide, args, kwargs))
        pairs = [self._differentiable_loss_particle(*pair) for pair in traces]
        loss, surrogate = (sum(column) for column in zip(*pairs))
        surrogate = surrogate + self._baseline_terms(traces)
        return loss / self.num_particles, surrogate / self.num_particles, traces

    def _baseline_terms(self, traces):
        """The change: what is added to the surrogate of the loss. Its gradient has expectation zero."""
        if self.num_particles == 1:
            return 0.0
        found = {}
        for model_trace, guide_trace in traces:
            log_r = None
            for name, site in guide_trace.nodes.items():
                if site["type"] != "sample" or is_identically_zero(site["score_parts"].score_function):
                    continue  # a reparameterized draw has no score term
                if log_r is None:
                    log_r = _compute_log_r(model_trace, guide_trace)  # the cost, without a gradient, by plates
                pair = (log_r.sum_to(site["cond_indep_stack"]), site["score_parts"].score_function)
                found.setdefault(name, []).append(pair)
        terms = 0.0
        for pairs in found.values():
            costs, scores = (list(column) for column in zip(*pairs))
            if self.vectorize_particles:
                terms = terms + (self._others(costs[0], -self.max_plate_nesting) * scores[0]).sum()
            elif len({cost.shape for cost in costs}) == 1 and len(costs) == self.num_particles:
                others = self._others(torch.stack(costs), 0)
                terms = terms + sum((other * score).sum() for other, score in zip(others, scores))
        return terms

    def _others(self, costs, dim):
        """The mean over the other particles, by particle."""
        if costs.dim() < abs(dim) or costs.shape[dim] != self.num_particles:
            return torch.zeros_like(costs)
        return (costs.sum(dim, keepdim=True) - costs) / (self.num_particles - 1)


def model(x):
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)


def guide(x):
    logits = pyro.param("logits", lambda: torch.zeros(len(x)))
    with pyro.plate("items", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def main(args):
    pyro.set_rng_seed(args.seed)
    x = torch.randn(50, device=args.device) + 1.0
    particles = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    for loss in (Trace_ELBO(**particles), LeaveOneOut_ELBO(**particles)):
        count = 20 if args.smoke_test else 2000
        moments = gradient_moments(loss, model, guide, (x,), num_samples=count)["logits"]
        variance = moments.variance.sum().item()
        print(f"{type(loss).__name__}: variance {variance:.4g}, mean {moments.mean.sum().item():.4g}")


if __name__ == "__main__":
    run(main, make_parser(__doc__, out=False))
