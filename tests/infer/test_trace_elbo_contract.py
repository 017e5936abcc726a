# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The contract must pass on Pyro's own loss, and fail on losses with one defect."""

from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item

from tests.support.elbo_contract import ELBOContract
from tests.support.guides import GUIDES

pytestmark = pytest.mark.slow


class TestTraceELBOContract(ELBOContract):
    def make_elbo(self, **kwargs: Any) -> Trace_ELBO:
        return Trace_ELBO(**kwargs)


class HalfGradient(Trace_ELBO):
    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        return loss, surrogate / 2


class NoEntropy(Trace_ELBO):
    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, _ = super()._differentiable_loss_particle(model_trace, guide_trace)
        return loss, -model_trace.log_prob_sum()


class ScoreDroppedPerSite(Trace_ELBO):
    """Every log q(z) less the part that flows through z: biased where z is a Delta."""

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        for site in guide_trace.nodes.values():
            if site["type"] == "sample" and site["fn"].has_rsample:
                surrogate = surrogate - site["fn"].log_prob(site["value"].detach()).sum()
        return loss, surrogate


class IgnoresScale(Trace_ELBO):
    def _get_trace(self, model, guide, args, kwargs):
        traces = super()._get_trace(model, guide, args, kwargs)
        for trace in traces:
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    site["log_prob_sum"] = site["unscaled_log_prob"].sum()
        return traces


class ShiftedLoss(Trace_ELBO):
    def loss(self, *args, **kwargs):
        return super().loss(*args, **kwargs) * 1.2


class OneParticle(Trace_ELBO):
    def _get_traces(self, *args, **kwargs):
        first = next(super()._get_traces(*args, **kwargs))
        return [first] * self.num_particles


class OtherEntrance(Trace_ELBO):
    def differentiable_loss(self, *args, **kwargs):
        torch.rand(())
        return super().differentiable_loss(*args, **kwargs)


class RemembersFirstModel(Trace_ELBO):
    def loss_and_grads(self, model, guide, *args, **kwargs):
        self.__dict__.setdefault("pair", (model, guide))
        return super().loss_and_grads(*self.pair, *args, **kwargs)


class DropsRetainGraph(Trace_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = self.differentiable_loss(*args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return torch_item(loss)


class LeavesEvalMode(Trace_ELBO):
    def loss_and_grads(self, model, guide, *args, **kwargs):
        if isinstance(guide, torch.nn.Module):
            guide.eval()
        return super().loss_and_grads(model, guide, *args, **kwargs)


@pytest.mark.parametrize(
    "elbo, test, arguments",
    [
        (HalfGradient, "test_gradient_is_unbiased", ["hierarchical"]),
        (NoEntropy, "test_gradient_is_unbiased", ["mix"]),
        (ScoreDroppedPerSite, "test_gradient_is_unbiased", ["auto_normal"]),
        (IgnoresScale, "test_gradient_is_unbiased", ["subsample_scale_mask"]),
        (ShiftedLoss, "test_loss_is_unbiased", ["mean_field", "loss"]),
        (OneParticle, "test_more_particles_have_less_variance", [False]),
        (OtherEntrance, "test_entrances_agree", ["hierarchical", "one"]),
        (RemembersFirstModel, "test_two_models_share_one_object", [None]),
        (DropsRetainGraph, "test_retain_graph", [None, True]),
        (DropsRetainGraph, "test_plain_module_needs_differentiable_loss", [None]),
        (LeavesEvalMode, "test_leaves_state_alone", [True]),
    ],
)
def test_contract_sees_the_defect(elbo, test, arguments):
    class Contract(ELBOContract):
        def make_elbo(self, **kwargs):
            return elbo(**kwargs)

    torch.set_default_dtype(torch.float64)
    arguments = [GUIDES[a]() if a in GUIDES else a for a in arguments]
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        getattr(Contract(), test)(*arguments)
