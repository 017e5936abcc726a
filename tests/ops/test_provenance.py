# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
import warnings

import numpy as np
import pytest
import torch

from pyro_rb.ops.provenance import Provenance

ONES = torch.ones(3)
TABLE = torch.randn(3, 3)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * z

    @staticmethod
    def backward(ctx, grad):
        return grad


def filled(z):
    buffer = torch.zeros(4)
    buffer[1:] = z
    return buffer


def scripted(z):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(double)(z)


def double(z):
    return 2.0 * z


FOLLOWED = {
    "arithmetic": lambda z: (1.0 - z) ** 2 / 3.0,
    "view": lambda z: z.view(3, 1)[1:],
    "detach": lambda z: z.detach(),
    "iteration": lambda z: list(z)[1],
    "list": lambda z: torch.cat([ONES, z]),
    "keyword": lambda z: torch.where(ONES > 0, input=z, other=ONES),
    "index": lambda z: TABLE[z.long()],
    "mask": lambda z: ONES[z > 1],
    "in place": lambda z: torch.ones(3).mul_(z),
    "augmented": lambda z: torch.ones(3).__iadd__(z),
    "out": lambda z: torch.add(z, 1.0, out=torch.empty(3)),
    "setitem": filled,
    "view of a buffer": lambda z: filled(z)[:1],
    "einsum": lambda z: torch.einsum("i,ij->j", z, TABLE),
    "network": lambda z: torch.nn.LSTM(3, 2)(z.unsqueeze(0))[0],
    "embedding": lambda z: torch.nn.Embedding(3, 2)(z.long()),
    "one-hot": lambda z: torch.nn.functional.one_hot(z.long(), 3),
    "draw": lambda z: torch.bernoulli(z / 2.0),
    "several": lambda z: z.cummax(0)[1],
    "vmap": lambda z: torch.vmap(torch.sin)(z),
    "derivative": lambda z: torch.func.grad(lambda x: (x**3).sum())(z),
    "function": Square.apply,
    "script": scripted,
    "checkpoint": lambda z: torch.utils.checkpoint.checkpoint(double, z, use_reentrant=False),
    "copy": copy.deepcopy,
    "sparse": lambda z: torch.sparse.mm(z.unsqueeze(0).to_sparse(), TABLE),
    "item": lambda z: torch.tensor(z.sum().item()),
    "if": lambda z: torch.zeros(()) if z.sum() > 1 else torch.ones(()),
    "int": lambda z: TABLE[int(z[0])],
    "place": lambda z: TABLE[z.long()[0]],
    "numpy": lambda z: torch.as_tensor(np.sqrt(z.cpu().numpy())),
    "array": lambda z: torch.as_tensor(np.asarray(z.cpu()) + 1.0),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "range": lambda z: torch.arange(z.long().sum()),
    "equal": lambda z: torch.tensor(torch.equal(z, ONES)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    z = torch.tensor([0.0, 1.0, 2.0])
    with Provenance() as provenance:
        provenance.add(z, provenance.source("z"))
        other = ONES + 1.0
        x = FOLLOWED[name](z)
        # What was read counts for all that comes later.
        sources = provenance.sources(x) | provenance.read
    assert provenance.names(sources) == ["z"]
    assert provenance.sources(other, ONES, TABLE) == 0
    assert type(x) is torch.Tensor


IGNORED = {
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda z: z.new_zeros(2),
    "shape": lambda z: torch.ones(z.shape[0] + z.dim() + len(z)),
    "type": lambda z: torch.ones(2).double().to(z),
    "broadcast": lambda z: torch.broadcast_tensors(z, TABLE)[1],
    "validation": lambda z: torch.distributions.Poisson(z, validate_args=True) and ONES,
    "isnan": lambda z: ONES if torch.isnan(z).any() else 2.0 * ONES,
    "other": lambda z: ONES.clone(),
}


@pytest.mark.parametrize("name", IGNORED)
def test_ignored(name):
    z = torch.tensor([0.0, 1.0, 2.0])
    with Provenance() as provenance:
        provenance.add(z, provenance.source("z"))
        x = IGNORED[name](z)
    assert provenance.sources(x) == provenance.read == 0 and not provenance.has_read


def test_assert_is_no_use():
    z = torch.ones(3)
    with Provenance() as provenance:
        provenance.add(z, provenance.source("z"))
        assert (z > 0).all()
    assert provenance.read == 0
    with provenance:
        if (z > 0).all():
            pass
    assert provenance.names(provenance.read) == ["z"] and provenance.has_read


REDUCED = {
    "sum": lambda z: z.sum(),
    "mean": torch.mean,
    "centred": lambda z: z - z.mean(),
    "norm": lambda z: z / z.norm(),
    "max": lambda z: z.max() + z,
}
KEPT = {
    "sum": lambda z: z.sum(-1),
    "mean": lambda z: torch.mean(z, dim=(-1,)),
    "centred": lambda z: z - z.mean(-1, keepdim=True),
    "norm": lambda z: z.norm(dim=-1),
    "max": lambda z: torch.max(z, ONES),
    "softmax": lambda z: z.softmax(-1),
}


@pytest.mark.parametrize("name", REDUCED)
def test_sums_over_all_dims(name):
    z, w = torch.rand(2, 3), torch.rand(2, 3)
    with Provenance() as provenance:
        provenance.add(w, provenance.source("w"))
        provenance.add(z, provenance.source("z"))
        reduced, kept = REDUCED[name](z) + w[0, 0], KEPT[name](z)
    assert provenance.reduced(provenance.sources(reduced)) == provenance.source("z")
    assert provenance.reduced(provenance.sources(kept)) == 0
    assert provenance.names(provenance.sources(reduced)) == ["w", "z"]


def test_memory_is_neither_kept_nor_mistaken():
    z = torch.ones(1000)
    with Provenance() as provenance:
        provenance.add(z, provenance.source("z"))
        for _ in range(100):
            # Its memory is given back, and taken by a tensor that does not depend on z.
            used = z + 1.0
            place = used.data_ptr()
            del used
            fresh = torch.zeros(1000)
            assert provenance.sources(fresh) == 0
    assert place


def test_functions_are_as_before_outside():
    z = torch.ones(3)
    with Provenance() as provenance:
        provenance.add(z, provenance.source("z"))
    assert provenance.sources(z + 1.0) == 0 and provenance.sources(z)
