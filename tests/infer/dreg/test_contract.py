# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""DReG_ELBO under the contract, with one particle unless a test asks for more: the
contract's exact losses are ELBOs. ``test_exact.py`` has the bounds of more."""

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam

from pyro_rb.infer import DReG_ELBO
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import (
    ENTRANCES,
    ELBOContract,
    Trainable,
    assert_same,
    draw_losses,
    evaluate,
)
from tests.support.iwae import Bound
from tests.support.models import CONJ_X, EXACT, conj, conj_model

pytestmark = pytest.mark.slow

REFUSED = {
    "discrete_first",
    "discrete_last",
    "gamma_partly_reparameterized",
    "gamma_score_function",
    "normal_score_function",
}


class TestDRegELBOContract(ELBOContract):
    cases = tuple(name for name in EXACT if name not in REFUSED) + ("amortized", "pyro_module")
    options: Any = {}

    def make_elbo(self, **kwargs: Any) -> DReG_ELBO:
        return DReG_ELBO(**{"num_particles": 1, **self.options, **kwargs})

    def as_bound(self, case: Case) -> Bound:
        """With one particle the bound is the ELBO."""
        assert case.exact_loss is not None
        return Bound(case, lambda num_particles: case.exact_loss(), nesting=1)

    def test_gradient_is_unbiased(self, case):
        """Copies in a plate in place of particles."""
        samples = self.as_bound(case).draw_gradients(self.make_elbo(), 250 if case.subsamples else 40, 2000)
        assert_unbiased(samples, case.exact_gradient(), detect=0.2)

    @pytest.mark.parametrize("name", ["hierarchical"])
    def test_gradient_of_few_particles_is_unbiased(self, dtype, name):
        """As the contract's, but for two particles, whose objective is another one."""
        self.check_gradient(self.fresh(name), self.make_elbo(), 250, detect=1.0)

    @pytest.mark.parametrize("entrance", ["loss", "loss_and_grads"])
    def test_loss_is_unbiased(self, case, entrance):
        """Copies in place of particles."""
        many = self.as_bound(case).replicate(2000)
        losses = draw_losses(self.make_elbo(), many, entrance, 150 if case.subsamples else 24) / 2000
        assert_unbiased(losses, self.exact_loss(case, 1).detach(), detect=0.2)

    def test_constructor_arguments_are_pyros(self):
        """Those of RenyiELBO, which has fewer, and ``retain_graph``."""
        options = {
            "num_particles": 3,
            "max_plate_nesting": 1,
            "vectorize_particles": True,
            "strict_enumeration_warning": False,
        }
        elbo, reference = self.make_elbo(**options), RenyiELBO(**options)
        for name in options:
            assert getattr(elbo, name) == getattr(reference, name)
        assert isinstance(elbo, RenyiELBO) and elbo.alpha == 0
        assert self.make_elbo(retain_graph=True).retain_graph is True
        with pytest.raises(TypeError, match="no_such_option"):
            self.make_elbo(no_such_option=1)

    def test_svi_trains(self):
        """Two particles: with eight, any guide is good enough to learn slowly."""
        x = torch.tensor(CONJ_X)
        guide = AutoNormal(conj_model, init_scale=0.5)
        elbo = self.make_elbo(num_particles=2, vectorize_particles=True)
        svi = SVI(conj_model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.99}), elbo)
        before = svi.evaluate_loss(x)
        for _ in range(300):
            svi.step(x)
        self.check_posterior(guide)
        assert svi.evaluate_loss(x) < before

    @pytest.mark.parametrize("local", [False, True], ids=["shared", "module_local"])
    def test_module_call_trains(self, local):
        """Two particles, as above."""
        x = torch.tensor(CONJ_X)
        with pyro.settings.context(module_local_params=local):
            model = Trainable()
            guide = AutoNormal(model, init_scale=0.5)
            elbo = self.make_elbo(num_particles=2, vectorize_particles=True)(model, guide)
            elbo(x)
            optim = torch.optim.Adam(elbo.parameters(), lr=0.1)
            decay = torch.optim.lr_scheduler.ExponentialLR(optim, 0.99)
            for _ in range(300):
                optim.zero_grad()
                elbo(x).backward()
                optim.step()
                decay.step()
            self.check_posterior(guide)

    def test_plate_nesting_is_guessed(self, dtype):
        """Against RenyiELBO, as there are three particles."""
        options = {"num_particles": 3, "vectorize_particles": True}
        elbo, reference = self.make_elbo(**options), RenyiELBO(**options)
        losses = [evaluate(e, conj(), seed=0)[0] for e in (elbo, reference)]
        assert elbo.max_plate_nesting == reference.max_plate_nesting == 2
        assert_same(*map(torch.tensor, losses))

    def test_dtype_of_gradient(self):
        """As the contract's, on guides without discrete sites."""
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            for name in ("mix", "hierarchical"):
                case, elbo = self.fresh(name), self.make_elbo(num_particles=3)
                for entrance in ENTRANCES:
                    loss, gradient = evaluate(elbo, case, entrance)
                    assert np.isfinite(loss)
                    assert all(g.dtype == dtype and g.isfinite().all() for g in gradient.values())


class TestAdaptiveDRegELBOContract(TestDRegELBOContract):
    options = {"control_variate_scale": "adaptive"}
