# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops.row_separation import find_dims, find_separable, keeps_rows

ROWS, UNITS = 6, 4
GRAPH = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]).repeat(2, 1)


def f(eps):
    return eps.tanh().sum(-1)


#: Terms of noise, in which rows have no effect on one another.
APART = {
    "rows": lambda eps: [f(eps)],
    "units": lambda eps: [eps.log_softmax(-1)],
    "left": lambda eps: [f(eps).expand(3, ROWS)],
    "right": lambda eps: [f(eps).unsqueeze(-1) * torch.arange(3.0)],
    "square": lambda eps: [f(eps).unsqueeze(-1) * torch.ones(ROWS, ROWS)],
    "two": lambda eps: [f(eps), 2.0 * eps.exp().sum(-1)],
    "others": lambda eps: [f(eps), torch.zeros(()), torch.ones(3, requires_grad=True)],
    "unused": lambda eps: [torch.ones(ROWS, requires_grad=True)],
    "masked": lambda eps: [torch.where(torch.arange(ROWS) > 2, f(eps), -torch.inf)],
}
#: And in which they have one.
COUPLED = {
    "mean": lambda eps: [f(eps - eps.mean(0))],
    "softmax": lambda eps: [f(eps).log_softmax(0)],
    "contrast": lambda eps: [(eps @ eps.mT).log_softmax(-1).diagonal()],
    "sum": lambda eps: [f(eps).sum()],
    "pairs": lambda eps: [f(eps).reshape(ROWS // 2, 2).prod(-1)],
    "one_pair": lambda eps: [f(eps) + torch.eye(ROWS)[0] * f(eps)[1]],
    "next": lambda eps: [f(eps) + f(eps).roll(1) ** 2],
    "graph": lambda eps: [GRAPH.to(eps) @ f(eps)],
    "order": lambda eps: [f(eps).flip(0)],
    "factor": lambda eps: [f(eps), f(eps).sum() ** 2],
    "other_plate": lambda eps: [f(eps), f(eps)[:3]],
    "other_dim": lambda eps: [f(eps), f(eps).unsqueeze(-1).expand(ROWS, 2)],
    "weak": lambda eps: [f(eps) * (1.0 + 1e-3 * f(eps).mean())],
    "cancelling": lambda eps: [f(eps) - f(eps).mean()],
}
#: Without a derivative that would show it.
HIDDEN = {
    "detached": lambda eps: [f(eps) * f(eps).detach().exp().mean()],
    "number": lambda eps: [f(eps) - f(eps).median().item()],
    "maximum": lambda eps: [f(eps) + (torch.arange(ROWS) == f(eps).argmax())],
}


def gaussian(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(ROWS, UNITS, generator=generator, dtype=dtype, device="cpu")
    return eps.to(torch.empty(0).device).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*APART, *COUPLED])
def test_derivatives(name, dtype):
    make = APART.get(name, COUPLED.get(name))
    for seed in range(5):
        eps = gaussian(seed, dtype)
        assert find_separable(make(eps), [eps]) == [name in APART]


def halves(seed):
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed), device="cpu")
    order = order.to(torch.empty(0).device)
    return order < ROWS // 2, order >= ROWS // 2


@pytest.mark.parametrize("name", [*APART, *COUPLED, *HIDDEN])
def test_changes(name):
    """Each half of the rows in turn, by several ways to halve them, so that all pairs are parted."""
    make = {**APART, **COUPLED, **HIDDEN}[name]
    found = []
    for seed in range(6):
        eps = gaussian(seed, torch.float32).detach()
        for half in halves(seed):
            other = torch.where(half.unsqueeze(-1), 0.5 - eps, eps)
            found.append(keeps_rows(make(eps), make(other), half))
    assert all(found) == (name in APART)


def test_each_layer_has_its_own_answer():
    first, second = (gaussian(seed, torch.float32) for seed in range(2))
    hidden = first - first.mean(0)
    assert find_separable([f(hidden) * f(second)], [first, second]) == [False, True]


def test_layers_of_other_numbers_of_rows():
    eps = gaussian(0, torch.float32)
    few = torch.randn(3, UNITS, requires_grad=True)
    assert find_separable([f(eps), f(few)], [eps, few]) == [True, True]
    assert find_separable([f(eps) + f(few).sum()], [eps, few]) == [True, False]


def test_one_row_has_no_other():
    eps = torch.randn(1, UNITS, requires_grad=True)
    assert find_separable([f(eps).sum()], [eps]) == [True]


def test_no_terms():
    assert find_separable([], [gaussian(0, torch.float32)]) == [True]
    assert find_separable([torch.zeros(())], [gaussian(0, torch.float32)]) == [True]


def test_numbers_that_are_not_finite_show_nothing():
    eps = gaussian(0, torch.float32)
    assert find_separable([f(eps) * torch.nan], [eps]) == [False]


def test_dims():
    assert find_dims([torch.zeros(3, 5), torch.zeros(5, 3)], 3) == [-1, -2]
    assert find_dims([torch.zeros(()), torch.zeros(4)], 3) == []


def test_other_shapes_are_no_same_terms():
    half = halves(0)[0]
    assert not keeps_rows([torch.zeros(ROWS)], [torch.zeros(ROWS, 1)], half)
    assert not keeps_rows([torch.zeros(ROWS)], [], half)
