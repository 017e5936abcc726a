# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam, PyroOptim
from torch import nn

import pyro_rb
from pyro_rb import (
    DReG_ELBO,
    GradientGuard,
    NonFiniteError,
    RaoBlackwell_ELBO,
    STLTrace_ELBO,
)
from pyro_rb.diagnostics.guard.guarded_call import are_finite
from tests.support.compiled import needs_compiled

# Pyro's own, which name no cause.
pytestmark = pytest.mark.filterwarnings("ignore:Encountered (NaN|.?inf)")

positive = dist.constraints.positive


def adam(lr=0.01):
    return PyroOptim(torch.optim.Adam, {"lr": lr})


def normal_guide(loc=0.5, scale=1.0):
    def guide(*args):
        loc_ = pyro.param("loc", torch.tensor(loc))
        scale_ = pyro.param("scale", torch.tensor(scale), constraint=positive)
        pyro.sample("z", dist.Normal(loc_, scale_))

    return guide


def normal_model(*args):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def model_with(change, obs=1.0, scale=1.0):
    """A model whose data have a location that is a function of z."""

    def model(*args):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(change(z), torch.as_tensor(scale)), obs=torch.as_tensor(obs))

    return model


def step(model, guide, loss=None, *args, **options):
    guard = GradientGuard(Trace_ELBO() if loss is None else loss, **options)
    return SVI(model, guide, adam(), guard).step(*args)


def failure(model, guide, loss=None, *args):
    """The error of one step, that leaves no gradient behind."""
    with pytest.raises(NonFiniteError) as caught:
        step(model, guide, loss, *args)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    return caught.value


def root_without_slope(z):
    """Finite, but its derivative is not."""
    return (z * 0).sqrt()


# --- where the first bad number is ------------------------------------------------------


def test_parameter_that_was_bad_before():
    error = failure(normal_model, normal_guide(loc=math.nan))
    assert error.bad.kind == "parameter" and error.bad.site == "loc"
    assert "parameter 'loc' was nan before the step" in str(error)
    # Pyro says "Expected parameter loc ... but found invalid values"
    assert isinstance(error.__cause__, ValueError) and "Expected parameter loc" in str(error.__cause__)


def test_parameter_whose_constrained_value_overflows():
    guide = normal_guide()
    guide()
    with torch.no_grad():
        pyro.param("scale").unconstrained().fill_(200.0)
    assert "parameter 'scale', constrained, was inf before the step" in str(failure(normal_model, guide))


def test_parameter_of_a_module_is_named_with_its_coordinate():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.zeros(3)}))
    guide()
    with torch.no_grad():
        guide.locs.z[1] = math.inf
    assert "parameter 'AutoNormal.locs.z' was inf at [1] (1 of 3) before the step" in str(failure(model, guide))


def test_argument_of_a_model_site():
    error = failure(model_with(lambda z: (z - 100).sqrt()), normal_guide())
    assert (error.bad.kind, error.bad.role, error.bad.site) == ("argument", "model", "x")
    assert "at model site 'x', argument 'loc' of Normal is nan" in str(error)


def test_argument_out_of_range():
    error = failure(model_with(lambda z: z, scale=0.0), normal_guide())
    assert "at model site 'x', argument 'scale' of Normal is 0, not GreaterThan" in str(error)
    assert error.bad.kind == "argument"


def test_argument_of_a_wrapped_distribution_in_a_plate():
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = torch.ones(3)
        scale[2] = -1.0
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=data)

    error = failure(model, normal_guide(), None, torch.zeros(2, 3))
    assert "at model site 'x', argument 'scale' of Normal is -1 at [0, 2] (2 of 6), not GreaterThan" in str(error)


def test_argument_of_a_guide_site_comes_before_what_follows_from_it():
    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(loc.log() * 0 - (loc - 1).log(), 1.0))

    error = failure(normal_model, guide)
    assert (error.bad.role, error.bad.site) == ("guide", "z")


def test_value_of_a_guide_site():
    def guide():
        loc = pyro.param("loc", torch.tensor(30.0))
        pyro.sample("z", dist.LogNormal(loc, 50.0))

    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    pyro.set_rng_seed(0)
    with pytest.raises(NonFiniteError, match="at guide site 'z', the value is inf"):
        svi = SVI(model, guide, adam(1e-6), GradientGuard(Trace_ELBO()))
        for _ in range(50):
            svi.step()


def test_observed_value():
    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    data = torch.zeros(4)
    data[3] = math.nan
    error = failure(model, normal_guide(), None, data)
    assert "at model site 'x', the observed value is nan at [3] (1 of 4)" in str(error)


def test_log_prob_outside_of_the_support():
    def model():
        pyro.sample("z", dist.HalfNormal(1.0))

    error = failure(model, normal_guide(loc=-5.0))
    assert error.bad.kind == "log_prob" and error.bad.site == "z" and error.bad.role == "model"
    assert "log_prob of HalfNormal is -inf, at the value -" in str(error)
    assert "with loc 0, scale 1, which is outside of the support" in str(error)


@pytest.mark.parametrize(
    "make",
    [
        RaoBlackwell_ELBO,
        lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
        pytest.param(lambda: pyro_rb.compile(RaoBlackwell_ELBO(), "replay"), marks=needs_compiled),
    ],
    ids=["RaoBlackwell", "TraceEnum", "particles", "compiled"],
)
def test_first_step_is_repeated_with_its_random_numbers(make):
    """Finding ``max_plate_nesting`` draws some, and is no part of the step."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z < 0.5, 0.0, -torch.inf))

    found = []
    for seed in range(10):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        try:
            step(model, normal_guide(), make())
        except NonFiniteError as error:
            found.append(error.bad.site)
    assert 0 < len(found) < 10 and set(found) == {"f"}


def test_log_prob_names_the_arguments():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0 * z, torch.tensor([1.0, 1e-25, 1.0])), obs=torch.ones(3))

    error = failure(model, normal_guide())
    assert "log_prob of Normal is -inf at [1] (1 of 3), at the value 1 with loc " in str(error)
    assert str(error).endswith(", scale 1e-25")


def test_log_prob_does_not_take_one_weight_of_a_vector_for_that_of_an_element():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            logits = torch.tensor([0.0, 0.0, -math.inf])
            pyro.sample("x", dist.Categorical(logits=logits + 0 * z), obs=torch.tensor([2.0, 0.0, 0.0]))

    error = failure(model, normal_guide())
    assert str(error).endswith("log_prob of Categorical is -inf at [0] (1 of 3), at the value 2")


def test_derivative_of_a_log_prob():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        # log(0) ** 0: the density at 0 of a Gamma with shape 1 is finite, its slope in x is not.
        pyro.sample("x", dist.Gamma(torch.ones(()), 1.0 + 0 * z), obs=(z * 0).requires_grad_())

    error = failure(model, normal_guide())
    assert error.bad.kind == "gradient" and error.bad.site == "x"
    assert "the derivative of log_prob of Gamma with respect to the value is nan, where it is " in str(error)
    assert " with concentration 1, rate 1" in str(error)


def test_derivative_between_sites_names_the_line():
    error = failure(model_with(root_without_slope), normal_guide())
    assert error.bad.kind == "gradient"
    assert "the gradient of 'loc', 'scale' is not finite" in str(error)
    assert "return (z * 0).sqrt() (MulBackward0)" in error.bad.code
    assert "test_guard.py" in error.bad.code and "in root_without_slope" in str(error)


def test_mask_that_hides_no_derivative():
    data = torch.tensor([0.0, math.nan, 1.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=~data.isnan()):
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=data)

    error = failure(model, normal_guide())
    assert "the derivative of log_prob of Normal with respect to argument 'loc' is nan" in str(error)
    assert "a mask hides the log_prob of elements that are not finite, not their derivative" in str(error)


LOSSES = {
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=0, strict_enumeration_warning=False),
    "RenyiELBO": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=0),
    "JitTrace_ELBO": lambda: JitTrace_ELBO(ignore_jit_warnings=True),
    "two particles": lambda: Trace_ELBO(num_particles=2),
    "STLTrace_ELBO": STLTrace_ELBO,
    "adaptive": lambda: STLTrace_ELBO(),
    "DReG_ELBO": lambda: DReG_ELBO(3, max_plate_nesting=0),
    "wake-sleep": lambda: ReweightedWakeSleep(num_particles=2, vectorize_particles=False, insomnia=1.0),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(name):
    bad = model_with(lambda z: (z - 100).sqrt())
    error = failure(bad, normal_guide(), LOSSES[name]())
    assert (error.bad.kind, error.bad.site) == ("argument", "x"), str(error)
    if name == "wake-sleep":
        return  # its derivatives do not pass through the model
    pyro.clear_param_store()
    error = failure(model_with(root_without_slope), normal_guide(), LOSSES[name]())
    assert error.bad.kind == "gradient", str(error)


# --- what is done about it --------------------------------------------------------------


class Faulty:
    """A model whose gradient is NaN in the given steps, counted from 0."""

    def __init__(self, bad_steps, change=root_without_slope):
        self.calls, self.bad_steps, self.change = 0, set(bad_steps), change

    def __call__(self, bad):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z + (self.change(z) if bad else 0.0)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))


def state_of(svi):
    """Parameters and everything that the optimizers know, as plain numbers."""
    params = {name: p.tolist() for name, p in pyro.get_param_store().named_parameters()}
    states = copy.deepcopy(svi.optim.get_state())
    return params, str(states)


@pytest.mark.parametrize(
    "optim",
    [
        adam(),
        PyroOptim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        PyroOptim(torch.optim.RMSprop, {"lr": 0.1}),
        ClippedAdam({"lr": 0.1, "lrd": 0.9}),
        PyroOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_norm": 1.0}),
        PyroOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_value": 1.0}),
    ],
    ids=["Adam", "SGD", "RMSprop", "ClippedAdam", "clip_norm", "clip_value"],
)
def test_skipped_steps_leave_parameters_and_moments_as_they_were(optim):
    guard = GradientGuard(Trace_ELBO(), on_bad="skip")
    svi = SVI(Faulty({}), normal_guide(), optim, guard)
    for _ in range(3):
        assert math.isfinite(svi.step(False))
    before = state_of(svi)
    svi.step(True)
    assert state_of(svi) == before
    svi.step(False)
    after = state_of(svi)
    assert after != before and "nan" not in str(after)
    assert guard.num_steps == 5 and guard.num_skipped == 1
    assert [bad.step for bad in guard.bad_steps] == [4]
    assert guard.bad_steps[0].bad.kind == "gradient"


def test_skipping_is_as_if_the_step_had_not_been():
    def run(pattern):
        pyro.clear_param_store()
        svi = SVI(Faulty({}), normal_guide(), adam(), GradientGuard(Trace_ELBO(), on_bad="skip"))
        for i, bad in enumerate(pattern):
            pyro.set_rng_seed(i if not bad else 1000)
            svi.step(bad)
        return state_of(svi)

    good = run([False] * 4)
    pyro.clear_param_store()
    svi = SVI(Faulty({}), normal_guide(), adam(), GradientGuard(Trace_ELBO(), on_bad="skip"))
    steps = [(False, 0), (True, 7), (False, 1), (True, 7), (True, 8), (False, 2), (False, 3)]
    for bad, seed in steps:
        pyro.set_rng_seed(seed)
        svi.step(bad)
    assert state_of(svi) == good


def test_good_steps_are_those_of_the_plain_loss():
    def run(loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = SVI(normal_model, normal_guide(), adam(), loss)
        return [svi.step() for _ in range(5)], state_of(svi)

    assert run(Trace_ELBO()) == run(GradientGuard(Trace_ELBO())) == run(GradientGuard(Trace_ELBO(), "skip"))


def test_random_numbers_go_on_as_if_nothing_had_been_looked_for():
    def run(loss, bad):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        SVI(Faulty({}), normal_guide(), adam(), loss).step(bad)
        return torch.rand(2).tolist()

    assert run(GradientGuard(Trace_ELBO(), "skip"), True) == run(Trace_ELBO(), False)


def test_skips_errors_that_bad_numbers_cause():
    guard = GradientGuard(Trace_ELBO(), on_bad="skip")
    svi = SVI(Faulty({}, lambda z: z * math.nan), normal_guide(), adam(), guard)
    svi.step(False)
    before = state_of(svi)
    assert math.isnan(svi.step(True))
    assert state_of(svi) == before
    assert guard.bad_steps[0].bad.site == "x"


def test_matrix_that_is_not_positive_definite():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        covariance = torch.eye(2) * (z - 100)
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.zeros(2))

    error = failure(model, normal_guide())
    assert error.bad.kind == "matrix" and "PositiveDefinite" in str(error.__cause__)
    assert "at model site 'z', or after it, a matrix could not be decomposed: linalg.cholesky: " in str(error)
    assert "dist.MultivariateNormal(torch.zeros(2), covariance)" in error.bad.code


def test_too_many_in_a_row():
    guard = GradientGuard(Trace_ELBO(), on_bad="skip", max_skipped=3)
    svi = SVI(Faulty({}), normal_guide(), adam(), guard)
    for bad in [True, True, True, False, True, True, True]:
        svi.step(bad)
    assert guard.num_skipped == 6
    with pytest.raises(NonFiniteError, match="4 steps in a row are not finite, max_skipped is 3. Last, step 8: the gr"):
        svi.step(True)
    assert guard.num_skipped == 6
    assert guard.summary() == "6 of 8 steps skipped\n7 x gradient at guide site 'z'"


def test_skipping_does_not_help_a_parameter_that_is_bad():
    with pytest.raises(NonFiniteError, match="parameter 'loc' was nan before the step"):
        step(normal_model, normal_guide(math.nan), on_bad="skip")


def test_warns_once_and_goes_on():
    guard = GradientGuard(Trace_ELBO(), on_bad="warn")
    svi = SVI(Faulty({}), normal_guide(), PyroOptim(torch.optim.SGD, {"lr": 0.0}), guard)
    svi.step(False)
    with pytest.warns(UserWarning, match="step 2: the gradient of 'loc', 'scale' is not finite. First bad number: at"):
        svi.step(True)
    assert math.isnan(pyro.param("loc").item())
    with pytest.raises(NonFiniteError):  # Pyro's own error follows: there is no loss to return
        svi.step(False)


def test_infinite_loss_is_bad():
    class Infinite(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            return super().loss_and_grads(*args, **kwargs) + math.inf

    error = failure(normal_model, normal_guide(), Infinite())
    assert "step 1: the loss is not finite. First bad number: none when the step was repeated" in str(error)
    assert error.bad.kind == "unknown"


def test_other_errors_pass_through():
    def model():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="^no such file"):
        step(model, normal_guide())

    def wrong_shape():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.zeros(3), 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match="x"):
        step(wrong_shape, normal_guide(), on_bad="skip")


def test_attributes_of_the_loss_can_be_reached():
    guard = GradientGuard(STLTrace_ELBO(num_particles=3))
    SVI(normal_model, normal_guide(), adam(), guard).step()
    assert guard.num_particles == 3 and guard.report()[0].site == "z"
    with pytest.raises(AttributeError, match="no_such"):
        guard.no_such
    for twin in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        assert twin.num_particles == 3 and twin.num_steps == 1
    assert math.isfinite(guard.loss(normal_model, normal_guide()))


def test_function_as_a_loss():
    def loss(model, guide, *args):
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    guard = GradientGuard(loss, on_bad="skip")
    svi = SVI(Faulty({}), normal_guide(), adam(), guard)
    assert math.isfinite(svi.step(False))
    before = state_of(svi)
    svi.step(True)
    assert state_of(svi) == before and guard.num_skipped == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((Trace_ELBO(), "ignore"), ValueError, r"on_bad: expected one of \('raise', 'skip', 'warn'\), got 'ignore'"),
        ((Trace_ELBO(), "skip", -1), ValueError, "max_skipped: expected an integer >= 0, got -1"),
        ((Trace_ELBO,), TypeError, "loss: expected a loss such as Trace_ELBO.., got <class"),
        ((3,), TypeError, "loss: expected a loss such as Trace_ELBO.., got 3"),
    ],
)
def test_misuse(arguments, error, message):
    with pytest.raises(error, match=message):
        GradientGuard(*arguments)


def test_large_finite_gradients_are_good():
    assert are_finite([torch.full((4,), 3e38)])
    assert not are_finite([torch.ones(2), torch.tensor([1.0, math.nan])])
    assert are_finite([])
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, math.inf], (3,), check_invariants=False)
    assert not are_finite([sparse])


# --- in a loop of one's own -------------------------------------------------------------


class Model(PyroModule):
    def forward(self, bad):
        Faulty({})(bad)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))

    def forward(self, bad):
        pyro.sample("z", dist.Normal(self.loc, 1.0))


def loop(guard, pattern, watch=True):
    elbo = guard(Model(), Guide())
    optim = torch.optim.Adam(elbo.parameters(), lr=0.1)
    if watch:
        assert guard.watch(optim) is optim
    for i, bad in enumerate(pattern):
        pyro.set_rng_seed(i if not bad else 1000)
        optim.zero_grad()
        elbo(bad).backward()
        optim.step()
    return elbo.guide.loc.item(), str(optim.state_dict())


def test_loop_that_skips():
    guard = GradientGuard(Trace_ELBO(), on_bad="skip")
    assert "nan" not in loop(guard, [False, True, False, True])[1]
    assert guard.num_steps == 4 and guard.num_skipped == 2
    assert "sqrt" in guard.bad_steps[0].bad.code
    first = loop(GradientGuard(Trace_ELBO(), on_bad="skip"), [False, True])
    assert first == loop(GradientGuard(Trace_ELBO()), [False])


def test_loop_that_raises():
    with pytest.raises(NonFiniteError, match="step 3: the gradient of 'guide.loc' is not finite.*guide site 'z'"):
        loop(GradientGuard(Trace_ELBO()), [False, False, True])


def test_loop_without_a_watch():
    with pytest.raises(RuntimeError, match=r"must know the optimizer.*optim = guard.watch\(optim\)"):
        loop(GradientGuard(Trace_ELBO(), on_bad="skip"), [False], watch=False)
    with pytest.raises(NonFiniteError, match="step 3: .*parameter 'loc' was nan before the step"):
        loop(GradientGuard(Trace_ELBO()), [False, True, False], watch=False)


def test_loop_that_skips_an_error():
    guard = GradientGuard(Trace_ELBO(), on_bad="skip")
    elbo = guard(Model(), Guide())
    optim = guard.watch(torch.optim.Adam(elbo.parameters(), lr=0.1))
    elbo.model.forward = Faulty({}, lambda z: z * math.nan)
    elbo(True).backward()
    optim.step()
    assert elbo.guide.loc.item() == 0.5 and guard.num_skipped == 1
    assert guard.bad_steps[0].bad.site == "x"


def test_loop_that_warns():
    guard = GradientGuard(Trace_ELBO(), on_bad="warn")
    with pytest.warns(UserWarning, match="step 2: the gradient of 'guide.loc' is not finite"):
        loop(guard, [False, True])


@pytest.mark.parametrize("optim", [adam(), torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])])
def test_optimizers_that_cannot_be_watched(optim):
    with pytest.raises(TypeError, match="(?s)that takes no closure, got .*SVI needs no watch"):
        GradientGuard(Trace_ELBO()).watch(optim)


def test_nan_between_a_parameter_and_its_site():
    """The branch that torch.where does not take has a derivative all the same."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(torch.where(loc < 0, (-loc).sqrt(), loc), 1.0))

    svi = SVI(model, guide, pyro.optim.Adam({}), GradientGuard(Trace_ELBO()))
    with pytest.raises(NonFiniteError, match="with respect to parameter 'loc' is nan; it comes from .*torch.where"):
        svi.step()
    assert not pyro.param("loc").unconstrained()._backward_hooks


def test_nan_between_the_parameter_of_a_module_and_its_site():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.5))

        def forward(self):
            pyro.sample("z", dist.Normal(torch.where(self.loc < 0, (-self.loc).sqrt(), self.loc), 1.0))

    guide = Guide()
    guard = GradientGuard(Trace_ELBO())
    elbo = guard(model, guide)
    optim = guard.watch(torch.optim.Adam(elbo.parameters()))
    elbo().backward()
    with pytest.raises(NonFiniteError, match="with respect to parameter 'guide.loc' is nan"):
        optim.step()
    assert not guide.loc._backward_hooks


def test_loss_that_is_always_infinite():
    """That of TraceTailAdaptive_ELBO is, and its gradients are finite."""
    loss = TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
    guard = GradientGuard(loss)
    svi = SVI(normal_model, normal_guide(), adam(), loss=guard)
    assert svi.step() == math.inf
    assert (guard.num_steps, guard.num_skipped) == (1, 0)
    assert pyro.param("loc").item() != 0.5
    svi = SVI(model_with(lambda z: z * math.nan), normal_guide(), adam(), loss=guard)
    with pytest.raises(NonFiniteError, match="step 2"):
        svi.step()


def test_average_of_a_baseline_is_put_back():
    """TraceGraph_ELBO writes it before its gradient is looked at."""
    bad = [False]

    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.factor("x", torch.tensor(math.nan) if bad[0] else -k)

    def guide():
        probs = pyro.param("probs", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(probs), infer={"baseline": {"use_decaying_avg_baseline": True}})

    guard = GradientGuard(TraceGraph_ELBO(), on_bad="skip")
    svi = SVI(model, guide, adam(), guard)
    with pyro.validation_enabled(False):
        for bad[0] in (False, False, True, False):
            svi.step()
    assert guard.num_skipped == 1 and guard.bad_steps[0].bad.kind != "parameter"
    assert all(p.isfinite().all() for p in pyro.get_param_store().values())
