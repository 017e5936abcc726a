# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What no operation shows while a graph is captured: values that C++ reads, and operations that fail later."""

import ctypes
import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_rb
from pyro_rb import CompiledSVI
from tests.compiled.test_guards import X, assert_eager, guide, observe
from tests.compiled.training import assert_equal, train

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
