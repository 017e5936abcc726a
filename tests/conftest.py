# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What every test starts from.

Two environment variables change a run:

* ``PYRO_RB_SEED``: the seed of every test (default 0);
* ``PYRO_RB_TEST_DEVICE``: the device on which tests make their tensors, for
  example ``cuda`` (default: PyTorch's own default, the CPU).
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with more threads each, they wait for one another. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SEED = int(os.environ.get("PYRO_RB_SEED", 0))
DEVICE = os.environ.get("PYRO_RB_TEST_DEVICE")


#: Modules that take more than about ten seconds: ``pytest -m "not slow"`` leaves them out.
SLOW = """
compare/test_candidates compare/test_compare compare/test_compiled compare/test_guides compare/test_race
cli/test_commands cli/test_examples check/test_unbiased guard/test_guard_ddp
compiled/test_background compiled/test_guards compiled/test_rejection compiled/test_replay compiled/test_svi
infer/test_dreg_contract infer/test_dreg_exact infer/test_dreg_weights infer/test_flows infer/test_r2g2_contract
infer/test_r2g2_elbo infer/test_r2g2_unbiased infer/test_rvrs_exact infer/test_rvrs_guide infer/test_stl_adaptive
infer/test_stl_ddp infer/test_stl_elbo infer/test_stl_unbiased infer/test_topk_contract infer/test_topk_gradient
infer/test_topk_semisupervised infer/test_trace_elbo_contract rao_blackwell/test_contract rao_blackwell/test_ddp
rao_blackwell/test_joint rao_blackwell/test_optimum rao_blackwell/test_unbiased
tests/test_main tests/test_skeleton_elbo
""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        if f"{item.path.parent.name}/{item.path.stem}" in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_state():
    """Empties the param store, seeds, and restores the global defaults afterwards."""
    dtype = torch.get_default_dtype()
    if DEVICE:
        torch.set_default_device(DEVICE)
    pyro.clear_param_store()
    pyro.set_rng_seed(SEED)
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    if DEVICE:
        torch.set_default_device(None)
