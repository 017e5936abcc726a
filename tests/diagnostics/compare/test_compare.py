# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import functools
import json
import math
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_rb.diagnostics import (
    ComparisonInterrupted,
    compare,
    gradient_moments,
    sample_gradients,
)
from pyro_rb.diagnostics.compare import measure
from pyro_rb.diagnostics.compare.along_training import MOST_STEPS, Study
from pyro_rb.diagnostics.run.messages import one_line
from pyro_rb.diagnostics.run.sampler import GradientSampler
from pyro_rb.diagnostics.stats import coordinates
from pyro_rb.diagnostics.stats.mean_test import z_threshold
from pyro_rb.infer import STLTrace_ELBO
from tests.support.models import conj

pytestmark = pytest.mark.slow

# Without training and compilation, which take their time.
usual_compare, compare = compare, functools.partial(compare, train_steps=0, steps=0)

QUICK = dict(num_samples=40, num_burn_in=5, progress=False)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


X = torch.tensor([0.5, -1.2, 2.0])


def rows(result, state=0):
    return {row.name: row for row in result.states[state].losses}


def test_default_losses():
    result = compare(model, AutoNormal(model), args=(X,), **QUICK)
    found = rows(result)
    assert "RaoBlackwellTopK_ELBO:budget=4" in result.left_out
    assert list(found) == [
        "Trace_ELBO",
        "TraceMeanField_ELBO",
        "STLTrace_ELBO",
        "STLTrace_ELBO:1.0",
        "RaoBlackwell_ELBO",
        "Trace_ELBO:num_particles=10,vectorize_particles=True",
        "STLTrace_ELBO:num_particles=10,vectorize_particles=True",
    ]
    assert not any(row.error for row in found.values())
    assert [state.step for state in result.states] == [0]
    # A narrow guide: the whole score removed is the worse by far, what is learned is not.
    assert found["STLTrace_ELBO:1.0"].variance_ratio > 10
    assert found["STLTrace_ELBO"].variance_ratio < 3


def test_losses_far_behind_are_measured_no_further():
    options = dict(args=(X,), num_samples=100, num_burn_in=5, progress=False)
    result = compare(model, AutoNormal(model), **options)
    found = rows(result)
    dropped = found["STLTrace_ELBO:1.0"]
    assert 60 <= dropped.num_samples < 100
    assert found["Trace_ELBO"].num_samples == result.states[0].num_samples == 100  # the reference never is
    assert dropped.variance_ratio > 10 and dropped.variance_ratio_error and dropped.bias_threshold
    line = next(line for line in str(result).splitlines() if line.startswith("STLTrace_ELBO:1.0"))
    assert line.split()[1] == str(dropped.num_samples) and "up to 100 gradients" in str(result)
    # One that was named is.
    named = compare(model, AutoNormal(model), ["STLTrace_ELBO:1.0", "STLTrace_ELBO"], **options)
    assert {row.num_samples for row in named.states[0].losses} == {100} and "draws  " not in named.table()


class NoGradient(Trace_ELBO):
    """At once and without noise: far ahead of all, and out of the running."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        return 0.0


def test_biased_loss_puts_none_behind(monkeypatch):
    made = Study.made
    monkeypatch.setattr(Study, "made", lambda self: {**made(self), "none": NoGradient()})
    result = compare(model, AutoNormal(model), args=(X,), num_samples=100, num_burn_in=5, progress=False)
    found = rows(result)
    assert found["none"].biased and found["none"].cost_ratio == 0
    best = min((row for row in found.values() if not row.biased), key=lambda row: row.cost_ratio)
    assert not best.reference and best.num_samples == 100
    assert found["STLTrace_ELBO:1.0"].num_samples < 100


def test_reference_row():
    reference = rows(compare(model, AutoNormal(model), "STLTrace_ELBO", args=(X,), **QUICK))["Trace_ELBO"]
    assert reference.reference
    assert reference.variance_ratio == reference.time_ratio == reference.cost_ratio == 1.0
    assert reference.bias_z is None and reference.biased is None
    assert reference.seconds > 0 and reference.variance > 0
    assert sum(reference.variance_shares.values()) == pytest.approx(1.0)
    assert list(reference.variance_shares) == ["AutoNormal.locs.z", "AutoNormal.scales.z"]


def test_figures_agree_with_separate_measurements():
    case, half = conj(), STLTrace_ELBO(control_variate_scale=0.5)
    result = compare(
        case.model, case.guide, {"half": half}, args=case.args, num_samples=200, progress=False
    )
    found = rows(result)
    total = {}
    for name, loss in [("Trace_ELBO", Trace_ELBO()), ("half", half)]:
        moments = gradient_moments(loss, case.model, case.guide, case.args, num_samples=200, seed=0)
        total[name] = sum(m.variance.sum().item() for m in moments.values())
        assert found[name].variance == pytest.approx(total[name])
    expected = total["half"] / total["Trace_ELBO"]
    row = found["half"]
    # Means of blocks with their own mean, and one mean over all: equal within the error.
    assert row.variance_ratio == pytest.approx(expected, abs=row.variance_ratio_error)
    assert row.cost_ratio == pytest.approx(row.variance_ratio * row.time_ratio)
    assert not row.biased


def test_error_of_the_variance_ratio_is_that_of_repetition():
    ratios, errors = [], []
    case = conj()
    for seed in range(12):
        row = rows(compare(
            case.model, case.guide, "STLTrace_ELBO", args=case.args, seed=seed, **QUICK
        ))["STLTrace_ELBO"]
        ratios.append(row.variance_ratio)
        errors.append(row.variance_ratio_error)
    spread = torch.tensor(ratios).std().item()
    assert 0.5 < sum(errors) / 12 / spread < 2


class Shift:
    """Adds a constant to one coordinate of a gradient."""

    size = 1.0

    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        pyro.param("AutoNormal.locs.z").unconstrained().grad[1] += self.size
        return loss


class Shifted(Shift, Trace_ELBO):
    pass


class ShiftedSTL(Shift, STLTrace_ELBO):
    pass


def test_bias_is_found_and_named():
    result = compare(model, AutoNormal(model), {"shifted": Shifted()}, args=(X,), **QUICK)
    row = rows(result)["shifted"]
    assert row.biased and row.bias_z > row.bias_threshold
    assert row.bias_at == "AutoNormal.locs.z[1]"
    rms = math.sqrt(sum(
        m.rms.square().sum().item()
        for m in gradient_moments(Trace_ELBO(), model, AutoNormal(model), (X,), num_samples=40, seed=0).values()
    ))
    assert row.bias_size == pytest.approx(1.0 / rms, rel=1e-3)
    assert "shifted is biased, or has another objective" in str(result)
    assert "AutoNormal.locs.z[1]" in str(result)


def test_few_draws_of_many_coordinates():
    """The scores of scales are squares of normal variables; 12 of 20000 of them are often alike."""

    def wide(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([20000]).to_event(1))
        pyro.sample("x", dist.Normal(z[0], 1.0), obs=x.sum())

    def compared(losses):
        result = compare(wide, AutoNormal(wide), losses, args=(X,), num_samples=12, num_burn_in=0, progress=False)
        return result.states[0].losses[1]

    row = compared("STLTrace_ELBO:1.0")
    assert not row.biased and row.bias_z < row.bias_threshold
    assert row.bias_z > z_threshold(1e-3, 40000, 12)  # which alone would call it biased
    assert compared({"shifted": Shifted()}).biased


def test_detectable_bias_is_detected():
    arguments = dict(args=(X,), num_samples=100, num_burn_in=0, progress=False)
    noisy = compare(model, AutoNormal(model), "STLTrace_ELBO:1.0", **arguments)
    row = rows(noisy)["STLTrace_ELBO:1.0"]
    assert row.detectable_bias > 0.1

    reference = gradient_moments(Trace_ELBO(), model, AutoNormal(model), (X,), num_samples=100, seed=0)
    rms = math.sqrt(sum(m.rms.square().sum().item() for m in reference.values()))
    loss = ShiftedSTL(control_variate_scale=1.0)
    # What is detected with probability .95 or more, and half as much again.
    loss.size = 1.5 * row.detectable_bias * rms
    assert rows(compare(model, AutoNormal(model), {"s": loss}, **arguments))["s"].biased


def test_mean_field_elbo_on_a_constrained_latent_is_biased_and_explained():
    def constrained():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.3))

    result = compare(constrained, AutoNormal(constrained), "TraceMeanField_ELBO", **QUICK)
    assert rows(result)["TraceMeanField_ELBO"].biased
    assert result.notes == [
        "TraceMeanField_ELBO is biased on this guide: Pyro's KL divergence of a Delta leaves "
        "out its log_density, here the Jacobian of 'scale'."
    ]
    # The Jacobian of exp at u is exp(u): the derivative of its log is missing, exactly 1.
    both = [
        sample_gradients(loss, constrained, AutoNormal(constrained), num_samples=5, seed=0)
        for loss in (TraceMeanField_ELBO(), Trace_ELBO())
    ]
    name = "AutoNormal.locs.scale"
    torch.testing.assert_close(both[0][name] - both[1][name], torch.ones(5))
    # Without a constraint there is no Jacobian.
    fine = compare(model, AutoNormal(model), "TraceMeanField_ELBO", args=(X,), **QUICK)
    assert not rows(fine)["TraceMeanField_ELBO"].biased and fine.notes == []


def test_other_objective_is_called_biased():
    case = conj(shift=1.0)
    loss = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    result = compare(case.model, case.guide, {"renyi": loss}, args=case.args, num_samples=150, progress=False)
    assert rows(result)["renyi"].biased


def test_loss_that_cannot_run_gets_a_row():
    def discrete():
        pyro.sample("b", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    result = compare(discrete, guide, ["TraceMeanField_ELBO", "STLTrace_ELBO"], **QUICK)
    failed = rows(result)["TraceMeanField_ELBO"]
    assert failed.error.startswith("NotImplementedError: ")
    assert failed.variance is None and failed.cost_ratio is None
    assert not rows(result)["STLTrace_ELBO"].error
    assert "not measured" in str(result)
    assert "TraceMeanField_ELBO could not be measured: NotImplementedError: " in " ".join(str(result).split())
    json.dumps(result.to_dict(), allow_nan=False)


class FailsLater(Trace_ELBO):
    calls = 0

    def loss_and_grads(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 12:
            raise RuntimeError("the twelfth\n  call")
        return super().loss_and_grads(*args, **kwargs)


def test_loss_that_fails_in_the_middle_does_not_spoil_the_others():
    alone = compare(model, AutoNormal(model), "STLTrace_ELBO", args=(X,), **QUICK)
    result = compare(
        model, AutoNormal(model), {"fails": FailsLater(), "stl": STLTrace_ELBO()}, args=(X,), **QUICK
    )
    assert rows(result)["fails"].error == "RuntimeError: the twelfth call"
    assert rows(result)["stl"].variance == rows(alone)["STLTrace_ELBO"].variance


class NotFinite(Trace_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        pyro.param("AutoNormal.scales.z").unconstrained().grad.fill_(math.nan)
        return loss


def test_gradient_that_is_not_finite():
    result = compare(model, AutoNormal(model), {"nan": NotFinite()}, args=(X,), **QUICK)
    assert rows(result)["nan"].error == "ValueError: the gradient of 'AutoNormal.scales.z' is not finite"


def test_reference_that_cannot_run():
    def pole(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", (z - z.detach()).abs().sqrt())  # 0, with an infinite slope

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    message = "Trace_ELBO, to which all losses are compared, failed on this model.*'loc' is not finite"
    with pytest.raises(ValueError, match=message):
        compare(pole, guide, args=(X,), **QUICK)


def test_warnings_are_shown_once():
    def swapped(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide(x):
        b = pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), 1.0))
        pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.0)) + b, 1.0))

    result = compare(swapped, guide, "TraceMeanField_ELBO", args=(X,), **QUICK)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("TraceMeanField_ELBO: Failed to verify mean field restriction")
    assert str(result).count("Failed to verify") == 1


@pytest.mark.parametrize(
    "train_steps, expected", [(0, [0]), (1, [0, 1]), (6, [0, 3, 6]), ((0, 5), [0, 5]), ([4], [4])]
)
def test_states(train_steps, expected):
    result = compare(
        model, AutoNormal(model), "STLTrace_ELBO", args=(X,), train_steps=train_steps, num_samples=4,
        num_burn_in=0, progress=False,
    )
    assert [state.step for state in result.states] == expected


def test_training_is_that_of_svi():
    """Measured after n steps = measured on parameters that SVI has trained for n steps."""
    steps, optim = 40, {"lr": 0.05}
    result = compare(
        model, AutoNormal(model), "STLTrace_ELBO", args=(X,), train_steps=(0, steps),
        optim=pyro.optim.Adam(optim), **QUICK
    )
    assert result.states[1].losses[0].loss < result.states[0].losses[0].loss - 1
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    guide(X)
    pyro.set_rng_seed(0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam(optim), Trace_ELBO())
    for _ in range(steps):
        svi.step(X)
    moments = gradient_moments(Trace_ELBO(), model, guide, (X,), num_samples=40, seed=steps)
    total = sum(m.variance.sum().item() for m in moments.values())
    # The initial values differ by the random numbers that the first run draws, so roughly.
    assert result.states[1].losses[0].variance == pytest.approx(total, rel=0.5)


def test_user_optimizer_is_copied():
    optim = pyro.optim.Adam({"lr": 0.01})
    compare(model, AutoNormal(model), [], args=(X,), train_steps=2, optim=optim, **QUICK)
    assert not optim.optim_objs
    with pytest.raises(TypeError, match="optim: expected a pyro.optim.PyroOptim"):
        compare(model, AutoNormal(model), args=(X,), optim=torch.optim.Adam)


def test_training_that_fails():
    with pytest.raises(ValueError, match="training with Trace_ELBO failed at step [0-9]+: "):
        compare(
            model, AutoNormal(model), [], args=(X,), train_steps=(60,),
            optim=pyro.optim.SGD({"lr": 1e30}), **QUICK
        )
    assert not pyro.get_param_store()


def test_user_losses_are_copied():
    loss = FailsLater()
    compare(model, AutoNormal(model), {"mine": loss}, args=(X,), num_samples=3, num_burn_in=0, progress=False)
    assert loss.calls == 0


def test_plain_modules():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                shift = self.norm(torch.stack([x, -x]))[0]
                pyro.sample("z", dist.Normal(self.loc + shift, 1.0))

    guide = Guide()
    mean = guide.norm.running_mean.clone()
    result = compare(model, guide, "STLTrace_ELBO", args=(X,), train_steps=4, **QUICK)
    assert list(result.parameters) == ["loc", "norm.weight", "norm.bias"]
    assert not rows(result)["STLTrace_ELBO"].error
    # Trained in between, and put back.
    assert result.states[0].losses[0].loss != result.states[2].losses[0].loss
    assert torch.equal(guide.loc, torch.zeros(3))
    assert torch.equal(guide.norm.running_mean, mean)


def test_world_is_left_as_found():
    guide = AutoNormal(model)
    guide(X)
    pyro.param("other", torch.tensor(1.0))
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    compare(model, guide, "STLTrace_ELBO:1.0", args=(X,), train_steps=3, **QUICK)
    after = dict(pyro.get_param_store().items())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_seed():
    losses = ["TraceMeanField_ELBO", "STLTrace_ELBO", "RaoBlackwell_ELBO"]
    first, again, other = (compare(model, AutoNormal(model), losses, args=(X,), seed=s, **QUICK) for s in (1, 1, 2))
    for one, two, three in zip(*(r.states[0].losses for r in (first, again, other))):
        assert one.variance == two.variance != three.variance
        assert one.bias_z == two.bias_z


def test_kwargs_and_other_guides():
    def shifted(x, by=0.0):
        model(x + by)

    guide = AutoMultivariateNormal(shifted)
    result = compare(shifted, guide, "STLTrace_ELBO", args=(X,), kwargs={"by": 1.0}, title="mine", **QUICK)
    assert result.title == "mine"
    plain = compare(shifted, guide, "STLTrace_ELBO", args=(X,), **QUICK)
    assert plain.title == "shifted with guide AutoMultivariateNormal"
    assert plain.states[0].losses[0].loss != result.states[0].losses[0].loss


def test_sites_must_match():
    def guide(x):
        pyro.sample("zz", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises(
        ValueError,
        match="model and guide do not match: the model's latent site 'z' is not sampled by the "
        "guide; the guide's site 'zz' is not in the model",
    ):
        compare(model, guide, args=(X,), **QUICK)
    assert not pyro.get_param_store()


def test_auxiliary_and_enumerated_sites_match():
    def mixture():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.Delta(loc + noise))

    result = compare(mixture, guide, "STLTrace_ELBO", **QUICK)
    assert rows(result)["STLTrace_ELBO"].variance_ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 1}, "expected num_samples >= 2"),
        ({"num_burn_in": -1}, "num_burn_in >= 0"),
        ({"train_steps": -1}, "train_steps: expected an integer >= 0 or a list of such, got -1"),
        ({"train_steps": []}, "train_steps: expected"),
        ({"train_steps": [1.5]}, "train_steps: expected"),
        ({"losses": "nonsense"}, "no loss 'nonsense'"),
        ({"train_steps": 10.0}, "train_steps: expected an integer"),
        ({"failure_rate": 2.0}, "failure_rate must lie between 0 and 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(model, AutoNormal(model), args=(X,), progress=False, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 10.5}, "num_samples: expected an integer, got 10.5"),
        ({"args": X}, r"args: expected a tuple.*such as \(data,\), got Tensor"),
        ({"losses": TraceMeanField_ELBO}, r"; write TraceMeanField_ELBO\(\)"),
        ({"reference": TraceMeanField_ELBO()}, "reference: expected the name of a loss"),
        ({"guide": AutoNormal}, r"guide: AutoNormal is a class.*AutoNormal\(model\)"),
        ({"model": 3}, "model: expected something callable, got 3"),
    ],
)
def test_arguments_of_another_type(arguments, message):
    given = {"model": model, "guide": AutoNormal(model), "args": (X,), "progress": False, **arguments}
    with pytest.raises(TypeError, match=message):
        compare(**given)


def test_losses_that_are_not_finite_now_and_then():
    def rarely_nan(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = torch.where(torch.rand(()) < 0.2, torch.tensor(math.nan), z)
        pyro.sample("x", dist.Normal(bad, 1.0, validate_args=False), obs=x.sum())

    guide = AutoNormal(rarely_nan)
    result = compare(rarely_nan, guide, "STLTrace_ELBO", args=(X,), **{**QUICK, "num_samples": 60})
    rows = result.states[0].losses
    assert 5 < rows[0].bad_losses == rows[1].bad_losses < 25 and math.isfinite(rows[0].loss)
    assert f"the loss was not finite {rows[0].bad_losses} times with Trace_ELBO" in " ".join(str(result).split())
    # The same warning of several losses is one note.
    assert "Trace_ELBO, STLTrace_ELBO: Encountered NaN: loss" in result.notes


def test_bad_number_of_the_reference_is_named():
    def root(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal((z - 9.0).sqrt(), 1.0, validate_args=False), obs=x.sum())

    with pytest.raises(ValueError, match="at model site 'x', argument 'loc' of Normal is nan.*on_bad='skip'"):
        compare(root, AutoNormal(root), args=(X,), **QUICK)


def test_no_parameters():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        compare(model, guide, args=(X,), **QUICK)


def test_order_is_rotated():
    calls = []

    class Logging(TraceMeanField_ELBO):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def loss_and_grads(self, *args, **kwargs):
            calls.append(self.name)
            return super().loss_and_grads(*args, **kwargs)

    losses = {"a": Logging("a"), "b": Logging("b")}
    compare(model, AutoNormal(model), losses, args=(X,), num_samples=3, num_burn_in=0, progress=False)
    # The reference takes its turn too. Then comes a step of each for the memory.
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]


def test_one_line():
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(one_line(ValueError("x" * 1000))) < 330
    assert one_line(UserWarning("a\nb")) == "a b"
    shapes = "no\n Trace Shapes:\n  Param Sites:\nSample Sites:\n z dist |"
    assert one_line(ValueError(shapes)) == "ValueError: no"
    hint = "The values of the guide sites ['z'] have"
    assert one_line(ValueError(f"{shapes}\n{hint}")) == f"ValueError: no {hint}"


def test_reference_of_the_same_objective():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.9))

    result = compare(
        model,
        guide,
        ["DReG_ELBO:num_particles=4", "Trace_ELBO"],
        num_samples=60,
        num_burn_in=5,
        train_steps=[1],
        progress=False,
        reference="RenyiELBO:alpha=0,num_particles=4",
    )
    names = ["RenyiELBO:alpha=0,num_particles=4", "DReG_ELBO:num_particles=4", "Trace_ELBO"]
    rows = result.states[0].losses
    assert [row.name for row in rows] == names
    assert rows[0].reference and not rows[1].biased
    assert rows[2].biased  # another objective
    assert f"trained with {names[0]}" in str(result)


def test_unknown_reference():
    with pytest.raises(ValueError, match="no loss 'Trace_ELB': did you mean"):
        compare(lambda: None, lambda: None, reference="Trace_ELB")


def test_num_samples_is_kept():
    result = compare(model, AutoNormal(model), "STLTrace_ELBO", args=(X,), **QUICK)
    assert result.states[0].num_samples == 40 and result.states[0].stopped == "num_samples"


def test_samples_until_the_error_is_small():
    arguments = dict(args=(X,), num_samples=20, num_burn_in=5, progress=False)
    result = compare(model, AutoNormal(model), "STLTrace_ELBO:0.1", rel_error=0.03, **arguments)
    (state,) = result.states
    assert state.stopped == "rel_error" and state.num_samples > 20
    row = rows(result)["STLTrace_ELBO:0.1"]
    assert row.variance_ratio_error <= 0.03 * row.variance_ratio
    assert result.settings["rel_error"] == 0.03
    assert "as exact as asked for after" in str(result)
    # The same draws as with that number from the start: time does not decide.
    again = compare(model, AutoNormal(model), "STLTrace_ELBO:0.1", rel_error=0.03, **arguments)
    assert again.states[0].num_samples == state.num_samples
    assert rows(again)["STLTrace_ELBO:0.1"].variance == row.variance
    loose = compare(model, AutoNormal(model), "STLTrace_ELBO:0.1", rel_error=10.0, **arguments)
    assert loose.states[0].num_samples == 20


def test_an_exact_loss_needs_no_more_draws():
    """A variance of zero has no relative error."""
    case = conj(shift=0.0, width=1.0)
    result = compare(
        case.model, case.guide, "STLTrace_ELBO", args=case.args, rel_error=0.1, num_samples=20, progress=False
    )
    assert result.states[0].num_samples == 20
    assert rows(result)["STLTrace_ELBO"].variance_ratio < 1e-6


def test_samples_until_the_time_is_over():
    result = compare(
        model, AutoNormal(model), "STLTrace_ELBO", args=(X,), max_seconds=0.5, num_samples=10**6, train_steps=2,
        progress=False,
    )
    assert [state.stopped for state in result.states] == ["max_seconds"] * 3
    assert all(2 <= state.num_samples < 10**4 for state in result.states)
    assert "time over after" in str(result)


def test_time_that_is_over_before_it_begins():
    result = compare(
        model, AutoNormal(model), "STLTrace_ELBO", args=(X,), max_seconds=1e-9, rel_error=0.01, progress=False
    )
    assert result.states[0].num_samples == 2
    assert result.recommendation.loss is None
    str(result), result.to_html(), json.dumps(result.to_dict(), allow_nan=False)


class Interrupted(Trace_ELBO):
    """The user presses Ctrl-C at a call."""

    calls, at = 0, 25

    def loss_and_grads(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().loss_and_grads(*args, **kwargs)


def test_interrupt_leaves_what_was_measured():
    store = dict(pyro.get_param_store())
    with pytest.raises(KeyboardInterrupt) as caught:
        compare(model, AutoNormal(model), {"slow": Interrupted()}, args=(X,), train_steps=4, **QUICK)
    assert isinstance(caught.value, ComparisonInterrupted)
    partial = caught.value.partial
    assert partial.interrupted and dict(pyro.get_param_store()) == store
    (state,) = partial.states
    assert state.step == 0 and state.stopped == "interrupted"
    assert state.num_samples == 25 - 1 - 5  # without the burn-in
    found = rows(partial)
    # All were measured on the same draws: as if so many had been asked for.
    alone = compare(
        model, AutoNormal(model), {"slow": "Trace_ELBO:num_particles=1"}, args=(X,), num_samples=40, num_burn_in=5,
        progress=False,
    )
    assert found["slow"].variance_ratio == pytest.approx(rows(alone)["slow"].variance_ratio)
    assert "interrupted after 19 gradients" in str(partial)
    assert json.loads(json.dumps(partial.to_dict(), allow_nan=False))["interrupted"] is True


@pytest.mark.parametrize("at", [3, 6])
def test_interrupt_before_anything_was_measured(at):
    class Early(Interrupted):
        pass

    Early.at = at
    with pytest.raises(ComparisonInterrupted) as caught:
        compare(model, AutoNormal(model), {"slow": Early()}, args=(X,), **QUICK)
    assert caught.value.partial is None


def test_interrupt_in_training_keeps_earlier_states(monkeypatch):
    calls = []

    def train(self, optim):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(self, optim)

    usual = GradientSampler.train
    monkeypatch.setattr(GradientSampler, "train", train)
    with pytest.raises(ComparisonInterrupted) as caught:
        compare(model, AutoNormal(model), "STLTrace_ELBO", args=(X,), train_steps=[0, 9], **QUICK)
    partial = caught.value.partial
    assert [state.stopped for state in partial.states] == ["num_samples"]
    assert len(partial.training) == 2


def test_signal_while_draws_are_added_up():
    """Ctrl-C must not leave one loss with a draw more than another."""
    done = []
    # A shell starts background jobs with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with measure._no_interrupt():
                signal.raise_signal(signal.SIGINT)
                done.append(True)
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_follows_a_short_training_by_default():
    result = usual_compare(model, AutoNormal(model, init_scale=0.5), "STLTrace_ELBO", args=(X,), **QUICK)
    before, after = result.states
    assert before.step == 0 < after.step <= MOST_STEPS and after.losses[0].loss < before.losses[0].loss
    assert result.notes[0].startswith(f"Trained for {after.step} steps, until the loss fell no more")
    assert result.recommendation.loss is not None
    assert compare(model, AutoNormal(model), "STLTrace_ELBO", args=(X,), **QUICK).recommendation.loss is None


@pytest.mark.parametrize("when", ["training", "reference", "batch"])
def test_an_error_leaves_what_was_measured(when):
    """In training, in a draw of the reference, or in the function that draws minibatches."""
    calls, fail = [], {"training": 130, "reference": 60, "batch": 10**9}[when]

    def args():
        if when == "batch" and len(calls) > 80:
            raise StopIteration("no more data")
        return (X,)

    def breaks(x):
        calls.append(1)
        if len(calls) > fail:
            raise RuntimeError("cholesky: the input is not positive-definite")
        model(x)

    store = dict(pyro.get_param_store())
    result = compare(breaks, AutoNormal(breaks), "STLTrace_ELBO", args=args, **{**QUICK, "train_steps": [0, 90]})
    assert [state.step for state in result.states] == [0] and rows(result)["STLTrace_ELBO"].variance > 0
    assert ("no more data" if when == "batch" else "cholesky") in result.error
    assert result.error in " ".join(str(result).split()) and dict(pyro.get_param_store()) == store
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["error"] == result.error


@pytest.mark.parametrize("masked", ["all", "some"])
def test_latents_on_which_nothing_depends_do_not_count(masked):
    mask = torch.tensor([True, masked == "all", True])

    def observed():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=X, obs_mask=mask)

    result = compare(observed, AutoNormal(observed), ["STLTrace_ELBO"], **QUICK)
    count = 6 if masked == "all" else 4
    assert result.notes == [
        f"{count} of 8 parameter values are left out: at the present parameters the model does not depend on them."
    ]
    assert math.isfinite(rows(result)["STLTrace_ELBO"].variance_ratio)


def test_options_of_the_reference_are_handed_on():
    shared = torch.tensor(1.0, requires_grad=True).exp().cos()  # a graph that must be retained

    def keeps():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shared, 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(keeps)
    result = compare(keeps, guide, reference="Trace_ELBO:retain_graph=True", **QUICK)
    assert not rows(result)["STLTrace_ELBO:retain_graph=True"].error


def test_large_gradients_are_followed_on_a_subset(monkeypatch):
    monkeypatch.setattr(coordinates, "MOST", 200)

    def wide(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3000]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3000))

    all_of_them, some = [], []
    for found, most in ((all_of_them, 10**6), (some, 200)):
        monkeypatch.setattr(coordinates, "MOST", most)
        pyro.clear_param_store()
        result = compare(wide, AutoNormal(wide), "STLTrace_ELBO", args=(X,), **QUICK)
        found += [row.variance for row in result.states[0].losses]
    assert some == pytest.approx(all_of_them, rel=0.3)
    assert result.notes[0].startswith("Measured on ") and "drawn at random" in result.notes[0]


def test_training_curve():
    result = compare(
        model, AutoNormal(model), "STLTrace_ELBO", args=(X,), train_steps=120, num_samples=2, num_burn_in=0,
        progress=False,
    )
    windows = result.training
    assert sum(window.num_steps for window in windows) == 120 and windows[-1].step == 120
    assert len(windows) <= 50
    assert windows[0].mean > windows[-1].mean
    assert windows[0].deviation > 0
    assert compare(model, AutoNormal(model), [], args=(X,), **QUICK).training == []


def test_noise_of_the_loss_and_share_of_noise():
    case = conj()
    result = compare(case.model, case.guide, "STLTrace_ELBO", args=case.args, num_samples=400, progress=False)
    (state,) = result.states
    reference = state.losses[0]
    assert reference.loss_deviation == pytest.approx(reference.loss_error * 20)
    noise, share = reference.variance, 0.0
    for name, gradient in case.exact_gradient().items():
        part = reference.variance_shares[name] * noise
        share += part / (part + gradient.square().sum().item()) / 2
    assert state.noise_share == pytest.approx(share, abs=0.1)


def test_recommendation_is_in_all_forms():
    case = conj()
    arguments = dict(args=case.args, train_steps=[1], num_samples=60, num_burn_in=30, progress=False)
    losses = ["STLTrace_ELBO", "STLTrace_ELBO:1.0", "TraceGraph_ELBO"]
    result = compare(case.model, case.guide, losses, **arguments)
    best = result.recommendation
    assert best.loss in ("STLTrace_ELBO", "STLTrace_ELBO:1.0")
    assert best.sentence.split()[1] in str(result)
    assert result.to_dict()["recommendation"]["loss"] == best.loss
    assert best.sentence in result.to_html()
    assert result.to_dict()["left_out"].keys() == result.left_out.keys()


@pytest.mark.parametrize("name", ["rel_error", "max_seconds"])
def test_bounds_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}: expected a number > 0, got 0"):
        compare(model, AutoNormal(model), args=(X,), progress=False, **{name: 0})
