# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that torch.compile made, inside of models."""

import pytest
import torch
import torch.nn.functional as F

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import reasons, spent, treatments, weights
from tests.support.elbo_contract import assert_same, evaluate

# The compiler looks at .grad of what it is given, and hides the warning; but not an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def compiler():
    torch.set_default_dtype(torch.float64)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(h):
    return 1.5 * h.tanh().square()


def compiled(fn, backend):
    return torch.compile(fn, backend=backend, fullgraph=True)


@pytest.mark.parametrize("mode", ["shared", "local"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_network_behind_a_projected_layer(backend, mode):
    """Not compiled again at any later step, by any loss; the same gradient as without."""
    fn = compiled(network, backend)
    case = weights(lambda x, w: fn(F.linear(x, w)))
    other = weights(lambda x, w: network(F.linear(x, w)))
    evaluate(R2G2_ELBO(pre_activations=mode), case)
    elbo, expected = (R2G2_ELBO(pre_activations=mode) for _ in range(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            assert_same(evaluate(elbo, case, seed=seed), evaluate(expected, other, seed=seed))
    assert treatments(elbo) == {"w": "projected" if mode == "shared" else "local"}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_use_inside_of_a_compiled_function_is_plain(backend, detach):
    """These backends run PyTorch functions, which are seen; also without a gradient."""

    def norm(w):
        return (w.detach() if detach else w).square().sum().sqrt()

    fn = compiled(norm, backend)
    case = weights(lambda x, w: F.linear(x, w) * fn(w))
    evaluate(R2G2_ELBO(), case)
    for seed in range(3):
        elbo = R2G2_ELBO()
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(evaluate(elbo, case, seed=seed), evaluate(spent(case), case, seed=seed))
        assert treatments(elbo) == {"w": "plain"}


def test_layer_inside_of_a_compiled_function():
    """As in any code that is not made of PyTorch functions, it is found by its gradient."""
    case, elbo = weights(compiled(lambda x, w: F.linear(x, w).tanh(), "aot_eager")), R2G2_ELBO()
    for seed in range(2):
        assert_same(evaluate(elbo, case, seed=seed), evaluate(spent(case), case, seed=seed))
    assert treatments(elbo) == {"w": "plain"} and reasons(elbo)["w"]
