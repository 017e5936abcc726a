# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What ``papers/topk/semisupervised.py`` compares to: estimators of other papers for the label of that model.

NVIL (Mnih and Gregor, 2014) has a neural baseline. The Gumbel-softmax (Jang et al., 2017) has a relaxed
label, here with the straight-through gradient, which is biased. RELAX (Grathwohl et al., 2018) has a neural control
variate; its classifier runs twice in a step.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from models.ss_vae import NUM_LABELS, SemiSupervisedVae


class NvilVae(SemiSupervisedVae):
    """With a baseline for ``TraceGraph_ELBO``: a network of the image, and a running mean."""

    def __init__(self, num_pixels, style_size, width, aux_weight):
        super().__init__(num_pixels, style_size, width, aux_weight)
        net = nn.Sequential(nn.Linear(num_pixels, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0))
        self.baseline = [net]  # in a list, as TraceGraph_ELBO trains it by itself

    def guide_label(self, images):
        if not self.training:
            return super().guide_label(images)
        baseline = {"nn_baseline": self.baseline[0], "nn_baseline_input": images, "use_decaying_avg_baseline": True}
        return pyro.sample("label", dist.Categorical(logits=self.classifier(images)), infer={"baseline": baseline})


class GumbelVae(SemiSupervisedVae):
    """With a relaxed label, rounded, whose gradient passes. Its divergence is that of the label itself."""

    temperature = 0.5

    def guide_label(self, images):
        if not self.training:
            return super().guide_label(images)
        self.logits = self.classifier(images)
        temperature = images.new_tensor(self.temperature)
        # Rounding errors may take it off the simplex.
        relaxed = dist.RelaxedOneHotCategoricalStraightThrough(
            temperature, logits=self.logits, validate_args=False
        )
        with poutine.mask(mask=False):
            return pyro.sample("label", relaxed)

    def model_label(self, images, labels):
        if labels is not None or not self.training:
            return super().model_label(images, labels)
        prior = images.new_ones(NUM_LABELS)
        q = torch.distributions.Categorical(logits=self.logits)
        pyro.factor("divergence", -torch.distributions.kl_divergence(q, torch.distributions.Categorical(prior)))
        with poutine.mask(mask=False):
            return pyro.sample("label", dist.OneHotCategorical(prior))


def relax_gradient(logits, cost_of, control):
    """
    The gradient of the mean cost of a label by its logits, and what to lower by training the control variate.

    With ``z`` the logits plus Gumbel noise, ``b`` the largest of them and ``z'`` drawn anew given ``b`` it is
    ``(f(b) - c(z')) d log q(b) + d c(z) - d c(z')``. Its mean is the gradient for each ``c`` (Equation 8 of the paper).

    :param logits: ``[num, num_labels]``.
    :param cost_of: ``f``, takes labels ``[num]`` and returns costs ``[num]``.
    :param control: ``c``, takes ``z`` and returns ``[num]``.
    :return: labels, costs, the gradient ``[num, num_labels]``, and its mean square, to be differentiated.
    """
    logits = logits.detach().requires_grad_()
    log_p = logits.log_softmax(-1)
    tiny = torch.finfo(log_p.dtype).tiny
    u, v = (torch.rand_like(log_p).clamp(tiny, 1 - torch.finfo(log_p.dtype).eps) for _ in range(2))
    z = log_p - (-u.log()).log()
    label = z.detach().argmax(-1)
    rank = label.unsqueeze(-1)
    log_v = (-v.log()).log()
    largest = log_v.gather(-1, rank)
    z_again = -torch.logaddexp(log_v - log_p, largest).scatter(-1, rank, largest)
    log_q = log_p.gather(-1, rank).squeeze(-1)
    cost = cost_of(label)
    c, c_again = control(z), control(z_again)
    (score,) = torch.autograd.grad(log_q.sum(), logits, retain_graph=True)
    (slope,) = torch.autograd.grad((c - c_again).sum(), logits, create_graph=True)
    gradient = (cost.detach() - c_again).unsqueeze(-1) * score + slope
    return label, cost, gradient.detach(), gradient.square().sum(-1).mean()


class Relax(Trace_ELBO):
    """The ELBO of :class:`SemiSupervisedVae`, with RELAX for the label."""

    def __init__(self, width=64, lr=0.001):
        super().__init__()
        self.width, self.lr, self.control = width, lr, None

    def loss_and_grads(self, model, guide, images, labels=None):
        if labels is not None:
            return super().loss_and_grads(model, guide, images, labels)
        if self.control is None:
            size = images.shape[-1] + NUM_LABELS
            self.control = nn.Sequential(nn.Linear(size, self.width), nn.Tanh(), nn.Linear(self.width, 1))
            self.optimizer = torch.optim.Adam(self.control.parameters(), lr=self.lr)

        logits = model.__self__.classifier(images)

        def cost_of(label):
            given = {"label": label}
            guide_trace = poutine.trace(poutine.condition(guide, given)).get_trace(images)
            replayed = poutine.replay(poutine.condition(model, given), guide_trace)
            model_trace = poutine.trace(replayed).get_trace(images)
            model_trace.compute_log_prob()
            guide_trace.compute_log_prob()
            log_p = sum(site["log_prob"] for site in model_trace.nodes.values() if "log_prob" in site)
            log_q = guide_trace.nodes["label"]["log_prob"].detach() + guide_trace.nodes["style"]["log_prob"]
            return log_q - log_p

        def control(z):
            return self.control(torch.cat([z.softmax(-1), images], -1)).squeeze(-1)

        _, cost, gradient, square = relax_gradient(logits, cost_of, control)
        (cost.sum() + (gradient * logits).sum()).backward()
        self.optimizer.zero_grad()
        grads = torch.autograd.grad(square, list(self.control.parameters()))
        for p, grad in zip(self.control.parameters(), grads):
            p.grad = grad
        self.optimizer.step()
        return cost.sum().item()
