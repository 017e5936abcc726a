# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pytest
import torch

from pyro_rb.ops import topk
from pyro_rb.ops.topk import DEAD, PROBE, Slots, optimal_k, select_slots
from pyro_rb.ops.topk_baseline import (
    leave_one_out_baseline,
    particle_baseline,
    probe_baseline,
    score_coefficients,
)

SETTINGS = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (3, 1)]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def random_table(*shape, scale=1.5):
    return (scale * torch.randn(shape)).log_softmax(-1)


# -- Partition ----------------------------------------------------------------


@pytest.mark.parametrize("k, n", SETTINGS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_partition(k, n, adaptive):
    log_q = random_table(7, 3, 6)
    slots = select_slots(log_q, k, n, adaptive)
    assert all(x.shape == (7, 3, k + n) for x in slots)
    probs = log_q.exp()
    order = probs.argsort(-1, descending=True)
    for b in itertools.product(range(7), range(3)):
        top = slots.category[b][slots.is_top[b]]
        sampled = slots.category[b][slots.is_sampled[b]]
        assert len(top) + len(sampled) == k + n
        assert top.tolist() == order[b][: len(top)].tolist()
        assert not set(top.tolist()) & set(sampled.tolist())
        if not adaptive:
            assert len(top) == k
        complement = 1 - probs[b][top].sum()
        torch.testing.assert_close(slots.log_weight[b][slots.is_top[b]], log_q[b][top])
        expected = (complement / len(sampled)).log().expand(len(sampled))
        torch.testing.assert_close(slots.log_weight[b][slots.is_sampled[b]], expected)
    torch.testing.assert_close(slots.log_weight.exp().sum(-1), torch.ones(7, 3))


def test_draws_have_the_distribution_of_the_complement():
    log_q = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
    index = select_slots(log_q, 1, 2, batch_shape=(20_000,)).category[:, 1:]
    frequency = index.flatten().bincount(minlength=5) / index.numel()
    expected = torch.tensor([0.1, 0.0, 0.05, 0.25, 0.2]) / 0.6
    error = (expected * (1 - expected) / index.numel()).sqrt()
    assert ((frequency - expected).abs() <= 4 * error).all()
    # Two draws of one element are independent.
    pairs = (index[:, 0] * 5 + index[:, 1]).bincount(minlength=25) / len(index)
    expected = (expected.unsqueeze(-1) * expected).flatten()
    assert ((pairs - expected).abs() <= 4.5 * (expected * (1 - expected) / len(index)).sqrt()).all()


def test_draws_of_a_shared_table_are_independent_over_the_batch():
    log_q = random_table(3, 1, 1, 8, scale=0.5)
    slots = select_slots(log_q, 1, 1, batch_shape=(5, 3, 100, 4))
    assert slots.category.shape == slots.log_weight.shape == (5, 3, 100, 4, 2)
    assert (slots.category[..., 0] == log_q.argmax(-1).expand(5, 3, 100, 4)).all()
    draws = slots.category[..., 1].movedim(1, 0).reshape(3, -1)
    for row, table in zip(draws, log_q[:, 0, 0]):
        expected = table.exp().index_fill(0, table.argmax(), 0.0)
        expected = expected / expected.sum()
        frequency = row.bincount(minlength=8) / len(row)
        assert ((frequency - expected).abs() <= 4.5 * (expected / len(row)).sqrt()).all()
    assert (draws[0] != draws[1]).any()


def test_own_and_shared_tables_agree():
    log_q = random_table(6)
    torch.manual_seed(0)
    shared = select_slots(log_q.expand(1, 6), 2, 1, batch_shape=(4000,))
    torch.manual_seed(1)
    own = select_slots(log_q.expand(4000, 6).contiguous(), 2, 1)
    means = [x.category[:, 2].bincount(minlength=6) / 4000 for x in (shared, own)]
    torch.testing.assert_close(*means, atol=0.05, rtol=0)


@pytest.mark.parametrize("k", range(5))
def test_ties_are_on_one_side_only(k):
    slots = select_slots(torch.zeros(1000, 6), k, 1)
    for row in slots.category.tolist():
        assert len(set(row[:k])) == k
        assert row[k] not in row[:k]


def test_probe_is_drawn_from_the_whole_table():
    log_q = torch.tensor([0.1, 0.6, 0.3]).log().float()
    slots = select_slots(log_q, 1, 1, probe=True, batch_shape=(20_000,))
    assert slots.category.shape == (20_000, 3)
    frequency = slots.category[:, 2].bincount(minlength=3) / 20_000
    torch.testing.assert_close(frequency, log_q.exp(), atol=0.015, rtol=0, check_dtype=False)
    assert (slots.log_weight[:, 2] == PROBE).all()
    assert not (slots.is_top[:, 2] | slots.is_sampled[:, 2]).any()
    assert slots.log_weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "table", [[0.0, -math.inf, -math.inf, -math.inf], [2000.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]]
)
@pytest.mark.parametrize("k, n", [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_empty_complement(dtype, table, k, n, adaptive):
    log_q = torch.tensor(table, dtype=dtype)
    slots = select_slots(log_q, k, n, adaptive)
    dead = ~(slots.is_top | slots.is_sampled)
    assert slots.log_weight.dtype == dtype and slots.log_weight.isfinite().all()
    assert (log_q[slots.category] > -math.inf).all()
    assert (slots.log_weight[dead] == DEAD).all()
    assert (slots.log_weight[dead].exp() > 0).all()
    weight = slots.log_weight.exp()[~dead].sum()
    torch.testing.assert_close(weight, torch.ones((), dtype=dtype))


def test_small_complement_is_not_cancelled():
    # In float32 the two probabilities below add up to 1 exactly.
    log_q = torch.tensor([0.0, math.log(1e-9), math.log(1e-12)], dtype=torch.float32)
    slots = select_slots(log_q, 1, 1)
    assert slots.log_weight[1].item() == pytest.approx(math.log(1.001e-9), rel=1e-5)
    assert slots.is_sampled[1]


def test_nan_is_kept_in_sight():
    slots = select_slots(torch.full((4, 3), math.nan), 1, 1)
    assert (slots.log_weight == 0).all()
    assert ((0 <= slots.category) & (slots.category < 3)).all()


def test_large_table_uses_no_dead_category():
    log_q = torch.full((10_000,), -math.inf)
    log_q[torch.randperm(10_000)[:50]] = 0.0
    index = select_slots(log_q, 3, 2, batch_shape=(500,)).category
    assert (log_q[index] == 0).all()


# -- Proposition 2 --------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 4, 7])
def test_optimal_k_against_a_loop(budget):
    probs = torch.cat([random_table(30, 8, scale=s).exp() for s in (0.1, 1.0, 4.0)])
    ordered = probs.sort(-1, descending=True).values
    top, rest = ordered[:, : budget - 1], ordered[:, budget - 1 :].sum(-1, keepdim=True)
    for row, k in zip(ordered, optimal_k(top, rest).squeeze(-1).tolist()):
        scores = [row[j:].sum().item() / (budget - j) for j in range(budget)]
        assert scores[k] == pytest.approx(min(scores), rel=1e-12)


def test_elements_of_a_batch_have_their_own_k():
    log_q = torch.stack([torch.tensor([9.0, 0, 0, 0, 0]), torch.zeros(5)]).log_softmax(-1)
    slots = select_slots(log_q, 2, 1, adaptive=True, batch_shape=(100, 2))
    assert (slots.is_top.sum(-1) == torch.tensor([1, 0])).all()
    assert (slots.is_sampled.sum(-1) == torch.tensor([2, 3])).all()
    # The mode is held once.
    assert ((slots.category[:, 0] == 0).sum(-1) == 1).all()


# -- Unbiasedness, by going through all draws -----------------------------------


def all_draws(log_q, k, n, probe=False):
    """Yields the probability of each combination of draws, with the slots."""
    probs = log_q.exp().detach()
    order = probs.argsort(descending=True)
    top, others = order[:k], order[k:].tolist()
    complement = probs[others].sum()
    is_top = torch.arange(k + n + probe) < k
    is_sampled = (torch.arange(k + n + probe) >= k) & (torch.arange(k + n + probe) < k + n)
    log_weight = torch.cat([probs[top], (complement / n).expand(n)]).log()
    if probe:
        log_weight = torch.cat([log_weight, torch.tensor([PROBE])])
    for draws in itertools.product(others, repeat=n):
        chance = torch.prod(probs[list(draws)] / complement)
        for last in range(len(probs)) if probe else [None]:
            tail = list(draws) if last is None else [*draws, last]
            index = torch.cat([top, torch.tensor(tail, dtype=torch.long)])
            yield chance * (1 if last is None else probs[last]), Slots(index, log_weight, is_top, is_sampled)


def slot_gradient(slots, log_q, logits, cost, baseline):
    """The estimate for one combination of draws."""
    weight = slots.log_weight.exp()
    grad = weight * cost[slots.category]
    own = None
    if baseline == "loo":
        own = leave_one_out_baseline(grad, weight, slots.is_top, slots.is_sampled, -1, slots.share)
    elif baseline == "reinforce+":
        own = probe_baseline(grad, weight, slots.is_sampled, -1)
    coefficient = score_coefficients(grad, weight, slots.is_top, slots.is_sampled, -1, own)
    return torch.autograd.grad((coefficient * log_q[slots.category]).sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("k, n", SETTINGS)
@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
def test_mean_over_all_draws_is_the_exact_gradient(k, n, baseline):
    logits = torch.randn(5, requires_grad=True)
    log_q, cost = logits.log_softmax(-1), 3.0 + torch.randn(5)
    exact = torch.autograd.grad((log_q.exp() * cost).sum(), logits, retain_graph=True)[0]
    mean, chance = torch.zeros(5), 0.0
    for p, slots in all_draws(log_q, k, n, probe=baseline == "reinforce+"):
        mean += p * slot_gradient(slots, log_q, logits, cost, baseline)
        chance += p
    assert float(chance) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=0)


def all_pairs(log_q, k):
    """As :func:`all_draws`, of two draws without replacement."""
    probs = log_q.exp().detach()
    order = probs.argsort(descending=True)
    top, others = order[:k], order[k:].tolist()
    complement = probs[others].sum()
    is_top = torch.arange(k + 2) < k
    for a, b in itertools.permutations(others, 2):
        first, second = (probs[[a, b]] / complement).tolist()
        weights = complement * torch.tensor([1 - second, 1 - first]) / (2 - first - second)
        log_weight = torch.cat([probs[top], weights]).log()
        share = torch.tensor([0.0] * k + [first, second])
        index = torch.cat([top, torch.tensor([a, b])])
        yield torch.tensor(first * second / (1 - first)), Slots(index, log_weight, is_top, ~is_top, share)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("baseline", [None, "loo"])
def test_mean_over_all_pairs_is_the_exact_gradient(k, baseline):
    logits = torch.randn(5, requires_grad=True)
    log_q, cost = logits.log_softmax(-1), 3.0 + torch.randn(5)
    exact = torch.autograd.grad((log_q.exp() * cost).sum(), logits, retain_graph=True)[0]
    pairs = list(all_pairs(log_q, k))
    assert sum(p for p, _ in pairs).item() == pytest.approx(1.0, abs=1e-12)
    gradients = [slot_gradient(slots, log_q, logits, cost, baseline) for _, slots in pairs]
    torch.testing.assert_close(sum(p * g for (p, _), g in zip(pairs, gradients)), exact, atol=1e-12, rtol=0)
    if k == 3:  # all values are looked at
        assert all(torch.allclose(g, exact, atol=1e-12) for g in gradients)


def test_pairs_without_replacement_have_less_variance():
    logits = torch.tensor([2.0, 1.0, 0.0, -0.5, -1.0], requires_grad=True)
    log_q, cost = logits.log_softmax(-1), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    for k in (0, 1, 2):
        pairs = variance(log_q, logits, cost, k, 2, "loo", list(all_pairs(log_q, k)))
        assert pairs < 0.9 * variance(log_q, logits, cost, k, 2, "loo")


def test_pairs_are_drawn_in_proportion():
    q = torch.tensor([0.05, 0.5, 0.0, 0.2, 0.15, 0.1])
    slots = select_slots(q.log(), 1, 2, batch_shape=(50_000,), distinct=True)
    torch.testing.assert_close(slots.log_weight.exp().sum(-1), torch.ones(50_000))
    share = q / 0.5
    drawn = slots.category[:, 1:]
    torch.testing.assert_close(slots.share[:, 1:], share[drawn])
    others = 1 - share[drawn]
    torch.testing.assert_close(slots.log_weight[:, 1:].exp(), 0.5 * others.flip(-1) / others.sum(-1, keepdim=True))
    for a, b in itertools.permutations([0, 3, 4, 5], 2):
        expected = share[a] * share[b] / (1 - share[a])
        found = (drawn == torch.tensor([a, b])).all(-1).double().mean()
        assert abs(found - expected) < 4.5 * (expected / 50_000) ** 0.5


def test_pairs_where_there_are_no_two():
    """A complement of one value, of none, and next to none of the second."""
    logits = torch.tensor([[0.0, -1.0, -math.inf, -math.inf], [0.0] + 3 * [-math.inf], [0.0, -1.0, -60.0, -90.0]])
    slots = select_slots(logits, 1, 2, distinct=True)
    assert slots.log_weight.isfinite().all() and slots.share.isfinite().all()
    torch.testing.assert_close(slots.log_weight.exp().sum(-1), torch.ones(3))
    assert (slots.category[0] <= 1).all() and (slots.category[1] == 0).all() and slots.category[2, 1] == 1


@pytest.mark.parametrize(
    "shape, batch", [((0, 6), (0,)), ((6,), (0,)), ((1, 6), (4, 1)), ((3, 1, 6), (3, 5)), ((6,), ())]
)
@pytest.mark.parametrize("k, n, adaptive", [(1, 2, False), (2, 1, True), (0, 2, False), (1, 1, True)])
def test_shapes_of_pairs(shape, batch, k, n, adaptive):
    slots = select_slots(random_table(*shape), k, n, adaptive, batch_shape=batch, distinct=True, has_loo=True)
    assert all(x.shape == (*batch, k + n) for x in slots)
    torch.testing.assert_close(slots.log_weight.exp().sum(-1), torch.ones(batch))


def test_only_elements_with_two_draws_have_pairs():
    # All three are drawn; two are; one is.
    logits = torch.tensor([[0.0] * 6, [1.5, 0, 0, 0, 0, 0], [3.0, 2.5, 0, 0, 0, 0]])
    slots = select_slots(logits, 2, 1, adaptive=True, batch_shape=(2000, 3), distinct=True)
    assert slots.is_sampled.sum(-1)[0].tolist() == [3, 2, 1]
    assert ((slots.share > 0).sum(-1) == torch.tensor([0, 2, 0])).all()
    assert (slots.category[:, 1, 1] != slots.category[:, 1, 2]).all()
    equal = (slots.category[:, 0, 1] == slots.category[:, 0, 2]).double().mean()
    assert abs(equal - 1 / 6) < 0.04


def variance(log_q, logits, cost, k, n, baseline, draws=None):
    draws = draws or list(all_draws(log_q, k, n, probe=baseline == "reinforce+"))
    chances = torch.stack([p for p, _ in draws])
    grads = torch.stack([slot_gradient(s, log_q, logits, cost, baseline) for _, s in draws])
    return (chances @ grads.square() - (chances @ grads).square()).sum()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_proposition_1(k):
    logits = torch.tensor([2.0, 1.0, 0.0, -0.5, -1.0], requires_grad=True)
    log_q, cost = logits.log_softmax(-1), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    complement = log_q.exp().sort(descending=True).values[k:].sum()
    plain = variance(log_q, logits, cost, 0, 1, None)
    assert variance(log_q, logits, cost, k, 1, None) <= complement * plain + 1e-12


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_proposition_2(scale):
    budget, cost = 3, torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    logits = (scale * torch.tensor([2.0, 1.0, 0.0, -0.5, -1.0])).requires_grad_()
    log_q = logits.log_softmax(-1)
    ordered = log_q.exp().sort(descending=True).values
    k = int(optimal_k(ordered[: budget - 1], ordered[budget - 1 :].sum(-1, keepdim=True)))
    mean_of_draws = variance(log_q, logits, cost, 0, 1, None) / budget
    assert variance(log_q, logits, cost, k, budget - k, None) <= mean_of_draws + 1e-12


def test_a_baseline_lets_the_budget_sum_more():
    """By the square of the mass outside, of four evaluations more are sums."""
    top, rest = torch.tensor([[0.5, 0.2, 0.12], [0.1, 0.1, 0.1]]), torch.tensor([[0.18], [0.7]])
    assert optimal_k(top, rest).tolist() == [[2], [0]]
    assert optimal_k(top, rest, has_loo=True).tolist() == [[3], [0]]
    tails = torch.tensor([1.0, 0.5, 0.3, 0.18])
    values = [t**2 * (1 + 1 / b) / n for t, n, b in zip(tails, (4, 3, 2, 1), (3, 3, 2, 1))]
    assert int(torch.stack(values).argmin()) == 3


# -- Baselines --------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(0, 2), (1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("baseline", ["loo", "reinforce+"])
def test_constant_cost_changes_nothing(k, n, baseline):
    logits = torch.randn(6, requires_grad=True)
    log_q, cost = logits.log_softmax(-1), torch.randn(6)
    slots = select_slots(log_q, k, n, probe=baseline == "reinforce+")
    grads = [slot_gradient(slots, log_q, logits, cost + c, baseline) for c in (0.0, 100.0)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=0)


def test_common_baseline_needs_only_the_sampled_slots():
    """A baseline b at all slots, as in the paper, equals b on the conditional score."""
    logits = torch.randn(6, requires_grad=True)
    log_q, cost, b = logits.log_softmax(-1), torch.randn(6), 1.7
    slots = select_slots(log_q, 2, 2)
    weight, (k, m) = slots.log_weight.exp(), (2, 4)
    paper = (weight * (cost[slots.category] - b) * log_q[slots.category]).sum()
    conditional = log_q - log_q.index_fill(0, slots.category[:k], -math.inf).logsumexp(-1)
    ours = (weight * cost[slots.category] * log_q[slots.category]).sum()
    ours = ours - (weight * b * conditional[slots.category])[k:m].sum()
    coefficient = score_coefficients(
        weight * cost[slots.category], weight, slots.is_top, slots.is_sampled, -1, weight * b * slots.is_sampled
    )
    grads = [
        torch.autograd.grad(x, logits, retain_graph=True)[0]
        for x in (paper, ours, (coefficient * log_q[slots.category]).sum())
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-14, rtol=0)
    torch.testing.assert_close(grads[2], grads[1], atol=1e-14, rtol=0)


def test_leave_one_out_baseline_by_hand():
    # Costs 2, 3 at the top slots of weights .5, .25; 4, 8 at the sampled ones of .125.
    weight = torch.tensor([0.5, 0.25, 0.125, 0.125])
    cost = torch.tensor([2.0, 3.0, 4.0, 8.0])
    is_top = torch.tensor([True, True, False, False])
    top_mean = (0.5 * 2 + 0.25 * 3) / 0.75
    expected = 0.125 * torch.tensor([0, 0, (8 + top_mean) / 2, (4 + top_mean) / 2])
    actual = leave_one_out_baseline(weight * cost, weight, is_top, ~is_top, -1)
    torch.testing.assert_close(actual, expected)
    # In any dimension.
    stacked = [x.unsqueeze(-1).expand(4, 3) for x in (weight * cost, weight, is_top, ~is_top)]
    actual = leave_one_out_baseline(*stacked, -2)
    torch.testing.assert_close(actual, expected.unsqueeze(-1).expand(4, 3))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_particle_baseline_by_hand(dim):
    weight, cost = torch.rand(4, 3, 5), torch.randn(4, 3, 5)
    actual = particle_baseline(weight * cost, weight, dim)
    rows = [x.movedim(dim, 0) for x in (weight, cost)]
    for p, row in enumerate(actual.movedim(dim, 0)):
        w, c = (torch.cat([x[:p], x[p + 1 :]]) for x in rows)
        torch.testing.assert_close(row, (w * c).sum(0) / w.sum(0))
    # One more in each cost is one more in each mean, for any weights.
    torch.testing.assert_close(particle_baseline(weight * (cost + 1.0), weight, dim), actual + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_particle_baseline_without_others(dtype):
    one = torch.ones(1, dtype=dtype)
    assert particle_baseline(5.0 * one, one, 0) == 0
    weight = torch.tensor([0.3, 1e-30, 0.0], dtype=dtype)
    baseline = particle_baseline(7.0 * weight, weight, 0)
    torch.testing.assert_close(baseline, torch.tensor([0.0, 7.0, 7.0], dtype=dtype))


def test_no_baseline_without_others():
    one = torch.ones(1)
    assert leave_one_out_baseline(one, one, one < 0, one > 0, -1) == 0


@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_slots_have_finite_coefficients(baseline, dtype):
    logits = torch.tensor([0.0, -math.inf, -math.inf, -math.inf], dtype=dtype)
    slots = select_slots(logits, 2, 1, probe=baseline == "reinforce+")
    weight = slots.log_weight.exp()
    grad = weight * torch.tensor([5.0, 1.0, 2.0, 3.0], dtype=dtype)[slots.category]
    own = None
    if baseline == "loo":
        own = leave_one_out_baseline(grad, weight, slots.is_top, slots.is_sampled, -1)
    elif baseline == "reinforce+":
        own = probe_baseline(grad, weight, slots.is_sampled, -1)
    coefficient = score_coefficients(grad, weight, slots.is_top, slots.is_sampled, -1, own)
    expected = torch.zeros_like(coefficient)
    expected[0] = 5.0
    torch.testing.assert_close(coefficient, expected)


def test_public_functions_import_no_pyro():
    assert not any(name.startswith("pyro.") for name in vars(topk))
