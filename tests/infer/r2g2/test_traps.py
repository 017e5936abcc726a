# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Uses that may not be projected, and what is said about them."""

import copy
import pickle
import re
import warnings

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.dlpack import from_dlpack, to_dlpack

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import reasons, spent, treatments, weights
from tests.support.elbo_contract import assert_same, evaluate


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def _scripted(x, w):
    return torch.tanh(x @ w.t())


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(_scripted)


def branch(x, w):
    f = F.linear(x, w)
    return f + F.linear(x.roll(1, 0), w) if f.sum() > 0 else f


def no_grad_use(x, w):
    with torch.no_grad():
        size = F.linear(x, w).norm()
    return F.linear(x, w) * size


def edited(x, w):
    u = w.clone()
    u.add_(1.0)
    return F.linear(x, u)


def edited_view(x, w):
    u = w * 1.0
    del u
    w.mul_(2.0)
    return F.linear(x, w)


def edited_later(x, w):
    f = F.linear(x, w)
    w[0].mul_(2.0)
    return f + F.linear(x, w)


def edited_data(x, w):
    w.data.mul_(2.0)
    return F.linear(x, w)


def edited_part(x, w):
    """What is projected of the others would not know of it."""
    w[0].data.mul_(2.0)
    return F.linear(x * pyro.param("gain", torch.ones(6)), w).tanh()


@torch.enable_grad()
def input_gradient(x, w):
    x = x.clone().requires_grad_()
    f = F.linear(x, w)
    slope = torch.autograd.grad(f.tanh().sum(), x, create_graph=True)[0]
    return f.sum(-1) + slope.square().sum(-1)


@torch.enable_grad()
def gradient_of_weights(x, w):
    f = F.linear(x, w)
    if not w.requires_grad:
        return f.sum()
    return f.sum() + torch.autograd.grad(f.tanh().sum(), w, create_graph=True)[0].sum()


def forward_mode(x, w):
    return torch.func.jvp(lambda x: F.linear(x, w).tanh(), (x,), (x,))[1]


def dual_numbers(x, w):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        f = F.linear(dual, w)
        return torch.autograd.forward_ad.unpack_dual(f).tangent + F.linear(x, w)


def attention(x, w):
    q = x.unsqueeze(1)
    d = x.shape[-1]
    return F.multi_head_attention_forward(
        q, q, q, d, 1, torch.cat([w, w, w])[: 3 * d], None, None, None, False, 0.0, w[:d, :d], None
    )[0]


def index_repeats(x, w):
    return F.linear(x, w[[0, 0, 1]])


def moved_index(x, w):
    index = torch.tensor(0)
    row = w[index]
    index += 1
    return x @ row


class Subclass(torch.Tensor):
    pass


@torch.overrides.wrap_torch_function(lambda w: (w,))
def view(w):
    """Has the name of a harmless method."""
    return torch.Tensor.detach(w).norm()


@torch.overrides.wrap_torch_function(lambda w: (w,))
def is_large(w):
    return (torch.Tensor.detach(w) > 0.0).double().mean()


def hook(x, w):
    if w.requires_grad:
        w.register_hook(lambda grad: 2 * grad)
    return F.linear(x, w)


def hook_of_node(x, w):
    if w.requires_grad:
        w.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    return F.linear(x, w)


def saved_elsewhere(x, w):
    with torch.autograd.graph.save_on_cpu():
        return F.linear(x, w).tanh()


def autocast(x, w):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return F.linear(x.float(), w.float()).double()


def sum_in(transform):
    """A use by the argument of a function transform, of which no gradient is left."""
    return lambda x, w: F.linear(x, w) * transform(lambda u: u.exp().sum())(w).detach().norm()


# Each is linear or not in the end, but its elements have a second use, or a hidden one.
USES = {
    "parallel": (lambda x, w: F.linear(x, w) * F.linear(x.roll(1, 0), w), "used twice"),
    "sum_of_two": (lambda x, w: F.linear(x, w) + F.linear(x.tanh(), w), "used twice"),
    "composed": (lambda x, w: F.linear(F.linear(x, w).tanh(), w), "used twice", (6, 6)),
    "siamese": (lambda x, w: (x @ w.T - x.roll(1, 0) @ w.T).square(), "used twice"),
    "own_norm": (lambda x, w: F.linear(x, w) * w.norm(), r"non-linear use \(norm\)"),
    "norm_first": (lambda x, w: w.norm() * F.linear(x, w), r"non-linear use \(norm\)"),
    "detached": (lambda x, w: F.linear(x, w) * w.detach().norm(), r"non-linear use \(detach\)"),
    "data": (lambda x, w: F.linear(x, w) * w.data.norm(), r"non-linear use \(data\)"),
    "item": (lambda x, w: F.linear(x, w) * sum(v.item() for v in w.view(-1)), r"non-linear use \(item\)"),
    "tolist": (lambda x, w: F.linear(x, w) * w.tolist()[0][0], r"non-linear use \(tolist\)"),
    "numpy": (lambda x, w: F.linear(x, w) * float(w.detach().cpu().numpy()[0, 0]), "detach"),
    "no_grad": (no_grad_use, "used without gradient"),
    "scripted": (lambda x, w: scripted(x, w), "not seen"),
    "scripted_too": (lambda x, w: F.linear(x, w) + scripted(x, w), "not seen"),
    "own_function": (lambda x, w: F.linear(x, Double.apply(w)), ""),
    "own_function_too": (lambda x, w: F.linear(x, w) + F.linear(x, Double.apply(w)), "not seen"),
    "edited": (edited, r"non-linear use \(add_\)"),
    "edited_view": (edited_view, r"non-linear use \(mul\)"),
    "edited_later": (edited_later, r"non-linear use \(mul_\)"),
    "edited_data": (edited_data, r"non-linear use \(data\)"),
    "edited_part": (edited_part, r"non-linear use \(data\)"),
    "input_gradient": (input_gradient, "torch.autograd inside of the model"),
    "gradient_of_weights": (gradient_of_weights, r"non-linear use \(grad\)"),
    "forward_mode": (forward_mode, "function transform"),
    "dual_numbers": (dual_numbers, "function transform"),
    "vmap": (lambda x, w: torch.func.vmap(lambda r: w @ r)(x).tanh(), "function transform"),
    "vmap_over": (lambda x, w: torch.func.vmap(lambda r: x @ r)(w).tanh(), "function transform"),
    "checkpoint": (lambda x, w: checkpoint(lambda w: F.linear(x, w).tanh(), w, use_reentrant=False), "checkpoint"),
    "reentrant": (lambda x, w: checkpoint(lambda w: F.linear(x, w).tanh(), w, use_reentrant=True), "without gradient"),
    "attention": (attention, "", (6, 6)),
    "repeats": (index_repeats, "shows an element more than once"),
    "expanded": (lambda x, w: x @ w[:1].expand(4, 6).mT, "shows an element more than once"),
    "clone_add": (lambda x, w: F.linear(x, w.clone().add_(1.0)), r"non-linear use \(add_\)"),
    "multiple": (lambda x, w: F.linear(x, w * 2.0), r"non-linear use \(mul\)"),
    "plus_0": (lambda x, w: F.linear(x, w + 0), r"non-linear use \(add\)"),
    "cat": (lambda x, w: F.linear(x, torch.cat([w, w])), r"non-linear use \(cat\)"),
    "stack": (lambda x, w: torch.einsum("bi,soi->bso", x, torch.stack([w, w])), r"non-linear use \(stack\)"),
    "sum": (lambda x, w: x.sum(-1) * w.sum(), r"non-linear use \(sum\)"),
    "embedding": (lambda x, w: F.embedding(torch.tensor([0, 1, 0]), w).tanh(), r"non-linear use \(embedding\)"),
    "gram": (lambda x, w: w @ w.mT, "product of Gaussian values"),
    "one_hot": (lambda x, w: x @ torch.diag_embed(w[0]), "diag_embed"),
    "float32": (lambda x, w: F.linear(x.float(), w.float()).double(), r"non-linear use \(float\)"),
    "half": (lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)).double(), r"\(to\)"),
    "parameter": (lambda x, w: F.linear(x, w) * torch.nn.Parameter(w).norm(), r"non-linear use \(norm\)"),
    "subclass": (lambda x, w: F.linear(x, w.as_subclass(Subclass)).as_subclass(torch.Tensor), r"\(linear\)"),
    "constructor": (lambda x, w: F.linear(x, w) * torch.Tensor(w).detach().norm(), r"\(detach\)"),
    "dlpack": (lambda x, w: F.linear(x, w) * from_dlpack(to_dlpack(w.detach())).norm(), r"\(detach\)"),
    "of_a_library": (lambda x, w: F.linear(x, w) * view(w), r"non-linear use \(view\)"),
    "of_a_library_too": (lambda x, w: F.linear(x, w) * is_large(w), r"non-linear use \(is_large\)"),
    "vmap_without_gradient": (sum_in(torch.func.vmap), r"non-linear use \(exp\)"),
    "grad_without_gradient": (sum_in(torch.func.grad), r"non-linear use \(requires_grad_\)"),
    "grad_of_closure": (lambda x, w: torch.func.grad(lambda x: F.linear(x, w).tanh().sum())(x), "transform"),
    "hook": (hook, r"non-linear use \(register_hook\)"),
    "hook_of_node": (hook_of_node, r"non-linear use \(grad_fn\)"),
    "saved_elsewhere": (saved_elsewhere, "checkpoint"),
    "autocast": (autocast, r"non-linear use \(float\)"),
    "deepcopy": (lambda x, w: F.linear(x, w) * copy.deepcopy(w.detach()).norm(), r"\(detach\)"),
    "pickle": (lambda x, w: F.linear(x, w) * pickle.loads(pickle.dumps(w.detach())).norm(), r"\(detach\)"),
    "sparse": (lambda x, w: (x.to_sparse() @ w.mT).tanh(), "sparse"),
}


# PyTorch's own warnings, some of them at the first use only.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", USES)
def test_use_is_plain_from_the_first_step_on(name):
    use, reason, *shape = USES[name]
    case = weights(use, *shape)
    for seed in range(4):
        elbo = R2G2_ELBO()
        expected = evaluate(spent(case), case, seed=seed)
        assert_same(evaluate(elbo, case, seed=seed), expected)
        assert treatments(elbo) == {"w": "plain"}
        assert re.search(reason, reasons(elbo)["w"])
        # What is known now takes one run, with the same result.
        assert_same(evaluate(elbo, case, seed=seed), expected)


def test_use_without_gradient_for_a_metric():
    """What is printed or logged may be in the loss, by detach(), for all that is known."""

    def use(x, w):
        f = F.linear(x, w)
        with torch.no_grad():
            f.square().mean().item(), (w.shape, w.dtype, repr(w))
        return f.tanh()

    case, elbo = weights(use), R2G2_ELBO()
    evaluate(elbo, case)
    assert treatments(elbo) == {"w": "projected"}  # the results are no values of the site


@pytest.mark.parametrize("local", ["shared", "local"])
def test_autocast(local):
    """The decoder keeps its gradient: autocast remembers the first cast of a parameter."""
    torch.set_default_dtype(torch.float32)

    def use(x, w):
        decoder = pyro.param("decoder", lambda: torch.linspace(-1.0, 1.0, 30).reshape(5, 6))
        with torch.autocast(w.device.type, dtype=torch.bfloat16):
            return F.linear(w, decoder).float().tanh()

    case = weights(use)
    elbo = R2G2_ELBO(pre_activations=local)
    expected = evaluate(spent(case), case, seed=0)
    assert_same(evaluate(elbo, case, seed=0), expected)
    assert expected[1]["decoder"].abs().max() > 0.1
    assert reasons(elbo) == {"w": "linear with a result of torch.bfloat16"}


def test_checkpoint_of_what_follows():
    case = weights(lambda x, w: checkpoint(lambda f: f.tanh().exp(), F.linear(x, w), use_reentrant=False))
    other = weights(lambda x, w: F.linear(x, w).tanh().exp())
    elbo = R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(R2G2_ELBO(), other, seed=0))
    assert treatments(elbo) == {"w": "projected"}


def test_asking_whether_an_element_is_zero_is_a_use():
    case, elbo = weights(lambda x, w: F.linear(x, w) * (2.0 if w[0, 0].is_nonzero() else 1.0)), R2G2_ELBO()
    evaluate(elbo, case)
    assert treatments(elbo) == {"w": "projected (96 %)"}
    assert reasons(elbo)["w"].endswith("non-linear use (is_nonzero)")
