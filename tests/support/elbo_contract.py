# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What every ELBO must do.

A new estimator inherits the contract in three lines::

    class TestMyELBOContract(ELBOContract):
        def make_elbo(self, **kwargs):
            return MyELBO(**kwargs)

Statistical tests fail by chance once in 50,000 seeds.
"""

import copy
import math
import pickle
import random
from typing import Any, Dict, Optional, Tuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from pyro.poutine.runtime import am_i_wrapped

from pyro_rb.diagnostics.run.gradients import sample_gradients
from pyro_rb.ops.control_variate import START_UP
from tests.support.cases import Case, positive, real
from tests.support.common import assert_unbiased, assert_variance_ratio
from tests.support.guides import GUIDES
from tests.support.models import CONJ_X, EXACT, conj, conj_model, mix_model, two

ENTRANCES = ("loss_and_grads", "differentiable_loss")
PARTICLES = {
    "one": {},
    "looped": {"num_particles": 2},
    "vectorized": {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1},
}
# What statistics are made of: few calls of many particles, whose means are near to normal.
MANY = {"num_particles": 2000, "vectorize_particles": True, "max_plate_nesting": 1}


def evaluate(
    elbo: ELBO, case: Case, entrance: str = "loss_and_grads", seed: Optional[int] = None
) -> Tuple[float, Dict[str, Optional[torch.Tensor]]]:
    """The loss, and the gradient that one call leaves in ``.grad``."""
    if seed is not None:
        pyro.set_rng_seed(seed)
    parameters = case.parameters()
    for p in parameters.values():
        p.grad = None
    loss = getattr(elbo, entrance)(case.model, case.guide, *case.args)
    if entrance == "differentiable_loss":
        if loss.requires_grad:
            loss.backward()
        loss = loss.item()
    return loss, {name: p.grad for name, p in parameters.items()}


def case_args(case: Case) -> Tuple[Any, ...]:
    return (case.model, case.guide, *case.args)


def draw_gradients(elbo: ELBO, case: Case, num_samples: int, **options: Any) -> Dict[str, Any]:
    """
    ``sample_gradients`` for a case: name -> tensor of shape ``[num_samples, *shape]``. Arguments are not validated,
    which takes a third of the time.
    """
    with pyro.validation_enabled(False):
        return sample_gradients(
            elbo, case.model, case.guide, case.args, None, num_samples, parameters=case.parameters(), **options
        )


def draw_losses(elbo: ELBO, case: Case, entrance: str, num_samples: int) -> torch.Tensor:
    """What an entrance returns, ``[num_samples]``."""
    with pyro.validation_enabled(False):
        calls = (getattr(elbo, entrance)(*case_args(case)) for _ in range(num_samples))
        return torch.stack([torch.as_tensor(loss).detach() for loss in calls])


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Equal within the rounding of float64, which the caller has made the default."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


class Trainable(PyroModule):
    """conj as a module, for ``elbo(model, guide)``."""

    def forward(self, x: torch.Tensor) -> None:
        conj_model(x)


class ELBOContract:
    """Inherit, and define :meth:`make_elbo`.

    :cvar reference: the loss of Pyro that the estimator replaces.
    :cvar cases: names of the cases in ``tests.support.guides.GUIDES`` that it accepts.
    """

    reference = Trace_ELBO
    cases: Tuple[str, ...] = tuple(EXACT) + ("auto_normal", "amortized", "pyro_module")

    def make_elbo(self, **kwargs: Any) -> ELBO:
        """The estimator, given the constructor arguments of Pyro's ELBO."""
        raise NotImplementedError

    def exact_loss(self, case: Case, num_particles: int) -> torch.Tensor:
        """The objective, for an estimator whose objective is not the ELBO."""
        assert case.exact_loss is not None
        return case.exact_loss()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, indirect=True)

    @pytest.fixture
    def case(self, request: Any, dtype: None) -> Case:
        return GUIDES[request.param]()

    @pytest.fixture
    def dtype(self) -> None:
        """float64, so that identities hold to many digits."""
        torch.set_default_dtype(torch.float64)

    def fresh(self, case: str) -> Case:
        """A case with a param store of its own."""
        pyro.clear_param_store()
        return GUIDES[case]()

    # -- The objective ------------------------------------------------------

    def check_gradient(
        self, case: Case, elbo: ELBO, num_samples: int, detect: float = 0.2
    ) -> None:
        samples = draw_gradients(elbo, case, num_samples, seed=0)
        loss = self.exact_loss(case, elbo.num_particles)
        exact = torch.autograd.grad(loss, list(case.parameters().values()))
        assert_unbiased(samples, dict(zip(case.parameters(), exact)), detect=detect)

    def test_gradient_is_unbiased(self, case):
        self.check_gradient(case, self.make_elbo(**MANY), 250 if case.subsamples else 24)

    @pytest.mark.parametrize("particles", ["one", "looped"])
    @pytest.mark.parametrize("name", ["hierarchical", "discrete_first", "discrete_last"])
    def test_gradient_of_few_particles_is_unbiased(self, dtype, name, particles):
        if name in self.cases:
            elbo = self.make_elbo(**PARTICLES[particles])
            self.check_gradient(self.fresh(name), elbo, 120 if name == "hierarchical" else 500, detect=1.0)

    @pytest.mark.parametrize("entrance", ["loss", "loss_and_grads"])
    def test_loss_is_unbiased(self, case, entrance):
        """What ``differentiable_loss`` returns is compared number by number, in :meth:`test_entrances_agree`."""
        elbo = self.make_elbo(**MANY)
        losses = draw_losses(elbo, case, entrance, 150 if case.subsamples else 24)
        assert_unbiased(losses, self.exact_loss(case, elbo.num_particles).detach(), detect=0.2)

    @pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
    def test_more_particles_have_less_variance(self, vectorize):
        case = two()
        options = {"num_particles": 5, "vectorize_particles": vectorize}
        many = draw_gradients(self.make_elbo(**options), case, 100, seed=0)
        one = draw_gradients(self.make_elbo(), case, 200, seed=1)
        assert_variance_ratio(many, one, below=0.5)

    def test_particles_do_not_change_a_deterministic_gradient(self, dtype):
        x = torch.tensor(CONJ_X)
        case = Case(mix_model, AutoDelta(mix_model), (x,))
        expected = evaluate(self.reference(), case)
        for options in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
            for entrance in ENTRANCES:
                assert_same(evaluate(self.make_elbo(**options), case, entrance), expected)

    # -- The two entrances --------------------------------------------------

    @pytest.mark.parametrize("particles", PARTICLES)
    def test_entrances_agree(self, case, particles):
        first, second = (self.make_elbo(**PARTICLES[particles]) for _ in range(2))
        for seed in range(6):  # an estimator with a memory must agree after its start-up too
            expected = evaluate(first, case, "loss_and_grads", seed)
            assert_same(evaluate(second, case, "differentiable_loss", seed), expected)

    def test_return_types(self, dtype):
        case = conj()
        for entrance in ("loss", "loss_and_grads"):
            assert isinstance(getattr(self.make_elbo(), entrance)(*case_args(case)), float)
        loss = self.make_elbo().differentiable_loss(*case_args(case))
        assert loss.shape == () and loss.dtype == torch.float64 and loss.requires_grad

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_gradients_accumulate(self, dtype, entrance):
        case, first, second = conj(), self.make_elbo(), self.make_elbo()
        one, two_ = (evaluate(first, case, entrance, seed)[1] for seed in (0, 1))
        evaluate(second, case, entrance, 0)
        pyro.set_rng_seed(1)
        loss = getattr(second, entrance)(*case_args(case))
        if entrance == "differentiable_loss":
            loss.backward()
        for name, p in case.parameters().items():
            assert_same(p.grad, one[name] + two_[name])

    def test_loss_makes_no_gradient(self):
        case = conj()
        with torch.no_grad():
            self.make_elbo().loss(*case_args(case))
        self.make_elbo().loss(*case_args(case))
        assert all(p.grad is None for p in case.parameters().values())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_evaluation_between_steps(self, dtype, context):
        """As for a validation set: it gives a number, and does not count as a step."""
        case = GUIDES["auto_normal"]()
        elbo = self.make_elbo(**PARTICLES["looped"])
        evaluate(elbo, case)
        report, state = (getattr(elbo, name, dict)() for name in ("report", "state_dict"))
        with context():
            for entrance in ("loss", *ENTRANCES):
                if hasattr(elbo, entrance):
                    assert math.isfinite(float(getattr(elbo, entrance)(*case_args(case))))
        assert getattr(elbo, "report", dict)() == report
        assert getattr(elbo, "state_dict", dict)() == state

    def test_arguments_reach_model_and_guide(self, dtype):
        def model(x, *, noise):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, noise), obs=x)

        def guide(x, *, noise):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(real("loc", 0.3) * x, noise))

        x = torch.tensor(CONJ_X)
        for entrance in ENTRANCES:
            results = []
            for elbo in (self.make_elbo(), self.reference()):
                pyro.set_rng_seed(0)
                results.append(torch.as_tensor(getattr(elbo, entrance)(model, guide, x, noise=0.5)))
            assert_same(*results)

    def test_number_of_data_may_change(self, dtype):
        case, elbo = self.fresh("amortized"), self.make_elbo()
        for size in (4, 2, 3):
            case.args = (torch.tensor(CONJ_X)[:size],)
            assert_same(evaluate(elbo, case, seed=size), evaluate(self.make_elbo(), case, seed=size))

    # -- Training -----------------------------------------------------------

    def check_posterior(self, guide: AutoNormal) -> None:
        exact = 0.8 * torch.tensor(CONJ_X)
        torch.testing.assert_close(guide.locs.z.detach(), exact, atol=0.1, rtol=0)
        torch.testing.assert_close(
            guide.scales.z.detach(), torch.full((4,), 0.2**0.5), atol=0.1, rtol=0
        )

    @pytest.mark.parametrize("local", [False, True], ids=["shared", "module_local"])
    def test_module_call_trains(self, local):
        x = torch.tensor(CONJ_X)
        with pyro.settings.context(module_local_params=local):
            model = Trainable()
            guide = AutoNormal(model, init_scale=0.5)
            elbo = self.make_elbo(num_particles=8, vectorize_particles=True)(model, guide)
            elbo(x)
            optim = torch.optim.Adam(elbo.parameters(), lr=0.05)
            for step in range(150):
                for group in optim.param_groups:
                    group["lr"] = 0.05 * 0.98**step
                optim.zero_grad()
                elbo(x).backward()
                optim.step()
            self.check_posterior(guide)
            state = copy.deepcopy(elbo.state_dict())
            assert len(state) == len(list(elbo.parameters())) == 2
            with torch.no_grad():
                for p in elbo.parameters():
                    p.zero_()
            elbo.load_state_dict(state)
            self.check_posterior(guide)

    def test_svi_trains(self):
        x = torch.tensor(CONJ_X)
        guide = AutoNormal(conj_model, init_scale=0.5)
        elbo = self.make_elbo(num_particles=8, vectorize_particles=True)
        svi = SVI(conj_model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.98}), elbo)
        before = svi.evaluate_loss(x)
        for _ in range(150):
            svi.step(x)
        self.check_posterior(guide)
        assert svi.evaluate_loss(x) < before

    # -- Few or odd parameters and sites -------------------------------------

    @pytest.mark.parametrize("entrance", ("loss",) + ENTRANCES)
    def test_no_parameters(self, dtype, entrance):
        def guide():
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("z2", dist.Normal(z1, 0.7))

        losses = []
        for elbo in (self.make_elbo(), self.reference()):
            pyro.set_rng_seed(0)
            losses.append(getattr(elbo, entrance)(two().model, guide))
        assert not getattr(losses[0], "requires_grad", False)
        assert_same(*map(torch.as_tensor, losses))

    @pytest.mark.parametrize("entrance", ("loss",) + ENTRANCES)
    def test_no_sites(self, entrance):
        assert getattr(self.make_elbo(), entrance)(lambda: None, lambda: None) == 0

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_unused_parameter_has_no_gradient(self, dtype, entrance):
        case, elbo = conj(), self.make_elbo()
        used = case.guide

        def guide(x):
            real("unused", 1.0, 2.0)
            used(x)

        case.guide = guide
        guide(*case.args)
        for seed in range(6):
            gradient = evaluate(elbo, case, entrance, seed)[1]["unused"]
            assert gradient is None or not gradient.any()

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_frozen_parameter(self, dtype, entrance):
        """
        Freezing one parameter leaves the gradients of the others as they were, before an adaptive scale is learned:
        parameters of one distribution share it.
        """
        case, first, second = self.fresh("pyro_module"), self.make_elbo(), self.make_elbo()
        frozen = case.guide.encoder.weight
        for seed in range(START_UP):
            expected = evaluate(first, case, entrance, seed)[1]
            frozen.requires_grad_(False)
            actual = evaluate(second, case, entrance, seed)[1]
            frozen.requires_grad_(True)
            assert actual.pop("encoder.weight") is None
            assert expected.pop("encoder.weight") is not None
            assert_same(actual, expected)

    def test_plain_module_needs_differentiable_loss(self, dtype):
        """As Pyro's: ``loss_and_grads`` calls no backward if there is no param site."""
        case = self.fresh("plain_module")
        assert all(g is None for g in evaluate(self.make_elbo(), case)[1].values())
        gradient = evaluate(self.make_elbo(), case, "differentiable_loss")[1]
        assert all(g.any() for g in gradient.values())

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_scale_multiplies_loss_and_gradient(self, dtype, entrance):
        case, first, second = self.fresh("hierarchical"), self.make_elbo(), self.make_elbo()
        scaled = copy.copy(case)
        scaled.model, scaled.guide = (poutine.scale(f, 3.0) for f in (case.model, case.guide))
        for seed in range(6):
            loss, gradient = evaluate(first, case, entrance, seed)
            actual = evaluate(second, scaled, entrance, seed)
            assert_same(actual, (3 * loss, {name: 3 * g for name, g in gradient.items()}))

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_masked_item_has_no_gradient(self, dtype, entrance):
        case, elbo = conj(), self.make_elbo()
        mask = torch.tensor([True, False, True, True])
        case.model, case.guide = (poutine.mask(f, mask) for f in (case.model, case.guide))
        for seed in range(6):
            for gradient in evaluate(elbo, case, entrance, seed)[1].values():
                assert gradient[1] == 0 and gradient[mask].all()

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_dtype_of_gradient(self, entrance):
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            for name in ("mix", "discrete_last"):
                case, elbo = self.fresh(name), self.make_elbo()
                for seed in range(6):
                    loss, gradient = evaluate(elbo, case, entrance, seed)
                    assert np.isfinite(loss)
                    assert all(g.dtype == dtype and g.isfinite().all() for g in gradient.values())

    # -- State --------------------------------------------------------------

    def test_two_models_share_one_object(self, dtype):
        """Interleaved calls give what two objects give."""
        shared, own = self.make_elbo(), [self.make_elbo(), self.make_elbo()]
        cases = [conj(), two()]  # in one param store, without a parameter in common
        for seed in range(6):
            for i, case in enumerate(cases):
                expected = evaluate(own[i], case, seed=seed)
                assert_same(evaluate(shared, case, seed=seed), expected)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
    def test_copies(self, dtype, clone):
        options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}
        case, elbo = conj(), self.make_elbo(**options)
        assert_same(evaluate(clone(elbo), case, seed=0), evaluate(elbo, case, seed=0))
        for seed in range(6):
            evaluate(elbo, case, seed=seed)
        copied = clone(elbo)  # after use, when there is something to hold on to
        assert type(copied) is type(elbo)
        for name in ("num_particles", "vectorize_particles", "max_plate_nesting"):
            assert getattr(copied, name) == getattr(elbo, name)
        expected = evaluate(self.make_elbo(**options), case, seed=0)
        assert_same(evaluate(copied, case, seed=0)[0], expected[0])

    def test_constructor_arguments_are_pyros(self):
        options = {
            "num_particles": 2,
            "max_plate_nesting": 1,
            "vectorize_particles": True,
            "strict_enumeration_warning": False,
            "ignore_jit_warnings": True,
            "jit_options": {"check_trace": False},
            "retain_graph": True,
            "tail_adaptive_beta": -0.5,
        }
        elbo, reference = self.make_elbo(**options), self.reference(**options)
        for name in options:
            assert getattr(elbo, name) == getattr(reference, name)
        with pytest.raises(TypeError, match="no_such_option"):
            self.make_elbo(no_such_option=1)

    def test_plate_nesting_is_guessed(self, dtype):
        case, options = conj(), {"num_particles": 3, "vectorize_particles": True}
        elbo, reference = self.make_elbo(**options), self.reference(**options)
        losses = [evaluate(e, case, seed=0)[0] for e in (elbo, reference)]
        assert elbo.max_plate_nesting == reference.max_plate_nesting == 2
        assert_same(*map(torch.tensor, losses))

    @pytest.mark.parametrize("retain", [None, True])
    def test_retain_graph(self, dtype, retain):
        loc = real("loc", *CONJ_X)
        shared = loc.exp()  # part of the graph of both calls
        case = conj()

        def guide(x):
            real("loc", 0.0)  # a param site: else Pyro calls no backward
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(shared, positive("scale", 1.0)))

        elbo = self.make_elbo(retain_graph=retain)
        elbo.loss_and_grads(case.model, guide, *case.args)
        if retain:
            elbo.loss_and_grads(case.model, guide, *case.args)
            assert loc.grad.all()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                elbo.loss_and_grads(case.model, guide, *case.args)

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_state_alone(self, training):
        x = torch.tensor(CONJ_X)
        model, guide = Trainable(), AutoNormal(Trainable())
        guide(x)
        model.train(training), guide.train(training)
        parameters = dict(pyro.get_param_store().named_parameters())
        values = {name: p.detach().clone() for name, p in parameters.items()}
        elbo = self.make_elbo()
        for _ in range(5):
            for call in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
                call(model, guide, x)
        after = dict(pyro.get_param_store().named_parameters())
        assert after.keys() == parameters.keys()
        for name, p in after.items():
            assert p is parameters[name] and p.requires_grad and torch.equal(p, values[name])
        assert model.training is training and guide.training is training
        assert not am_i_wrapped() and torch.is_grad_enabled()

    @pytest.mark.parametrize("entrance", ("loss",) + ENTRANCES)
    @pytest.mark.parametrize("where", ["model", "guide"])
    def test_recovers_from_an_exception(self, dtype, where, entrance):
        class Oops(Exception):
            pass

        case, elbo = conj(), self.make_elbo()
        expected = evaluate(self.make_elbo(), case, seed=0)
        inner, broken = getattr(case, where), copy.copy(case)

        def fails(x):
            inner(x)
            raise Oops

        setattr(broken, where, fails)
        with pytest.raises(Oops):
            getattr(elbo, entrance)(*case_args(broken))
        assert not am_i_wrapped()
        assert_same(evaluate(elbo, case, seed=0), expected)

    # -- Warnings, as Pyro's ------------------------------------------------

    @pytest.mark.parametrize("entrance", ("loss",) + ENTRANCES)
    def test_warns_of_nan(self, entrance):
        case = conj()
        with torch.no_grad():
            case.parameters()["loc"].fill_(float("nan"))
        with pyro.validation_enabled(False):
            with pytest.warns(UserWarning, match="Encountered NaN: loss"):
                getattr(self.make_elbo(), entrance)(*case_args(case))

    def test_warns_of_missing_guide_site(self):
        case = conj()
        with pytest.warns(UserWarning, match="Found vars in model but not guide: {'z'}"):
            self.make_elbo().loss(case.model, lambda x: None, *case.args)

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_warns_of_surplus_guide_site(self, entrance):
        def model():
            pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))

        with pytest.warns(UserWarning, match=r"in guide but not model(.|\n)*{'z2'}"):
            getattr(self.make_elbo(), entrance)(model, two().guide)

    def test_uses_no_other_random_generator(self):
        case, states = conj(), (random.getstate(), np.random.get_state()[1].tolist())
        self.make_elbo().loss_and_grads(*case_args(case))
        assert states == (random.getstate(), np.random.get_state()[1].tolist())
