# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What every test starts from.

Two environment variables change a run:

* ``PYRO_RB_SEED``: the seed of every test (default 0);
* ``PYRO_RB_TEST_DEVICE``: the device on which tests make their tensors, for
  example ``cuda`` (default: PyTorch's own default, the CPU). Doctests run without it only.
"""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with more threads each, they wait for one another. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from pyro_rb.infer.report import Summary  # noqa: E402
from tests.support.report_words import find_unexplained  # noqa: E402

SEED = int(os.environ.get("PYRO_RB_SEED", 0))
DEVICE = os.environ.get("PYRO_RB_TEST_DEVICE")

if DEVICE:
    # Before test modules are imported, as some make tensors then.
    torch.set_default_device(DEVICE)

if not DEVICE and not torch.cuda.is_available():
    # PyTorch keeps the seeds of absent devices for later, each with a stack trace: half a millisecond a seed.
    for name in ("cuda", "xpu", "mtia"):
        if hasattr(getattr(torch, name, None), "manual_seed_all"):
            getattr(torch, name).manual_seed_all = lambda seed: None


def pytest_collection_modifyitems(items):
    """Doctests print tensors of the CPU."""
    for item in items:
        if DEVICE and isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.skip(reason="doctests are of the CPU"))


def pytest_collection_finish():
    """Garbage is looked for among what tests make, not among all modules and tests: a collection takes 0.4 s then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state():
    """Empties the param store, seeds, and restores the global defaults afterwards."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(SEED)
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def explained_reports(monkeypatch):
    """Fails a test in which a report says something that the page on reports does not explain."""
    make = Summary.report

    def report(self, note=""):
        found = make(self, note)
        unexplained = find_unexplained(found)
        assert not unexplained, f"docs/source/howto/report.rst does not explain {unexplained}"
        return found

    monkeypatch.setattr(Summary, "report", report)
