# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What no operation shows while a graph is captured: values that C++ reads, and operations that fail later."""

import ctypes
import itertools
import warnings

import pyro
import pyro.contrib.gp
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from pyro.infer import SVI, Trace_ELBO, Trace_MMD, TraceTMC_ELBO
from pyro.util import warn_if_inf, warn_if_nan

import pyro_rb
from pyro_rb import CompiledSVI
from tests.compiled.test_guards import X, assert_eager, guide, observe
from tests.compiled.training import assert_equal, assert_replayed, train

pytestmark = pytest.mark.slow


@torch.library.custom_op("pyro_rb_tests::first", mutates_args=())
def first(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Up to three rows, whose number no tag says to depend on values."""
    return x[: min(int(n), 3)].clone()


first.register_fake(lambda x, n: torch.empty_like(x[:3]))


def by_address(x):
    return ctypes.c_float.from_address(x.data_ptr()).value


def test_argument():
    """Is noticed at its second value, not at the next comparison."""

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + by_address(x), x)

    def args(i):
        return (X if i < 23 else 2.0 * X,)

    assert_eager(lambda: (model, lambda x: guide(), args), "code that is not Python reads", 30)


@pytest.mark.parametrize("size", [3, 5000])
def test_argument_that_is_looked_at_by_operations(size):
    """Its second value costs one eager step, also if the first came in many tensors."""

    calls = itertools.count()  # where nobody looks

    def make():
        def model(x):
            next(calls)
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

        def args(i):
            return (torch.full((size,), 1.0 if i < 23 else 2.0),)

        return model, lambda x: guide(), args

    expected = train(Trace_ELBO(), make, 60)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    before = next(calls)
    assert_equal(train(loss, make, 60), expected)
    # First, captured, compared, next, 10th, and the second value, which a large tensor has at once.
    assert next(calls) - before - 1 == (6 if size == 3 else 5)


@pytest.mark.parametrize(
    "read, match",
    [
        (by_address, "code that is not Python reads"),
        (lambda z: torch.FloatTensor([z.detach()]), r"It looks at the value of a tensor, by __float__\(\)"),
        (lambda z: torch.FloatTensor([3 * X[0] + X.sum().round().long()]), r"by __float__\(\)"),
        (lambda z: torch.tensor([z.detach(), 1.0]).sum(), r"by tensor\(\)"),
        (lambda z: torch.arange(9.0).tensor_split(z.exp().long().reshape(1))[0].sum(), r"by tensor_split\(\)"),
    ],
)
def test_draw(read, match):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + read(z))

    assert_eager(lambda: (model, guide, lambda i: ()), match)


def rows(x, n):
    found = first(x, n)
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.arange(1.0, 1.0 + len(found)), found)


@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
def test_graph_that_fails_where_plain_steps_do_not(kind):
    """Such a step is eager, with the same random numbers, and the next ones too."""

    def run(kind, loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(rows, lambda x, n: guide(), pyro.optim.Adam({"lr": 0.02}), loss)
        return [svi.step(X, torch.tensor(n)) for n in [3, 3, 4, *[5] * 20, 2, 3, 1]]

    expected = run(SVI, Trace_ELBO())
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    with pytest.warns(UserWarning, match="an operation of its graph fails where it is repeated"):
        found = run(kind, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert loss.report()[-1].treatment == "eager"


@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
def test_error_of_plain_steps(kind):
    """Is that of the eager loss; later steps are not eager."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + torch.linalg.cholesky(x * torch.eye(3)).sum())

    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    svi = kind(model, lambda x: guide(), pyro.optim.Adam({"lr": 0.02}), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(20):
            svi.step(torch.tensor(1.0 + i))
        before = torch.get_rng_state()
        with pytest.raises(torch.linalg.LinAlgError):
            svi.step(torch.tensor(-1.0))
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        guide()  # draws once
        assert torch.equal(torch.get_rng_state(), after)
        svi.step(torch.tensor(1.0))
    assert loss.report()[-1].treatment == "replayed"


def dropout(z):
    return torch.utils.checkpoint.checkpoint(lambda y: F.dropout(y * X).sum(), z, use_reentrant=False)


def seeded(z):
    torch.manual_seed(1)
    return torch.rand(())


def forked(z):
    with torch.random.fork_rng():
        return torch.rand(())


@pytest.mark.parametrize("draw", [dropout, seeded, forked])
def test_generator_that_is_set(draw):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + draw(z))

    assert_eager(lambda: (model, guide, lambda i: ()), "state of a random number generator is set")


def test_checkpoint_without_draws():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(torch.utils.checkpoint.checkpoint(torch.sin, z, use_reentrant=False))

    assert_replayed(Trace_ELBO, lambda: (model, guide, lambda i: ()))


@pytest.mark.parametrize("message", [(), ("too small",)])
def test_assertion(message):
    """Is part of the graph, and its error that of the eager loss."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        torch._assert_async(x.sum() > 0.0, *message)
        observe(z, x)

    make = lambda: (model, lambda x: guide(), lambda i: (X,))  # noqa: E731
    loss = assert_replayed(Trace_ELBO, make, 20)
    svi = SVI(model, lambda x: guide(), pyro.optim.Adam({"lr": 0.02}), loss)
    for i in range(20):
        svi.step((1.0 + i) * X)
    with pytest.raises(RuntimeError, match="too small" if message else "xpected"):
        svi.step(-X)
    svi.step(X)
    assert loss.report()[-1].treatment == "replayed"


@pytest.mark.parametrize("warn", [warn_if_nan, warn_if_inf])
def test_gradient_that_is_looked_at(warn):
    def model():
        observe(warn(pyro.sample("z", dist.Normal(0.0, 1.0)) * 2.0))

    assert_replayed(Trace_ELBO, lambda: (model, guide, lambda i: ()))


def test_losses_that_look_at_gradients():
    kernel = pyro.contrib.gp.kernels.RBF(1)

    def model():
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)))

    def make_mmd():
        return Trace_MMD(kernel, num_particles=4, vectorize_particles=True)

    summed = pyro.infer.config_enumerate(guide, "parallel", num_samples=3)
    assert_replayed(TraceTMC_ELBO, lambda: (model, summed, lambda i: ()))
    assert_replayed(make_mmd, lambda: (model, guide, lambda i: ()))
