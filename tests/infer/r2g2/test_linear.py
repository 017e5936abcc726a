# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Each linear function, in each draw: the scale's gradient has the conditional mean."""

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import fixed, reasons, spent, treatments, weights
from tests.support.elbo_contract import assert_same, evaluate


def moved_index(x, w):
    index = torch.tensor(0)
    row = w[index]
    index += 1  # what the view shows is not changed by it
    return x @ row


LINEAR = {
    "conv1d": lambda x, w: F.conv1d(x.reshape(1, 2, 9), w.reshape(2, 2, 6)),
    "conv2d": lambda x, w: F.conv2d(x.reshape(1, 1, 6, 3), w.reshape(4, 1, 3, 2), stride=2),
    "groups": lambda x, w: F.conv1d(x.reshape(1, 2, 9), w.reshape(4, 1, 6), groups=2),
    "padding": lambda x, w: F.conv1d(x.reshape(1, 2, 9)[..., :3], w.reshape(2, 2, 6)[..., :3], padding="same"),
    "conv3d": lambda x, w: F.conv3d(x.reshape(1, 1, 2, 3, 3), w.reshape(2, 1, 2, 3, 2)),
    "linear": lambda x, w: F.linear(x, w),
    "keywords": lambda x, w: F.linear(input=x, weight=w[:, :], bias=None),
    "bias": lambda x, w: F.linear(x[:, :5], w[:, :5], w[:, 5]),
    "weight_as_input": lambda x, w: F.linear(w, x),
    "weight_as_input_bias": lambda x, w: F.linear(w[:3], x, w[3, :3]),
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "left": lambda x, w: (w @ x.mT),
    "batched": lambda x, w: (x.reshape(3, 1, 1, 6) @ w.reshape(1, 2, 6, 2)),
    "own_batch": lambda x, w: (x[:2, None, :] @ w.reshape(2, 6, 2)),
    "bmm": lambda x, w: torch.bmm(x[:2, None, :], w.reshape(2, 6, 2)),
    "mixed_batch": lambda x, w: (x[:2, None, None, :3] @ w.reshape(4, 3, 2)),
    "mv": lambda x, w: torch.cat([x.mv(w[0]), x[:2].mv(w[1])]),
    "dot": lambda x, w: torch.dot(x[0], w[2]),
    "vdot": lambda x, w: torch.vdot(x[0], w[2]),
    "linalg_matmul": lambda x, w: torch.linalg.matmul(x, w.mT),
    "inner": lambda x, w: torch.inner(x, w),
    "inner_left": lambda x, w: torch.inner(w, x),
    "addmm": lambda x, w: torch.addmm(w[:, 5], x[:, :5], w[:, :5].mT),
    "addmm_beta": lambda x, w: torch.addmm(w[:, 5], x[:, :5], w[:, :5].mT, beta=2.0),
    "addmv": lambda x, w: torch.addmv(w[1, :3], x, w[0]),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "einsum_three": lambda x, w: torch.einsum("bi,oi,o->b", x, w, x[0, :4]),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [1])),
    "rows_of_one": lambda x, w: F.linear(x[0], w),
    "split": lambda x, w: torch.cat([F.linear(x, u) for u in w.split(2)], -1),
    "unbind": lambda x, w: torch.stack([x @ u for u in w], -1),
    "masked_index": lambda x, w: (x @ w[torch.tensor([3, 1])].T),
    "index_select": lambda x, w: (x @ w.index_select(0, torch.tensor([3, 1])).T),
    "reshaped": lambda x, w: F.linear(x, w.T.reshape(4, 6)),
    "clone": lambda x, w: F.linear(x, w.clone().contiguous()),
    "unused_rows": lambda x, w: F.linear(x, w)[:, :2],
    "baddbmm": lambda x, w: torch.baddbmm(w[0, :1], x[:2, None, :4], w[2:, :4, None]),
    "moved_index": moved_index,
}


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("name", LINEAR)
def test_gradient_has_the_conditional_mean(name, solver):
    torch.set_default_dtype(torch.float64)
    use = LINEAR[name]
    case, elbo, x = weights(lambda x, w: use(x, w).tanh()), R2G2_ELBO(solver=solver), fixed(3, 6, seed=9)
    for seed in range(2):
        _, gradient = evaluate(elbo, case, seed=seed)
        pyro.set_rng_seed(seed)
        w = poutine.trace(case.guide).get_trace().nodes["w"]["value"].detach()
        loc, scale = (pyro.param(name).detach() for name in ("w.loc", "w.scale"))
        eps = (w - loc) / scale
        jacobian = torch.autograd.functional.jacobian(lambda w: use(x, w), w).reshape(-1, 24)
        a = jacobian * scale.reshape(-1)
        star = (torch.linalg.pinv(a) @ (a @ eps.reshape(-1))).reshape(4, 6)
        # An element that is not used has no gradient.
        adjoint = gradient["w.loc"] - loc
        expected = scale * (adjoint * star + scale - 1 / scale)
        assert_same(gradient["w.scale"], expected, rtol=1e-7, atol=1e-8)
        assert (adjoint * (star - eps)).abs().max() > 1e-3
    assert treatments(elbo)["w"].startswith("projected")


TWO = torch.tensor(2.0, dtype=torch.float64)
#: Nothing can be gained, for want of inputs or elements.
SMALL = {
    "inner_of_number": lambda x, w: torch.inner(x, w[0, 0]),
    "inner_of_number_left": lambda x, w: torch.inner(w[0, 0], x),
    "inner_with_number": lambda x, w: torch.inner(TWO, w),
    "inner_of_two_numbers": lambda x, w: torch.inner(TWO, w[0, 0]),
    "tensordot_of_number": lambda x, w: torch.tensordot(x, w[0, 0], 0),
    "tensordot_with_number": lambda x, w: torch.tensordot(w, TWO, dims=([], [])),
    "einsum_of_number": lambda x, w: torch.einsum(",bi->b", w[0, 0], x),
    "einsum_of_two_numbers": lambda x, w: torch.einsum(",->", w[0, 0], TWO),
    "einsum_with_dots": lambda x, w: torch.einsum("...,...->...", w[0, 0], x),
    "no_inputs": lambda x, w: F.linear(x[:, :0], w[:, :0]) + w.sum(),
    "no_elements": lambda x, w: x.sum(-1) + F.linear(x, w[:0]).sum(),
}


@pytest.mark.parametrize("solver", ["auto", "cg", "qr"])
@pytest.mark.parametrize("name", SMALL)
def test_numbers_and_empty_tensors_are_plain(name, solver):
    torch.set_default_dtype(torch.float64)
    case, elbo = weights(lambda x, w: SMALL[name](x, w).tanh()), R2G2_ELBO(solver=solver)
    assert_same(evaluate(elbo, case, seed=0), evaluate(spent(case), case, seed=0))
    assert treatments(elbo) == {"w": "plain"}, reasons(elbo)


@pytest.mark.filterwarnings("ignore:This overload of addmm:UserWarning")
def test_deprecated_order_of_arguments_is_plain():
    torch.set_default_dtype(torch.float64)
    case = weights(lambda x, w: torch.addmm(2.0, x[:, :4], x, w.mT).tanh())
    elbo = R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(spent(case), case, seed=0))
    assert treatments(elbo) == {"w": "plain"}
