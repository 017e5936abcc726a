# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_rb.ops import projection, projection_of_map
from pyro_rb.ops.projection import choose_solver, find_means, pays
from pyro_rb.ops.projection_of_map import find_means_of_map

SOLVERS = ("cholesky", "cg", "qr")


def project_rows(*args):
    return find_means(*args)[0]


def dense(rows, scale, eps):
    a = (rows.unsqueeze(-3) * scale.unsqueeze(-2)).double()
    return (torch.linalg.pinv(a) @ (a @ eps.double().unsqueeze(-1))).squeeze(-1), a


def system(m=5, k=12, units=4, batch=(), dtype=torch.float64):
    rows = torch.randn(*batch, m, k, dtype=dtype)
    scale = (0.5 * torch.randn(*batch, units, k, dtype=dtype)).exp()
    return rows, scale, torch.randn(*batch, units, k, dtype=dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_rows_against_pinv(solver, batch, dtype, tolerance):
    rows, scale, eps = system(batch=batch, dtype=dtype)
    found = project_rows(rows, scale, eps, solver)
    expected, a = dense(rows, scale, eps)
    assert found.dtype == dtype and found.shape == eps.shape
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    # The result is kept, and projecting again changes nothing.
    kept = (a @ found.double().unsqueeze(-1), a @ eps.double().unsqueeze(-1))
    torch.testing.assert_close(*kept, atol=10 * tolerance, rtol=10 * tolerance)
    again = project_rows(rows, scale, found, solver)
    torch.testing.assert_close(again, found, atol=tolerance, rtol=tolerance)
    assert (found.norm(dim=-1) <= eps.norm(dim=-1) * (1 + tolerance)).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_projection_is_symmetric(solver):
    rows, scale, _ = system(units=1)
    eye = torch.eye(12, dtype=torch.float64)
    p = torch.cat([project_rows(rows, scale, e[None], solver) for e in eye])
    torch.testing.assert_close(p, p.mT, atol=1e-8, rtol=0)
    assert abs(p.trace().item() - 5) < 1e-7


@pytest.mark.parametrize("solver", ["cholesky", "qr"])
@pytest.mark.parametrize("closeness", [1.0, 3e-3, 0.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_mean_squares_are_those_of_the_result(solver, closeness, dtype, tolerance):
    """Also where two rows are so close that the difference is projected in part."""
    rows, scale, eps = system(dtype=dtype)
    rows[1] = rows[0] + closeness * rows[1]
    mean, square = find_means(rows, scale, eps, solver, with_squares=True)
    assert torch.equal(mean, project_rows(rows, scale, eps, solver))
    columns = [project_rows(rows, scale, e.expand_as(eps), solver) for e in torch.eye(12, dtype=dtype)]
    expected = torch.stack(columns).square().sum(0)
    torch.testing.assert_close(square, expected, atol=tolerance, rtol=0)


def test_mean_squares_in_small_chunks_and_of_maps(monkeypatch):
    rows, scale, eps = system(units=3)
    expected = find_means(rows, scale, eps, with_squares=True)
    monkeypatch.setattr(projection, "_CHUNK", rows.numel())
    torch.testing.assert_close(find_means(rows, scale, eps, with_squares=True), expected)
    for i in range(3):
        found = find_means_of_map(lambda e: rows @ (scale[i] * e), eps[i], with_squares=True)
        torch.testing.assert_close(found, tuple(x[i] for x in expected))


def test_conjugate_gradients_find_no_mean_squares():
    assert find_means(*system(), "cg", with_squares=True)[1] is None
    assert find_means(*system(), "cholesky")[1] is None


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-2)])
def test_singular_rows(solver, dtype, tolerance):
    """Rows twice, of zeros, and of all sizes give what the different ones give."""
    rows, scale, eps = system(m=3, dtype=dtype)
    expected, _ = dense(rows, scale, eps)
    zero = torch.zeros_like(rows[:1])
    for worse in (
        torch.cat([rows, rows, zero]),
        torch.cat([zero, rows * 1e-6, rows[1:] * 1e4]),
        torch.cat([rows, rows[:1] + rows[1:2]]),
    ):
        found = project_rows(worse, scale, eps, solver)
        assert found.isfinite().all()
        if solver != "qr":  # which may condition on more
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
        a = (rows * scale[:, None]).double()
        assert (a @ (found.double() - eps)[..., None]).abs().max() < 10 * tolerance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_scales_of_all_sizes(solver, size):
    rows, scale, eps = system(dtype=torch.float32)
    scale[0] *= size
    scale[1] = 0.0
    scale[2, ::2] = 0.0
    found = project_rows(rows, scale, eps, solver)
    assert found.isfinite().all()
    expected, a = dense(rows, scale, eps)
    torch.testing.assert_close(found[0].double(), expected[0], atol=1e-3, rtol=1e-3)
    assert not (scale[1] * found[1]).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_rows_and_rows_of_zeros(solver):
    _, scale, eps = system()
    for m in (0, 2):
        found = project_rows(torch.zeros(m, 12, dtype=torch.float64), scale, eps, solver)
        assert found.isfinite().all()
        if solver != "qr":
            assert not found.any()


def test_jitter_costs_what_the_comment_says(monkeypatch):
    """Two passes miss a direction by ``(j / (sigma^2 + j))^2``."""
    j = 1e-2
    monkeypatch.setattr(projection, "jitter", lambda dtype: j)
    rows = torch.eye(3, 6, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.1])[:, None]
    eps = torch.ones(1, 6, dtype=torch.float64)
    solve = projection._solve_cholesky
    found = solve(rows, torch.ones_like(eps), eps, False)[0][0, :3]
    square = rows.diagonal() ** 2
    mean = square.mean() * j
    torch.testing.assert_close(1 - found, (mean / (square + mean)) ** 2)


def test_small_chunks(monkeypatch):
    rows, scale, eps = system(units=7)
    expected = project_rows(rows, scale, eps)
    monkeypatch.setattr(projection, "_CHUNK", 2 * rows.numel())
    torch.testing.assert_close(project_rows(rows, scale, eps), expected)


def test_fallbacks(monkeypatch):
    rows, scale, eps = system()
    expected, _ = dense(rows, scale, eps)
    called = []
    inner = projection._solve_cg
    monkeypatch.setattr(projection, "_solve_cg", lambda *a: called.append(inner(*a, max_steps=1)))
    torch.testing.assert_close(project_rows(rows, scale, eps, "cg"), expected)
    assert called == [None]  # one step is not enough: Cholesky takes over

    def fails(x):
        return x, torch.ones(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    for solver in ("cholesky", "cg"):
        torch.testing.assert_close(project_rows(rows, scale, eps, solver), expected)


@pytest.mark.parametrize("limit", [0, 2**18])
@pytest.mark.parametrize("solver", ("auto",) + SOLVERS)
def test_map_against_pinv(solver, limit, monkeypatch):
    a = torch.randn(2, 3, 20, dtype=torch.float64)
    eps = torch.randn(20, dtype=torch.float64)
    found = find_means_of_map(lambda e: a @ e, eps, solver)[0]
    flat = a.reshape(6, 20)
    torch.testing.assert_close(found, torch.linalg.pinv(flat) @ (flat @ eps), atol=1e-8, rtol=0)


def test_map_that_is_zero():
    eps = torch.randn(4)
    for solver in ("auto", "cg"):
        assert not find_means_of_map(lambda e: (0 * e)[:2], eps, solver)[0].any()


def test_map_that_does_not_converge(monkeypatch):
    scales = torch.logspace(0, 6, 40, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q[:40]
    eps = torch.randn(60, dtype=torch.float64)
    inner = projection_of_map._solve_normal_equations
    monkeypatch.setattr(projection_of_map, "_solve_normal_equations", lambda *a: inner(*a, max_steps=5))
    found, _ = find_means_of_map(lambda e: scales * (rotation @ e), eps, "cg")
    torch.testing.assert_close(found, rotation.mT @ (rotation @ eps), atol=1e-5, rtol=0)
    monkeypatch.setattr(projection_of_map, "_MAX_DENSE", 10)
    assert find_means_of_map(lambda e: scales * (rotation @ e), eps, "cg") is None


def test_rules():
    assert choose_solver("qr", 1, 2, 3) == "qr"
    assert choose_solver("auto", 1, 10**6, 10**3) == "cholesky"
    assert choose_solver("auto", 64, 512, 512) == "cg"
    assert pays(3, 6, 10) and not pays(4, 6, 10)
    assert pays(16, 785, 400) and not pays(200, 785, 400)
