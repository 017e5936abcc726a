# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Threads, processes that train together, and the version of PyTorch."""

import pathlib
import re
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as distributed
from pyro.infer import SVI, Trace_ELBO
from torch.nn.parallel import DistributedDataParallel

import pyro_rb
from pyro_rb import CompiledSVI, STLTrace_ELBO
from pyro_rb.compiled import torch_private
from tests.compiled import models
from tests.compiled.training import assert_equal, train


@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
def test_threads_that_take_turns(kind):
    """Each captures and runs graphs of its own. Pyro has one param store, and one stack of handlers."""
    lock, found, seeds = threading.Lock(), {}, (1, 2)

    def fit(seed, loss, turns):
        """Of a model with parameters of its own; what is drawn belongs to the seed."""

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(x):
            m = pyro.param(f"m_{seed}", torch.zeros(4))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(m, 0.7))

        state, x = torch.Generator().manual_seed(seed).get_state(), torch.tensor([0.5, -1.2, 2.0, 0.3])
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
        for i in range(40):
            with turns:
                torch.set_rng_state(state)
                svi.step(x)
                state = torch.get_rng_state()
        return pyro.param(f"m_{seed}").detach().clone()

    def work(seed):
        loss = pyro_rb.compile(STLTrace_ELBO(control_variate_scale=1.0), "replay")
        found[seed] = fit(seed, loss, lock), loss.num_graphs

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        pyro.clear_param_store()
        expected = fit(seed, pyro_rb.compile(STLTrace_ELBO(control_variate_scale=1.0), "replay"), lock)
        torch.testing.assert_close(found[seed][0], expected)
        assert found[seed][1] == 1


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_module_in_the_model_is_eager(group):
    def make():
        model, guide, args = models.module()
        parallel = DistributedDataParallel(torch.nn.Linear(2, 2))

        def around(x, y):
            with torch.no_grad():
                x = parallel(x)
            return model(x, y)

        return around, guide, args

    expected = train(Trace_ELBO(), make, 6)
    loss = pyro_rb.compile(Trace_ELBO(), "replay")
    with pytest.warns(UserWarning, match="DistributedDataParallel sums gradients"):
        assert_equal(train(loss, make, 6), expected)
    assert loss.report()[-1].treatment == "eager"


def test_distributed_loss_is_eager(group):
    """Parameters of modules are then none of the param store."""

    def run(loss):
        with pyro.settings.context(module_local_params=True):
            pyro.set_rng_seed(0)
            model, guide, args = models.module()
            guide(*args(0))
            parallel = DistributedDataParallel(loss(model, guide))
            optim = torch.optim.Adam(parallel.parameters(), lr=0.05)
            for i in range(6):
                optim.zero_grad()
                parallel(*args(i)).backward()
                optim.step()
            return [p.detach().clone() for p in parallel.parameters()]

    expected = run(STLTrace_ELBO())
    with pytest.warns(UserWarning, match="Parameters are not in the param store.*module_local_params"):
        found = run(pyro_rb.compile(STLTrace_ELBO(), "replay"))
    torch.testing.assert_close(found, expected)


def test_name_that_torch_has_not(monkeypatch):
    monkeypatch.setitem(torch_private._NEEDED, "torch._inductor", ("no_such_name",))
    with pytest.raises(ImportError, match=re.escape(f"no_such_name, which torch {torch.__version__}")):
        pyro_rb.compile(Trace_ELBO())
    monkeypatch.setitem(torch_private._NEEDED, "torch.no_such_module", ("name",))
    with pytest.raises(ImportError, match="which torch .* has not"):
        pyro_rb.compile(Trace_ELBO())


def test_private_names_are_in_one_file():
    folder = pathlib.Path(torch_private.__file__).parent
    private = re.compile(r"\btorch\.(\w+\.)*_[a-z]|\._schema|_disable_|proxy_tensor|_python_dispatch")
    for path in folder.glob("*.py"):
        if path.name != "torch_private.py":
            assert not private.search(path.read_text()), path.name
