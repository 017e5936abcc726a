# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.nn import AutoRegressiveNN

from pyro_rb.ops import affine_autoregressive
from pyro_rb.ops import flow as ops
from pyro_rb.ops.flow import Layer, differentiate, find_obstacle


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def make_layer(transform, batch=(), dim=6):
    for p in transform.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(batch + (dim,))
    return Layer(transform, x, transform(x).detach())


def by_inverse(base, layer):
    y = layer.y.clone().requires_grad_()
    return torch.autograd.grad(dist.TransformedDistribution(base, [layer.transform]).log_prob(y).sum(), y)[0]


def base_of(batch=(), dim=6):
    return dist.Normal(torch.zeros(batch + (dim,)), 1.0).to_event(1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "make",
    [
        T.affine_autoregressive,
        lambda d: T.affine_autoregressive(d, stable=True),
        lambda d: T.AffineAutoregressive(AutoRegressiveNN(d, [8], skip_connections=True, nonlinearity=torch.nn.ELU())),
        lambda d: T.AffineAutoregressive(AutoRegressiveNN(d, [8, 7, 9], permutation=torch.arange(d))),
        T.spline_autoregressive,
        T.affine_coupling,
        T.spline,
    ],
)
def test_against_the_inverse(make, batch):
    layer = make_layer(make(6), batch)
    a, notes = differentiate(base_of(batch), [layer])
    assert len(notes) == ops.is_forward_only(layer.transform)
    torch.testing.assert_close(a, by_inverse(base_of(batch), layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("make", [T.affine_autoregressive, T.planar])
def test_structure_against_the_jacobian(make, batch):
    layer = make_layer(make(6), batch)
    b = torch.randn(batch + (6,))
    with torch.no_grad():
        a, note = ops._find_structure(layer.transform)(layer, b)
        expected, _ = ops._dense(layer, b)
    assert "Jacobian" not in note
    torch.testing.assert_close(a, expected, rtol=1e-10, atol=1e-10)


def test_iteration_is_the_substitution(monkeypatch):
    layer = make_layer(T.affine_autoregressive(6, hidden_dims=[8, 9]))
    expected, notes = differentiate(base_of(), [layer])
    assert notes == ["substitution"]
    monkeypatch.setattr(affine_autoregressive, "SMALL", 5)
    a, (note,) = differentiate(base_of(), [layer])
    assert 3 <= int(note.split()[0]) <= 6
    torch.testing.assert_close(a, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 20, 10_000])
def test_rows_in_chunks(monkeypatch, chunk):
    layer = make_layer(T.radial(6), (3,))
    expected, _ = differentiate(base_of((3,)), [layer])
    monkeypatch.setattr(ops, "_CHUNK", chunk)
    a, notes = differentiate(base_of((3,)), [layer])
    assert notes == ["a Jacobian of 6 rows"]
    torch.testing.assert_close(a, expected)


def test_networks_of_unknown_functions():
    network = AutoRegressiveNN(6, [8], nonlinearity=torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid()))
    layer = make_layer(T.AffineAutoregressive(network))
    a, notes = differentiate(base_of(), [layer])
    assert notes == ["a Jacobian of 6 rows"]
    torch.testing.assert_close(a, by_inverse(base_of(), layer), rtol=1e-9, atol=1e-9)


def test_a_batch_of_contexts():
    """One draw of the noise, as where the context is enumerated."""
    layer = T.conditional_radial(6, 2).condition(torch.randn(3, 2))
    x = torch.randn(6)
    single = Layer(layer, x, layer(x).detach())
    a, _ = differentiate(base_of(), [single])
    expected, _ = differentiate(base_of(), [single._replace(x=x.expand(3, 6))])
    torch.testing.assert_close(a, expected)


def test_limits():
    x = torch.zeros(129)
    assert "more than 128" in find_obstacle(Layer(T.radial(129), x, x))
    assert find_obstacle(Layer(T.planar(129), x, x)) is None
    assert find_obstacle(Layer(T.radial(128), x[1:], x[1:])) is None


def test_a_number_that_is_none():
    layer = make_layer(T.affine_autoregressive(70), dim=70)
    layer.x[0] = torch.nan
    a, notes = differentiate(base_of(dim=70), [layer])
    assert a.isnan().any() and notes == ["70 steps"]


def test_each_row_is_solved():
    """Rows of a batch end when the slowest does, by its own measure."""
    layer = make_layer(T.affine_autoregressive(6), (2,))
    layer.x[1] *= 1e-3
    b = torch.randn(2, 6) * torch.tensor([[1e12], [1.0]])
    with torch.no_grad():
        a, _ = ops._affine_autoregressive(layer, b)
        expected, _ = ops._dense(layer, b)
    torch.testing.assert_close(a, expected, rtol=1e-9, atol=1e-9)
