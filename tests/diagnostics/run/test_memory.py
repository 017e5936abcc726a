# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import gc

import pytest
import torch

import pyro_rb.diagnostics.run.memory as memory
from pyro_rb.diagnostics import compare
from pyro_rb.diagnostics.run.memory import peak_memory
from tests.support.models import conj

CPU = torch.device("cpu")
FLOATS = 4000  # bytes of a tensor of 1000 numbers
pytestmark = pytest.mark.skipif(not memory._TRACKS_STORAGES, reason="PyTorch 2.0 does not tell")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with torch.device("cpu"):
        yield


def test_freed_tensors_do_not_add_up():
    def step():
        x = torch.zeros(1000)
        for _ in range(10):
            x = x + 1

    assert peak_memory(step, CPU) == 2 * FLOATS


def test_views_and_changes_in_place_take_nothing():
    def step():
        x = torch.zeros(1000)
        return [x[i:].add_(1) for i in range(10)]

    assert peak_memory(step, CPU) == FLOATS


def test_what_existed_before_does_not_count():
    x = torch.zeros(1000)
    assert peak_memory(lambda: x.mul_(2)[3:], CPU) == 0
    assert peak_memory(lambda: x * 2, CPU) == FLOATS


def test_tensors_saved_for_the_backward_pass_live_on():
    x = torch.ones(1000, requires_grad=True)

    def step():
        y = x
        for _ in range(10):
            y = y.sin()  # saves its argument
        y.sum().backward()

    assert 9 * FLOATS <= peak_memory(step, CPU) <= 14 * FLOATS
    with torch.no_grad():
        assert peak_memory(lambda: x.sin().sin().sin().sin(), CPU) == 2 * FLOATS


def test_more_particles_take_more():
    case = conj()
    losses = ["Trace_ELBO:num_particles=50,vectorize_particles=True"]
    result = compare(case.model, case.guide, losses, args=case.args, num_samples=4, num_burn_in=0, progress=False)
    reference, many = result.states[0].losses
    assert reference.memory > 0 and reference.memory_ratio == 1.0
    assert many.memory_ratio == many.memory / reference.memory > 5


def test_timing_is_not_disturbed():
    """No dispatch mode is left behind."""
    peak_memory(lambda: torch.zeros(10), CPU)
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0, CPU)
    assert gc.isenabled()


def test_other_devices():
    assert peak_memory(lambda: None, torch.device("meta")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    device = torch.device("cuda")
    x = torch.zeros(10**6, device=device)
    assert 4 * 10**6 <= peak_memory(lambda: (x + 1).sum(), device) < 9 * 10**6
