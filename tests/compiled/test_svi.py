# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""CompiledSVI makes the steps that SVI makes, with the update of the optimizer in the graph."""

from contextlib import nullcontext
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from pyro.optim.clipped_adam import ClippedAdam
from torch.optim import Adam

import pyro_rb
from pyro_rb import CompiledSVI, RaoBlackwellTopK_ELBO, STLTrace_ELBO
from pyro_rb.compiled.fused import FusedSteps
from pyro_rb.compiled.replay import as_function
from tests.compiled import models

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.03, "betas": (0.8, 0.99)}),
    "decay": lambda: pyro.optim.Adam({"lr": 0.03, "weight_decay": 0.1}),
    "adamw": lambda: pyro.optim.AdamW({"lr": 0.03, "weight_decay": 0.1}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "clip_norm": 0.5, "lrd": 0.98}),
    "centered": lambda: pyro.optim.ClippedAdam(
        {"lr": 0.03, "centered_variance": True, "weight_decay": 0.01}
    ),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "scale" in name else 0.01}),
    "schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": Adam, "optim_args": {"lr": 0.03}, "gamma": 0.5}
    ),
    **{
        f"cycle of {kind.__name__}": lambda kind=kind: pyro.optim.OneCycleLR(
            {"optimizer": kind, "optim_args": {"lr": 0.03}, "max_lr": 0.1, "total_steps": 200}
        )
        for kind in (Adam, ClippedAdam)
    },
}


@pytest.fixture(autouse=True)
def dtype():
    torch.set_default_dtype(torch.float64)


def replayed(loss=None):
    return pyro_rb.compile(loss or Trace_ELBO(), "replay")


def parameters():
    return {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}


def make(kind, optim, loss, case=models.conjugate, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = case()
    svi = kind(model, guide, optim, loss, **options)
    return svi, [x.double() for x in args(0)]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_svi(name):
    def run(kind, loss):
        optim = OPTIMIZERS[name]()
        svi, args = make(kind, optim, loss)
        losses = []
        for i in range(100):
            losses.append(svi.step(*args))
            if "cycle" in name or name == "schedule" and i % 30 == 29:
                optim.step()
        state = optim.get_state()
        return losses, parameters(), state, svi

    expected, actual = run(SVI, Trace_ELBO()), run(CompiledSVI, replayed())
    assert_close(actual[:2], expected[:2])
    assert_close(strip(actual[2]), strip(expected[2]))
    ((_, steps),) = actual[3]._steps.items()
    assert steps.ready[1].since < 10 and not actual[3]._why_loop


def strip(state):
    """Without what does not compare: parameter groups hold options."""
    states = [s.get("optimizer", s) for s in state.values()]
    return [
        (
            {k: float(v) if k == "step" else v for k, v in s["state"][0].items()},
            [s["param_groups"][0][k] for k in ("lr", "betas")],
        )
        for s in states
    ]


@pytest.mark.parametrize("make_loss", [STLTrace_ELBO, RaoBlackwellTopK_ELBO, lambda: Trace_ELBO(2)])
def test_losses(make_loss):
    case = models.mixture if make_loss is RaoBlackwellTopK_ELBO else models.conjugate

    def run(kind, loss):
        svi, args = make(kind, pyro.optim.Adam({"lr": 0.02}), loss, case)
        return [svi.step(*args) for _ in range(70)], parameters()

    assert_close(run(CompiledSVI, replayed(make_loss())), run(SVI, make_loss()))


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("name", ["adam", "clipped"])
def test_run(unroll, name):
    svi, args = make(SVI, OPTIMIZERS[name](), STLTrace_ELBO())
    expected = torch.tensor([svi.step(*args) for _ in range(97)]), parameters()
    svi, args = make(CompiledSVI, OPTIMIZERS[name](), replayed(STLTrace_ELBO()), unroll=unroll)
    losses = svi.run(97, *args, progress_bar=False)
    assert_close((losses, parameters()), expected)
    assert {n for steps in svi._steps.values() for n in steps.ready} == {1, unroll}


@pytest.mark.parametrize(
    "make_loss", [Trace_ELBO, lambda: STLTrace_ELBO(control_variate_scale=1.0), RaoBlackwellTopK_ELBO]
)
def test_parameters_on_another_device_than_new_tensors(make_loss):
    """Nothing is made on PyTorch's default device, which has no numbers here."""
    x, zero, one = (torch.tensor(x, device="cpu") for x in ([0.5, -1.2], [0.0, 0.0], [1.0, 1.0]))

    def model():
        z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
        pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)

    def guide():
        scale = pyro.param("scale", one.clone, constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(pyro.param("loc", zero.clone), scale).to_event(1))

    def run(kind, loss, device):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with torch.device(device):
            svi = kind(model, guide, OPTIMIZERS["clipped"](), loss)
            losses = [svi.step() for _ in range(9)]
        return losses, parameters(), svi

    *expected, _ = run(SVI, make_loss(), "cpu")
    *actual, svi = run(CompiledSVI, replayed(make_loss()), "meta")
    assert_close(actual, expected)
    assert [list(steps.ready) for steps in svi._steps.values()] == [[1]]


def test_checkpoint(tmp_path):
    """What follows after loading is what followed before, bit by bit."""
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed())
    svi.run(30, *args, progress_bar=False)
    svi.optim.save(tmp_path / "optim")
    pyro.get_param_store().save(tmp_path / "store")
    random = torch.get_rng_state()
    # The first steps of the other are eager, and round otherwise.
    expected = svi.run(20, *args, progress_bar=False)

    pyro.clear_param_store()
    model, guide, _ = models.conjugate()
    other = CompiledSVI(model, guide, OPTIMIZERS["adam"](), replayed())
    pyro.get_param_store().load(tmp_path / "store")
    other.optim.load(tmp_path / "optim")
    torch.set_rng_state(random)
    assert_close(other.run(20, *args, progress_bar=False), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_counts_are_set_back(in_place):
    """The numbers of steps share memory, and can be set one by one."""

    def run(kind, loss):
        optim = OPTIMIZERS["adam"]()
        svi, args = make(kind, optim, loss)
        losses = [svi.step(*args) for _ in range(30)]
        *_, (p, one) = optim.optim_objs.items()
        if in_place:
            one.state[p]["step"].zero_()
        else:
            one.state[p]["step"] = torch.tensor(0.0)
        losses += [svi.step(*args) for _ in range(10)]
        return losses, parameters(), [float(o.state[p]["step"]) for p, o in optim.optim_objs.items()]

    expected, actual = run(SVI, Trace_ELBO()), run(CompiledSVI, replayed())
    assert_close(actual, expected)
    assert actual[2] == [40.0] * (len(actual[2]) - 1) + [10.0]


def test_ctrl_c(monkeypatch):
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed())
    call, count = FusedSteps.__call__, []

    def stop(*args):
        count.append(1)
        if len(count) > 20:
            raise KeyboardInterrupt
        return call(*args)

    monkeypatch.setattr(FusedSteps, "__call__", stop)
    losses = svi.run(100, *args, progress_bar=False)
    assert 20 <= len(losses) < 100
    state = svi.optim.get_state()["m"]["state"][0]
    assert float(state["step"]) == len(losses)


def test_progress_bar(capsys):
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed())
    svi.run(5, *args)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optim, match",
    [
        (lambda: pyro.optim.SGD({"lr": 0.01}), "Pyro's loop over them makes it: SGD"),
        (lambda: pyro.optim.Adam({"lr": 0.01, "amsgrad": True}), "Adam with amsgrad"),
        (lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 1.0}), "Adam with clip_args"),
    ],
)
def test_optimizers_without_update(optim, match):
    def run(kind, loss):
        svi, args = make(kind, optim(), loss)
        return [svi.step(*args) for _ in range(12)], parameters()

    expected = run(SVI, Trace_ELBO())
    with pytest.warns(UserWarning, match=match) as caught:
        assert_close(run(CompiledSVI, replayed()), expected)
    assert len(caught) == 1


def test_gradient_of_something_else():
    """What is in .grad before the step belongs to it."""

    def run(kind, loss):
        svi, args = make(kind, OPTIMIZERS["adam"](), loss)
        losses = []
        for i in range(15):
            if i % 4 == 3:
                pyro.param("m").square().sum().backward()
            losses.append(svi.step(*args))
        return losses, parameters()

    assert_close(run(CompiledSVI, replayed()), run(SVI, Trace_ELBO()))


def test_options_that_are_changed():
    def run(kind, loss):
        optim = OPTIMIZERS["adam"]()
        svi, args = make(kind, optim, loss)
        losses = []
        for i in range(15):
            if i == 7:
                for torch_optim in optim.optim_objs.values():
                    torch_optim.param_groups[0].update(lr=0.1, eps=0.1)
            losses.append(svi.step(*args))
        return losses, parameters()

    assert_close(run(CompiledSVI, replayed()), run(SVI, Trace_ELBO()))


def change_eps(svi, i):
    for torch_optim in svi.optim.optim_objs.values():
        torch_optim.param_groups[0]["eps"] = 0.01 * (1 + i)


def replace(svi, i):
    if i in (5, 10):
        svi.optim = [OPTIMIZERS["clipped"], lambda: pyro.optim.SGD({"lr": 0.01})][i // 10]()
    elif i == 15:
        svi.optim = pyro.optim.Adam({"lr": 0.0})


@pytest.mark.parametrize(
    "change, match",
    [(change_eps, "eps of Adam keeps changing. Expected no change but of learning rates"), (replace, "makes it: SGD")],
)
def test_optimizer_that_is_changed(change, match):
    def run(kind, loss):
        svi, args = make(kind, OPTIMIZERS["adam"](), loss)
        losses = []
        for i in range(25):
            losses.append(svi.step(*args))
            change(svi, i)
        return losses, parameters(), svi

    *expected, _ = run(SVI, Trace_ELBO())
    with pytest.warns(UserWarning, match=match) as caught:
        *actual, svi = run(CompiledSVI, replayed())
    assert_close(actual, expected)
    assert len(caught) == 1
    assert (svi._looped is svi.optim) == (change is change_eps)


def test_optimizer_that_is_changed_now_and_then():
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed())
    for i in range(5):
        svi.run(120, *args, progress_bar=False)
        change_eps(svi, i)
    assert not svi._why_loop


def two_names():
    net, x = torch.nn.Linear(1, 1), torch.linspace(-1.0, 1.0, 5)

    def model(x):
        pyro.module("decoder", net)
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(net(x[:, None])[:, 0] + z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", net)
        pyro.sample("z", dist.Normal(net(x[:, None]).mean(), 1.0))

    return model, guide, lambda i: (x,)


def flow():
    model, _, args = models.schools()
    return model, AutoIAFNormal(model), args


@pytest.mark.parametrize("case", [two_names, flow])
@pytest.mark.filterwarnings("error")
def test_one_parameter_under_two_names(case):
    """As the flow of AutoIAFNormal has its first weight as a prototype."""

    def run(kind, loss):
        svi, args = make(kind, OPTIMIZERS["adam"](), loss, case)
        return [svi.step(*args) for _ in range(20)], parameters(), svi

    *expected, _ = run(SVI, Trace_ELBO())
    *actual, svi = run(CompiledSVI, replayed())
    assert_close(actual, expected)
    assert any(steps.ready for steps in svi._steps.values())


def test_step_that_is_not_a_number():
    """Nothing is updated by it, and the eager loss raises what it raises."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z * x.log(), 1.0), obs=x)

    _, guide, _ = models.conjugate()
    svi = CompiledSVI(model, guide, OPTIMIZERS["adam"](), replayed())
    for _ in range(5):
        svi.step(torch.ones(4))
    before = parameters()
    with pytest.raises(ValueError, match="invalid values"):
        svi.step(-torch.ones(4))
    assert_close(parameters(), before)


@pytest.mark.parametrize("unroll", [1, 4])
def test_step_that_fails(unroll):
    """The steps before it stand, and it raises what it raises, with the random numbers and state of SVI."""

    def model():
        m = pyro.param("m", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        scale = torch.linalg.cholesky(torch.eye(2) * (0.95 - m - 0.2 * torch.rand(())))
        pyro.sample("x", dist.Normal(z - 5 * scale.sum(), 1.0), obs=torch.tensor(30.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def run(kind, loss, **options):
        svi, _ = make(kind, pyro.optim.Adam({"lr": 0.01}), loss, lambda: (model, guide, lambda i: ()), **options)
        failed = 0
        for _ in range(40):
            try:
                svi.run(5, progress_bar=False) if options else [svi.step() for _ in range(5)]
            except torch.linalg.LinAlgError:
                failed += 1
        return failed, parameters(), strip(svi.optim.get_state()), torch.rand(3), svi

    *expected, _ = run(SVI, Trace_ELBO())
    *actual, svi = run(CompiledSVI, replayed(), unroll=unroll)
    assert_close(actual, expected)
    assert 10 < actual[0] < 40 and not svi._why_loop


def test_error_while_the_update_is_captured(monkeypatch):
    """As of a decomposition, for the draws of one step."""
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed(), unroll=4)
    svi.step(*args), svi.step(*args)
    with monkeypatch.context() as patch:
        patch.setattr("pyro_rb.compiled.fused.trace", lambda *_: torch.linalg.cholesky(torch.zeros(1, 1)))
        svi.step(*args)
    losses = svi.run(20, *args, progress_bar=False)
    assert {n for steps in svi._steps.values() for n in steps.ready} == {1, 4}
    svi, args = make(SVI, OPTIMIZERS["adam"](), Trace_ELBO())
    assert_close(losses, torch.tensor([svi.step(*args) for _ in range(23)][3:]))


def test_running_means():
    def run(kind, loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = models.autoencoder(with_norm=True)
        svi = kind(model, guide, OPTIMIZERS["adam"](), loss)
        losses = [svi.step(*args(i)) for i in range(20)]
        # The bias before the normalization has no gradient but rounding.
        return losses, [b.double() for b in model.encoder.buffers()]

    actual, expected = run(CompiledSVI, replayed()), run(SVI, Trace_ELBO())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_evaluate_loss():
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), replayed())
    svi.run(5, *args, progress_bar=False)
    pyro.set_rng_seed(0)
    loss = svi.evaluate_loss(*args)
    pyro.set_rng_seed(0)
    assert loss == Trace_ELBO().loss(svi.model, svi.guide, *args)


def test_unroll_must_be_positive():
    with pytest.raises(ValueError, match="Invalid unroll: 0"):
        make(CompiledSVI, OPTIMIZERS["adam"](), replayed(), unroll=0)


def compile_by(monkeypatch, module, factor):
    """In place of Inductor: the operations one by one, with data that are multiplied by ``factor()``."""

    def make(graph, inputs, *options):
        program = as_function(graph)
        return SimpleNamespace(
            is_done=lambda: True, result=lambda: lambda x, *others: program(factor() * x, *others)
        )

    monkeypatch.setattr(f"pyro_rb.compiled.{module}.Compilation", make)


@pytest.mark.parametrize("error, warning", [(1e-3, None), (0.03, "update differs from the one that is replayed")])
def test_compiled_update_may_round(error, warning, monkeypatch):
    """As where it solves an ill-conditioned system in single precision."""
    torch.set_default_dtype(torch.float32)
    compile_by(monkeypatch, "graph", lambda: 1.0)
    compile_by(monkeypatch, "fused", lambda: 1.0 + error)
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), pyro_rb.compile(Trace_ELBO(), background=False))
    args = [x.float() for x in args]
    with nullcontext() if warning is None else pytest.warns(UserWarning, match=warning):
        for _ in range(5):
            svi.step(*args)
    assert bool(svi._why_loop) == bool(warning)
    assert any(steps.ready for steps in svi._steps.values()) != bool(warning)


def test_compiled_program_that_goes_wrong_is_replayed(monkeypatch):
    """With its update."""
    factor = 1.0
    for module in ("graph", "fused"):
        compile_by(monkeypatch, module, lambda: factor)
    loss = pyro_rb.compile(Trace_ELBO(), background=False, check_every=5)
    svi, args = make(CompiledSVI, OPTIMIZERS["adam"](), loss)
    losses = [svi.step(*args) for _ in range(4)]
    ((graph, steps),) = svi._steps.items()
    assert steps.ready[1].is_compiled
    while not graph.is_due:
        losses.append(svi.step(*args))
    factor = 1.1
    with pytest.warns(UserWarning, match="steps are replayed: Inductor failed: its program .* is off by"):
        losses += [svi.step(*args) for _ in range(10)]
    assert not steps.ready[1].is_compiled
    svi, args = make(SVI, OPTIMIZERS["adam"](), Trace_ELBO())
    assert losses == pytest.approx([svi.step(*args) for _ in losses])
