# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pytest
import torch

from pyro_rb.ops import control_variate
from pyro_rb.ops.control_variate import AdaptiveScale, ControlVariate


def draws(num_draws, size=3, slope=-0.4, noise=0.3, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    s = torch.randn(num_draws, size, generator=generator, dtype=torch.double)
    e = torch.randn(num_draws, size, generator=generator, dtype=torch.double)
    intercept = torch.tensor([5.0, -300.0, 0.0], dtype=torch.double)[:size]
    return intercept + slope * s + noise * e, s


def feed(variate, h, s):
    for h_t, s_t in zip(h, s):
        variate.update(h_t, s_t)
    return variate


def brute_force_slope(h, s):
    """Weighted least squares of all coordinates on s, with one intercept each."""
    num_draws, size = h.shape
    ages = torch.arange(num_draws - 1, -1, -1, dtype=h.dtype)
    weights = control_variate.DISCOUNT**ages
    intercepts = torch.eye(size, dtype=h.dtype).repeat(num_draws, 1)
    design = torch.cat([intercepts, s.reshape(-1, 1)], 1)
    root = weights.sqrt().repeat_interleave(size)[:, None]
    solution = torch.linalg.lstsq(root * design, root * h.reshape(-1, 1)).solution
    return solution[-1].item()


@pytest.mark.parametrize("num_draws", [3, 10, 200])
def test_slope_is_that_of_discounted_least_squares(num_draws):
    h, s = draws(num_draws)
    variate = feed(ControlVariate(), h, s)
    assert variate._slopes[1] == pytest.approx(brute_force_slope(h, s), rel=1e-9)


def test_scale_is_zero_during_start_up():
    h, s = draws(10)
    variate = ControlVariate()
    scales = []
    for h_t, s_t in zip(h, s):
        scales.append(variate.scale)
        variate.update(h_t, s_t)
    assert scales[:3] == [0.0] * 3
    assert scales[3] != 0.0


@pytest.mark.parametrize("slope, scale", [(-1.0, 0.0), (0.0, 1.0)])
def test_fixed_scales_win_where_they_are_best(slope, scale):
    h, s = draws(100, slope=slope)
    assert feed(ControlVariate(), h, s).scale == scale


def test_scale_is_one_where_the_path_gradient_is_constant():
    _, s = draws(5)
    assert feed(ControlVariate(), torch.zeros_like(s), s).scale == 1.0


@pytest.mark.parametrize("slope, scale", [(-30.0, 0.0), (40.0, 10.0)])
def test_scale_is_kept_within_bounds(slope, scale):
    h, s = draws(100, slope=slope)
    assert feed(ControlVariate(), h, s).scale == scale


def test_a_wild_draw_does_not_set_the_scale():
    # Least squares over five draws follows the wild one. It was not the best of the
    # three at any draw that it had not seen.
    h, s = draws(5, slope=-1.0, noise=0.1)
    h[3] += 1e4 * s[3]
    variate = feed(ControlVariate(), h, s)
    assert variate._slopes[1] == control_variate.MAX_SCALE - 1
    assert variate.scale in (0.0, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_draws_that_are_not_finite_are_left_out(bad):
    h, s = draws(20)
    expected = feed(ControlVariate(), h, s).scale
    spoiled = feed(ControlVariate(), h[:10], s[:10])
    spoiled.update(torch.full_like(h[0], bad), s[0])
    assert feed(spoiled, h[10:], s[10:]).scale == expected


def test_float32_keeps_its_digits():
    # The intercept of -300 is 1000 times the noise.
    h, s = draws(300)
    exact = feed(ControlVariate(), h, s)
    rounded = feed(ControlVariate(), h.float(), s.float())
    assert rounded.scale == pytest.approx(exact.scale, rel=1e-4)


def test_updates_become_rare():
    variate = ControlVariate()
    h, s = draws(1)
    made = []
    for step in range(200):
        if variate.is_due():
            variate.update(h[0], s[0])
            made.append(step)
    assert made[:50] == list(range(50))
    assert set(torch.tensor(made[50:]).diff().tolist()) == {16}


def one_term():
    p = torch.zeros(3, requires_grad=True)
    return p, (2 * p).sum()


def test_adaptive_scale_keeps_what_it_learned_with_the_parameters():
    adaptive = AdaptiveScale()
    (p, term), (_, other) = one_term(), one_term()
    h, s = draws(20)
    for h_t, s_t in zip(h, s):
        adaptive.learn([p], [h_t], [s_t])
    assert adaptive.find(term, stop=set()).scale == feed(ControlVariate(), h, s).scale
    assert adaptive.find(other, stop=set()).scale == 0.0
    assert adaptive.find(torch.zeros(()), stop=set()) is None
    assert len(adaptive._variates) == 1
    del p, term
    assert len(adaptive._variates) == 0


def test_adaptive_scale_starts_afresh_when_parameters_begin_to_share():
    adaptive = AdaptiveScale()
    (p, p_term), (q, q_term) = one_term(), one_term()
    h, s = draws(20)
    for h_t, s_t in zip(h, s):
        adaptive.learn([p], [h_t], [s_t])
        adaptive.learn([q], [h_t], [s_t])
    adaptive.learn([p, q], [h[0], h[0]], [s[0], s[0]])
    assert adaptive.find(p_term, stop=set()).scale == 0.0
    assert adaptive.find(p_term, stop=set()) is adaptive.find(q_term, stop=set())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_an_adaptive_scale_start_afresh(duplicate):
    adaptive = AdaptiveScale()
    p, term = one_term()
    h, s = draws(20)
    for h_t, s_t in zip(h, s):
        adaptive.learn([p], [h_t], [s_t])
    assert duplicate(adaptive).find(term, stop=set()).scale == 0.0
