# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pytest
import torch

from pyro_rb.ops import control_variate
from pyro_rb.ops.control_variate import AdaptiveScale, ControlVariate, Moments


def draws(num_draws, size=3, slope=-0.4, noise=0.3, seed=0):
    same = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.double, "device": "cpu"}
    s, e = (torch.randn(num_draws, size, **same).to(torch.empty(0).device) for _ in range(2))
    intercept = torch.tensor([5.0, -300.0, 0.0], dtype=torch.double)[:size]
    return intercept + slope * s + noise * e, s


def new_variate(*sizes):
    return ControlVariate([Moments([size]) for size in sizes or (3,)])


def feed(variate, h, s):
    """Each parameter has its share of the columns of ``h`` and ``s``."""
    sizes = [m.shape[0] for m in variate._moments]
    for h_t, s_t in zip(h, s):
        variate.update(h_t.split(sizes), s_t.split(sizes))
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


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("num_draws", [3, 10, 200])
def test_slope_is_that_of_discounted_least_squares(num_draws, sizes):
    h, s = draws(num_draws)
    variate = feed(new_variate(*sizes), h, s)
    assert variate.slope == pytest.approx(brute_force_slope(h, s), rel=1e-9)


def test_scale_is_zero_during_start_up():
    h, s = draws(10)
    variate = new_variate()
    scales = []
    for h_t, s_t in zip(h, s):
        scales.append(variate.scale)
        variate.update([h_t], [s_t])
    assert scales[:3] == [0.0] * 3
    assert scales[3] != 0.0


@pytest.mark.parametrize("slope, scale", [(-1.0, 0.0), (0.0, 1.0)])
def test_fixed_scales_win_where_they_are_best(slope, scale):
    h, s = draws(100, slope=slope)
    assert feed(new_variate(), h, s).scale == scale


def test_scale_is_one_where_the_path_gradient_is_constant():
    _, s = draws(5)
    assert feed(new_variate(), torch.zeros_like(s), s).scale == 1.0


@pytest.mark.parametrize("slope, scale", [(-30.0, 0.0), (40.0, 10.0)])
def test_scale_is_kept_within_bounds(slope, scale):
    h, s = draws(100, slope=slope)
    assert feed(new_variate(), h, s).scale == scale


def test_a_wild_draw_does_not_set_the_scale():
    # Least squares over five draws follows the wild one. It was not the best of the
    # three at any draw that it had not seen.
    h, s = draws(5, slope=-1.0, noise=0.1)
    h[3] += 1e4 * s[3]
    variate = feed(new_variate(), h, s)
    assert variate.slope == control_variate.MAX_SCALE - 1
    assert variate.scale in (0.0, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_draws_that_are_not_finite_are_left_out(bad):
    h, s = draws(20)
    expected = feed(new_variate(), h, s).scale
    spoiled = feed(new_variate(), h[:10], s[:10])
    spoiled.update([torch.full_like(h[0], bad)], [s[0]])
    assert feed(spoiled, h[10:], s[10:]).scale == expected


def test_float32_keeps_its_digits():
    # The intercept of -300 is 1000 times the noise.
    h, s = draws(300)
    exact = feed(new_variate(), h, s)
    rounded = feed(new_variate(), h.float(), s.float())
    assert rounded.scale == pytest.approx(exact.scale, rel=1e-4)


def test_updates_become_rare():
    adaptive, p = AdaptiveScale(), torch.zeros(3, requires_grad=True)
    h, s = draws(1)
    made = []
    for step in range(200):
        if adaptive.find([p]).is_due():
            adaptive.find([p]).update(h, s)
            made.append(step)
    assert made[:50] == list(range(50))
    assert set(torch.tensor(made[50:]).diff().tolist()) == {16}


def test_updates_can_be_postponed():
    adaptive, p = AdaptiveScale(), torch.zeros(3, requires_grad=True)
    assert adaptive.find([p]).is_due()
    adaptive.postpone([p])
    due = [adaptive.find([p]).is_due() for _ in range(17)]
    assert due == [False] * 15 + [True] * 2


def test_moments_are_added_up_by_those_that_take_part():
    h, s = draws(200)
    both, alone = new_variate(2, 1), new_variate(2)
    feed(both, h[:100], s[:100])
    feed(alone, h[:100, :2], s[:100, :2])
    # One parameter is frozen: the other goes on as if it had been alone all the time.
    rest = feed(ControlVariate(both._moments[:1]), h[100:, :2], s[100:, :2])
    assert rest.slope == pytest.approx(feed(alone, h[100:, :2], s[100:, :2]).slope, rel=1e-12)
    # It comes back: what it had learned still counts.
    assert both.slope == pytest.approx(brute_force_slope(h, s), abs=0.05)


def test_a_new_parameter_takes_over_what_was_learned():
    old, new = Moments([3]), Moments([1])
    h, s = draws(60)
    scale = feed(ControlVariate([old]), h, s).scale
    assert scale > 0.0
    assert ControlVariate([old, new]).scale == scale
    # It does not make the others begin anew.
    variate = ControlVariate([old, new])
    assert [variate.is_due() for _ in range(17)] == [False] * 15 + [True] * 2
    variate.update([h[0], h[0, :1]], [s[0], s[0, :1]])
    assert (old.updates, new.updates) == (61, 1) and not variate.is_due()


@pytest.mark.parametrize("index", [[0, 2], [1, 1, 3]])
def test_sparse_gradients(index):
    h, s = draws(100, slope=-0.4, noise=0.1)
    h, s = (x - x.mean(0) for x in (h, s))
    size = (5, 3)

    def sparse(x):
        values = x.expand(len(index), 3)
        return torch.sparse_coo_tensor([index], values, size, check_invariants=True)

    variate = ControlVariate([Moments(size)])
    for h_t, s_t in zip(h, s):
        variate.update([sparse(h_t)], [sparse(s_t)])
    # About zero, the mean of the score, and not about means that would be dense.
    weights = control_variate.DISCOUNT ** torch.arange(99, -1, -1).to(h)
    expected = ((h * s).sum(1) @ weights) / (s.square().sum(1) @ weights)
    assert variate.slope == pytest.approx(expected.item(), rel=1e-9)
    assert variate._moments[0]._mean_h.numel() == 1


def test_complex_gradients():
    h, s = draws(100, size=2)
    expected = feed(new_variate(2), h, s).slope
    variate = ControlVariate([Moments([1])])
    for h_t, s_t in zip(torch.view_as_complex(h), torch.view_as_complex(s)):
        variate.update([h_t], [s_t])
    assert variate.slope == pytest.approx(expected, rel=1e-9)


def test_another_dtype_goes_on():
    h, s = draws(100)
    expected = feed(new_variate(), h, s)
    variate = feed(feed(new_variate(), h[:50].float(), s[:50].float()), h[50:], s[50:])
    assert variate.slope == pytest.approx(expected.slope, rel=1e-4)
    assert variate._moments[0]._mean_h.dtype == torch.double


def learned(p, num_draws=20):
    adaptive = AdaptiveScale()
    for h_t, s_t in zip(*draws(num_draws)):
        adaptive.find([p]).update([h_t], [s_t])
    return adaptive


def test_adaptive_scale_keeps_what_it_learned_with_the_parameters():
    p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
    adaptive = learned(p)
    assert adaptive.find([p]).scale == feed(new_variate(), *draws(20)).scale > 0.0
    assert adaptive.find([q]).scale == 0.0
    assert len(adaptive._variates) == 2
    del p, q
    assert len(adaptive._variates) == 0


def test_adaptive_scale_of_another_shape_starts_afresh():
    p = torch.zeros(3, requires_grad=True)
    adaptive = learned(p)
    p.data = torch.zeros(2, 3)
    assert adaptive.find([p]).scale == 0.0


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_an_adaptive_scale_know_parameters_by_name(duplicate):
    p, twin, other = (torch.zeros(3, requires_grad=True) for _ in range(3))
    names = {id(p): "p", id(twin): "p", id(other): "other"}

    def name_of(parameter):
        return names[id(parameter)]

    adaptive = AdaptiveScale()
    adaptive.moments(p, name_of)
    for h_t, s_t in zip(*draws(20)):
        adaptive.find([p]).update([h_t], [s_t])
    copied = duplicate(duplicate(adaptive))
    assert copied.moments(other, name_of).updates == 0
    assert vars(copied.moments(twin, name_of)).keys() == vars(adaptive.moments(p)).keys()
    assert copied.find([twin]).scale == adaptive.find([p]).scale > 0.0
    assert copied.moments(p, name_of).updates == 0  # it has gone to the first of that name


def test_the_last_of_several_tensors_with_one_name_is_loaded():
    """As when the value of a parameter is replaced, where Pyro keeps the old tensor."""
    adaptive, tensors = AdaptiveScale(), [torch.zeros(3, requires_grad=True) for _ in range(3)]
    for number, p in enumerate(tensors[:2]):
        adaptive.moments(p, lambda p: "p").updates = 5 + number
    for _ in range(2):
        loaded = AdaptiveScale()
        loaded.load_state_dict(adaptive.state_dict())
        assert loaded.moments(tensors[2], lambda p: "p").updates == 6
        adaptive = loaded


def test_tensors_without_a_name_are_loaded_in_their_order():
    adaptive, tensors = AdaptiveScale(), [torch.zeros(3, requires_grad=True) for _ in range(6)]
    for number, p in enumerate(tensors[:3]):
        adaptive.moments(p).updates = number
    loaded = pickle.loads(pickle.dumps(adaptive))
    assert loaded.moments(torch.zeros(2)).updates == 0
    assert [loaded.moments(p).updates for p in tensors] == [0, 1, 2, 0, 0, 0]


def test_half_precision_does_not_overflow():
    h, s = draws(60)
    expected = feed(new_variate(), h, s).scale
    variate = feed(new_variate(), (100 * h).half(), (100 * s).half())
    assert variate.scale == pytest.approx(expected, abs=0.1)
