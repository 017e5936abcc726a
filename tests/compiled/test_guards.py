# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What changes behind the back of a graph is noticed; what cannot be captured is eager."""

import copy
import gc
import pickle
import random
import warnings
from collections import OrderedDict, defaultdict
from contextlib import nullcontext
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_rb
from pyro_rb import R2G2_ELBO, GradientGuard, NonFiniteError, STLTrace_ELBO
from tests.compiled import models
from tests.compiled.training import assert_equal, assert_replayed, train

pytestmark = pytest.mark.slow

X = torch.tensor([0.5, -1.2, 2.0])


def guide(*args):
    m = pyro.param("m", torch.zeros(()))
    s = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
    return pyro.sample("z", dist.Normal(m, s))


def observe(loc, x=X, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def assert_eager(make, match, num_steps=12, **options):
    """Warns once, and does what the eager loss does."""
    expected = train(Trace_ELBO(), make, num_steps)
    loss = pyro_rb.compile(Trace_ELBO(), "replay", **options)
    with pytest.warns(UserWarning, match=match) as caught:
        found = train(loss, make, num_steps)
    assert len(caught) == 1
    assert_equal(found, expected)
    assert loss.report()[-1].treatment == "eager"
    return str(caught[0].message)


def test_new_batch_size():
    def make():
        return lambda x: observe(guide_value(), x), guide, lambda i: (X[: 2 + i // 3 % 2],)

    def guide_value():
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    assert_replayed(Trace_ELBO, make, num_graphs=2)


def test_batch_size_that_keeps_changing():
    def make():
        x = torch.linspace(0.0, 1.0, 40)
        return model_of_argument, guide, lambda i: (x[: 2 + i // 2],)

    assert_eager(make, r"the shape of an argument keeps changing, to \(10,\) at last. Pad it .* 8 graphs already", 30)


@pytest.mark.parametrize(
    "args, match",
    [
        (lambda i: (X, 0.5 + i / 10), r"a number .* keeps changing, to \d.\d at last. Expected .*tensor\(\d.\d\)"),
        (lambda i: (torch.linspace(0.0, 1.0, 5 + i),), r"shape .* keeps changing, to \(\d+,\) at last. Pad"),
        (lambda i: (X, 1.0, str(i)), r"no tensor keeps changing, to '\d+' at last. Expected tensors"),
    ],
)
def test_arguments_that_are_always_new(args, match):
    """Also where a graph made steps before."""

    def make():
        return model_of_argument, guide, args

    def make_late():
        return model_of_argument, guide, lambda i: args(max(i - 30, 0))

    assert_eager(make, match, 30)
    assert_eager(make_late, match, 80)


def test_arguments_that_are_new_now_and_then():
    def make():
        return model_of_argument, guide, lambda i: (X, 1.0 if i % 3 else 0.5 + i / 10)

    loss = assert_replayed(Trace_ELBO, make, 150)
    (program,) = loss._programs.values()
    assert len(program._graphs) == 1 and len(program._pending) <= 20


def test_nan_as_argument():
    def make():
        return model_of_argument, guide, lambda i: (X, 1.0, float("nan"))

    assert_replayed(Trace_ELBO, make, num_graphs=1)


def model_of_argument(x, beta=1.0, unused=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=beta):
        observe(z, x)


def recurrent():
    torch.manual_seed(1)
    net, x = torch.nn.LSTM(2, 1, batch_first=True), torch.randn(1, 3, 2)

    def model():
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + net(x)[0].reshape(3))

    return model, guide, lambda i: ()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_lstm(monkeypatch):
    assert_eager(recurrent, "oneDNN runs an LSTM.*mkldnn.enabled = False")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert_replayed(Trace_ELBO, recurrent)


@pytest.mark.parametrize("sparse", [True, False])
def test_embedding(sparse):
    def make():
        torch.manual_seed(1)
        net, optim = torch.nn.Embedding(3, 1, sparse=sparse), pyro.optim.SGD({"lr": 0.01})

        def model():
            pyro.module("net", net)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(z + net(torch.arange(3)).reshape(3))

        return model, guide, lambda i: (), optim

    if sparse:
        assert_eager(make, "gradient is sparse.*sparse=False")
    else:
        assert_replayed(Trace_ELBO, make)


def test_number_as_argument():
    def make():
        return model_of_argument, guide, lambda i: (X, 0.5 if i % 2 else 1.0)

    assert_replayed(Trace_ELBO, make, num_graphs=2)


def test_annealing_factor_as_tensor():
    def make():
        return model_of_argument, guide, lambda i: (X, torch.tensor(0.1 * i + 0.1))

    assert_replayed(Trace_ELBO, make, num_graphs=1)


@pytest.mark.parametrize("kind", ["closure", "global", "attribute", "dict", "tensor"])
def test_what_the_model_reaches(kind):
    """Another value is another graph at once; one that keeps changing is eager."""

    class Model:
        beta = None

        def __init__(self):
            self.beta = 1.0

        def __call__(self):
            loc = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(loc, scale=self.beta)

    def make(every):
        beta, options, module = 1.0, {"beta": 1.0}, Model()

        def model():
            loc = pyro.sample("z", dist.Normal(0.0, 1.0))
            scale = {"closure": beta, "tensor": beta, "dict": options["beta"]}.get(kind, BETA)
            observe(loc, scale=scale)

        def args(i):
            nonlocal beta
            global BETA
            value = 1.0 + i // every
            if kind == "closure":
                beta = value
            elif kind == "tensor" and i % every == 0:
                beta = torch.tensor(value)
            elif kind == "global":
                BETA = value
            elif kind == "dict":
                options["beta"] = value
            elif kind == "attribute":
                module.beta = value
            return ()

        return module if kind == "attribute" else model, guide, args

    assert_replayed(Trace_ELBO, lambda: make(4), num_graphs=3)
    name = {"global": "BETA", "dict": "options", "attribute": "the model.beta"}.get(kind, "beta")
    assert_eager(lambda: make(1), f"{name}.* keeps changing.*argument, a number as a tensor", 20)


BETA = 1.0


def test_what_is_not_seen_is_noticed_by_comparison():
    """Held by a generator, where nobody looks."""

    def make():
        def schedule():
            while True:
                yield values[0]

        values = [1.0]
        source = iter(map(float, schedule()))

        def model():
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), scale=next(source))

        def args(i):
            values[0] = 1.0 if i < 20 else 3.0
            return ()

        return model, guide, args

    loss = pyro_rb.compile(Trace_ELBO(), "replay", check_every=4)
    with pytest.warns(UserWarning, match="differ for the same random numbers.*as an argument"):
        train(loss, make, 60)
    assert loss.report()[-1].treatment == "eager"


def test_an_operation_that_fails_where_it_is_repeated():
    """Steps are those of the eager loss. Nothing in the model is to be mended."""
    in_model = []

    @torch.library.custom_op("pyro_rb_tests::only_in_the_model", mutates_args=())
    def only_in_the_model(x: torch.Tensor) -> torch.Tensor:
        if not in_model:
            raise RuntimeError("not\nhere")
        return x.clone()

    only_in_the_model.register_fake(torch.empty_like)

    def model(x):
        in_model.append(True)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), only_in_the_model(x))
        in_model.clear()

    message = assert_eager(lambda: (model, guide, lambda i: (X,)), "fails where it is repeated: not here")
    assert message.endswith("use the loss without compile() to have no warning.")


def test_tensor_changed_in_place():
    def make():
        beta = torch.ones(())

        def model():
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), scale=beta)

        return model, guide, lambda i: (beta.fill_(1.0 + i), ())[1]

    assert_replayed(Trace_ELBO, make)


def test_one_tensor_passed_twice():
    def make():
        return lambda x, y: observe(y.mean(), x), lambda x, y: guide(), args

    def args(i):
        return (X, X) if i < 6 else (X, 2 * X)

    def model(x, y):
        observe(pyro.sample("z", dist.Normal(y.mean(), 1.0)), x)

    assert_replayed(Trace_ELBO, lambda: (model, lambda x, y: guide(), args))


def branch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if z > 0 else 2 * z)  # here


def reads():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, scale=1.0 + abs(z.item()))  # here


def masks():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x = z + X
    observe(z + x[x > 0].sum())  # here


def to_numpy():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, scale=float(np.exp(z.detach().numpy())))  # here


def reads_parameter():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, scale=1.0 + pyro.param("s").item())  # here


@pytest.mark.parametrize("model", [branch, reads, masks, to_numpy, reads_parameter])
def test_structure_that_depends_on_values(model):
    message = assert_eager(lambda: (model, guide, lambda i: ()), "value")
    assert __file__ in message and "# here" in message


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_others(draw):
    def model():
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), scale=1.0 + float(draw()))

    assert_eager(lambda: (model, guide, lambda i: ()), "Python's random or by NumPy")


def test_counter():
    def make():
        state = {"calls": 0}

        def model():
            state["calls"] += 1
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)))

        return model, guide, lambda i: ()

    assert_eager(make, r"state\['calls'\] changes at each run")


def test_log():
    def make():
        draws = []

        def model():
            draws.append(pyro.sample("z", dist.Normal(0.0, 1.0)).item())

        return model, guide, lambda i: ()

    assert_eager(make, "looks at the value|the length of the variable draws")


def test_parameter_that_is_replaced_at_each_step():
    """As the average that Pyro keeps of a baseline."""

    def make():
        def model(x):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            observe(z, x)

        def guide(x):
            p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
            options = {"baseline": {"use_decaying_avg_baseline": True}}
            pyro.sample("z", dist.Bernoulli(p), infer=options)

        return model, guide, lambda i: (X,)

    expected = train(TraceGraph_ELBO(), make)
    loss = pyro_rb.compile(TraceGraph_ELBO(), "replay")
    with pytest.warns(UserWarning, match="the parameter __baseline.* changes at each run"):
        assert_equal(train(loss, make), expected)


def test_sequential_plate():
    def make():
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in pyro.plate("data", len(x)):
                pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

        return model, guide, lambda i: (X,)

    assert_replayed(STLTrace_ELBO, make, 60, num_graphs=2)


def test_generator_of_its_own():
    def make():
        generator = torch.Generator().manual_seed(0)

        def model():
            noise = torch.randn((), generator=generator)
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + noise)

        return model, guide, lambda i: ()

    assert_eager(make, "generator of its own")


def test_schedule_of_a_loss():
    """What a loss counts goes on."""

    def make_loss():
        return R2G2_ELBO(num_steps=6)

    loss = assert_replayed(make_loss, models.logistic, 14, num_graphs=2)
    assert loss.state_dict()["steps_done"] == 14


def test_tensor_changed_by_the_model():
    """Once a step, also at steps that are captured or compared."""

    def make():
        count, row = torch.zeros(()), torch.zeros(2)

        def model():
            count.add_(1.0)
            row[1] += count
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), scale=count + row[1])

        return model, guide, lambda i: ()

    assert_replayed(Trace_ELBO, make, 30)


@pytest.mark.parametrize("options", [{"with_norm": True}, {"dropout": 0.3}, {"with_norm": True, "dropout": 0.3}])
def test_buffers_and_dropout(options):
    """Running means are updated once a step, also at steps that are captured or compared."""
    models_of = {}

    def make():
        model, guide, args = models.autoencoder(**options)
        models_of["encoder"] = model.encoder
        model.named_buffers = model.encoder.named_buffers
        return model, guide, args

    assert_replayed(Trace_ELBO, make, 30)


def test_train_and_eval():
    def make():
        model, guide, args = models.autoencoder(with_norm=True, dropout=0.5)
        return model, guide, lambda i: (model.encoder.train(i // 4 % 2 == 0), args(i))[1]

    assert_replayed(Trace_ELBO, make, 20, num_graphs=2)


def test_frozen_parameter():
    def make():
        def args(i):
            if i == 6:
                pyro.param("m").unconstrained().requires_grad_(False)
            return ()

        return lambda: observe(pyro.sample("z", dist.Normal(0.0, 1.0))), guide, args

    expected = train(Trace_ELBO(), make)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    assert_equal(train(loss, make), expected)


def test_param_store_cleared_and_loaded(tmp_path):
    def make():
        def args(i):
            store = pyro.get_param_store()
            if i == 4:
                store.save(tmp_path / "store")
            if i == 7:
                store.clear()
            if i == 10:
                store.load(tmp_path / "store")
            return ()

        return lambda: observe(pyro.sample("z", dist.Normal(0.0, 1.0))), guide, args

    expected = train(Trace_ELBO(), make, 16)
    assert_equal(train(pyro_rb.compile(Trace_ELBO(), "replay"), make, 16), expected)


def test_float64():
    torch.set_default_dtype(torch.float64)
    assert_replayed(STLTrace_ELBO, models.conjugate, 60, num_graphs=2)


def test_options_of_the_loss():
    def make_on(loss):
        def make():
            model, guide, args = models.conjugate()
            return model, guide, lambda i: (setattr(loss, "num_particles", 1 + i // 6), args(i))[1]

        return make

    eager, inner = Trace_ELBO(), Trace_ELBO()
    expected = train(eager, make_on(eager))
    loss = pyro_rb.compile(inner, "replay")
    assert_equal(train(loss, make_on(inner)), expected)
    assert loss.num_graphs == 2


def test_two_models_with_one_loss():
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    for make in (models.conjugate, models.logistic):
        assert_equal(train(loss, make), train(Trace_ELBO(), make))
    assert loss.num_graphs == 2


def test_model_that_raises():
    def make():
        def model(x):
            if len(x) == 1:
                raise ValueError("too short")
            model_of_argument(x)

        return model, guide

    model, guide_ = make()
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    svi = SVI(model, guide_, pyro.optim.Adam({"lr": 0.01}), loss)
    for x in (X, X, X):
        svi.step(x)
    with pytest.raises(ValueError, match="too short"):
        svi.step(X[:1])
    svi.step(X)
    assert loss.num_graphs == 1


@pytest.mark.parametrize("at", [[0], [1], [2], [0, 2, 4], [9], [10], range(1, 14)], ids=str)
@pytest.mark.filterwarnings("error:.*is not compiled")
def test_error_now_and_then(at):
    """It is the model's own, and later steps are compiled."""

    def run(loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        fails = False

        def model(x):
            model_of_argument(x)
            if fails:
                raise ValueError("by chance")

        svi = SVI(model, AutoNormal(model_of_argument), pyro.optim.Adam({"lr": 0.01}), loss)
        losses = []
        for i in range(20):
            fails = i in at
            with pytest.raises(ValueError, match="^by chance") if fails else nullcontext():
                losses.append(svi.step(X))
        return losses, torch.rand(4).tolist()

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    assert run(loss) == run(Trace_ELBO())
    assert loss.report()[-1].treatment == "replayed"


@pytest.mark.parametrize("kind", [partial(defaultdict, list), OrderedDict, dict])
def test_dicts_as_arguments(kind):
    def make():
        return lambda args: model_of_argument(args["x"]), guide, lambda i: (kind(x=X),)

    assert_replayed(Trace_ELBO, make)


def test_handler_around_the_loss():
    def run(loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model_of_argument, guide, pyro.optim.Adam({"lr": 0.1}), loss)
        losses = []
        for i in range(9):
            with poutine.scale(scale=2.0) if 3 <= i < 6 else warnings.catch_warnings():
                losses.append(svi.step(X))
        return losses

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    with pytest.warns(UserWarning, match="a handler is around the loss"):
        found = run(loss)
    assert found == run(Trace_ELBO())
    assert loss.num_graphs == 1


@pytest.mark.parametrize(
    "value, match",
    [
        (np.ones(3), "An argument is a numpy.ndarray"),
        (torch.ones(3, requires_grad=True), "An argument requires grad"),
    ],
)
def test_argument_of_another_kind(value, match):
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), torch.as_tensor(x).float().detach())

    assert_eager(lambda: (model, guide, lambda i: (value,)), match)


def test_hook_of_a_parameter():
    calls = []

    def make():
        def args(i):
            if i == 0:
                guide()
                pyro.param("m").unconstrained().register_hook(lambda g: calls.append(1))
            return ()

        return lambda: observe(pyro.sample("z", dist.Normal(0.0, 1.0))), guide, args

    assert_eager(make, "A parameter has hooks")
    # Once a step of either loss, but for the one that was captured.
    assert len(calls) in (24, 25)


def test_loss_that_is_not_a_number():
    """The eager loss says what it says."""

    def make():
        def model(x):
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * x.log(), X)

        return model, guide, lambda i: (torch.tensor(-1.0 if i == 5 else 2.0),)

    for loss in (Trace_ELBO(), pyro_rb.compile(Trace_ELBO(), "replay")):
        with pytest.raises(ValueError, match="constraint|invalid values"):
            train(loss, make)


def test_differentiable_loss():
    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found = []
        for _ in range(5):
            loss = elbo.differentiable_loss(model_of_argument, guide, X)
            parameters = [p for _, p in pyro.get_param_store().named_parameters()]
            found += [loss.detach(), *torch.autograd.grad(2 * loss, parameters)]
        return found

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    torch.testing.assert_close(run(loss), run(Trace_ELBO()))
    assert loss.num_graphs == 1


def test_without_gradients():
    svi = SVI(model_of_argument, guide, pyro.optim.Adam({"lr": 0.1}), pyro_rb.compile(Trace_ELBO(), "replay"))
    for _ in range(3):
        svi.step(X)
    pyro.set_rng_seed(0)
    loss = svi.evaluate_loss(X)
    pyro.set_rng_seed(0)
    assert loss == Trace_ELBO().loss(model_of_argument, guide, X)


def test_gradients_add_up():
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    totals = []
    for elbo in (loss, Trace_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        for _ in range(6):
            elbo.loss_and_grads(model_of_argument, guide, X)
        totals.append([p.grad for _, p in pyro.get_param_store().named_parameters()])
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copy_of):
    loss = pyro_rb.compile(STLTrace_ELBO(), "replay")
    train(loss, models.conjugate, 3)
    other = copy_of(loss)
    assert other.num_graphs == 0 and loss.num_graphs == 1
    assert other.control_variate_scale == "adaptive" and other.backend == "replay"
    train(other, models.conjugate, 3)


def test_nothing_is_kept_of_a_step():
    model, guide_, args = models.conjugate()
    svi = SVI(model, guide_, pyro.optim.Adam({"lr": 0.01}), pyro_rb.compile(Trace_ELBO(), "replay"))
    for _ in range(3):
        svi.step(*args(0))

    def count():
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    before = count()
    for _ in range(20):
        svi.step(*args(0))
    assert count() <= before


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: pyro_rb.compile(Trace_ELBO(), "jit"), "Invalid backend: 'jit'"),
        (lambda: pyro_rb.compile(Trace_ELBO(), check_every=0), "Invalid check_every: 0"),
        (lambda: pyro_rb.compile(JitTrace_ELBO()), "JitTrace_ELBO is compiled by torch.jit"),
        (lambda: pyro_rb.compile(Trace_ELBO), "Invalid loss"),
    ],
)
def test_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.0")
    with pytest.raises(ImportError, match="found 2.1.0"):
        pyro_rb.compile(Trace_ELBO())


def test_gradient_guard():
    """Is a handler that only collects parameters; it runs a copy eagerly to find the site."""
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    svi = SVI(model_of_argument, guide, pyro.optim.Adam({"lr": 0.1}), GradientGuard(loss))
    for _ in range(6):
        svi.step(X)
    assert loss.num_graphs == 1

    def bad(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("root", (0 * z).sqrt())

    svi = SVI(bad, guide, pyro.optim.Adam({"lr": 0.1}), GradientGuard(loss))
    with pytest.raises(NonFiniteError, match="site 'z'"):
        svi.step(X)


def test_module_with_an_optimizer_of_torch():
    def run(loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = models.module()
        elbo = loss(model, guide)
        elbo(*args(0))
        optim = torch.optim.Adam(elbo.parameters(), lr=0.01)
        losses = []
        for _ in range(10):
            optim.zero_grad()
            losses.append(elbo(*args(0)))
            losses[-1].backward()
            optim.step()
        return torch.stack(losses)

    loss = pyro_rb.compile(STLTrace_ELBO(control_variate_scale=1.0), "replay")
    torch.testing.assert_close(run(loss), run(STLTrace_ELBO(control_variate_scale=1.0)))
    assert loss.num_graphs == 1


@pytest.mark.parametrize("factor, treatment", [(1 + 3e-4, "compiled"), (1 + 1e-2, "replayed")])
def test_what_a_compiled_program_rounds_is_told_from_what_is_stale(factor, treatment):
    """If the same operations one by one are not off, they take the place of a program that is off by much."""
    model, guide, args = models.conjugate()
    elbo = pyro_rb.compile(Trace_ELBO(), "replay", check_every=5)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(3):
        svi.step(*args(0))
    (graph,) = elbo.program(model, guide).graphs
    run = graph._run

    def rounded(*inputs):
        loss, held, *grads = run(*inputs)
        return loss, held, *[factor * grad for grad in grads]

    graph._run, graph.is_compiled = rounded, True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            svi.step(*args(0))
    assert elbo.report()[-1].treatment == treatment
    text = "its steps are replayed: Inductor failed: its program and the eager loss differ: the gradient of"
    assert any(text in str(w.message) for w in caught) == (treatment == "replayed")
