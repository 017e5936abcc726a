# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Sum the likely categories, sample the rest: Rao-Blackwellization of a discrete draw.

A table of probabilities is split into the ``k`` most likely categories and their complement. Slots
hold the categories at which a function is evaluated: each of the ``k``, then draws from the
complement, each with a weight. The weighted sum over slots has the expectation of the function for
its mean.
"""

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

#: Log weight of a slot without mass. Not minus infinity: exp() of it is still a normal
#: number in float32. Slots of less weight do not count.
DEAD = -85.0
#: Log weight of a probe, which is evaluated but counts less than rounding errors.
PROBE = -41.0


class Slots(NamedTuple):
    """
    Where a function of a category is to be evaluated, and how much each value counts.

    All have the shape ``[*batch, m]`` when they come from :func:`select_slots`; users may
    move the dimension of slots. Slots that are neither top nor sampled are dead or probes.
    """

    #: Category, an integer.
    category: Tensor
    #: Log of the weight. The weights of the slots sum to 1.
    log_weight: Tensor
    #: Whether the slot holds one of the k most likely categories.
    is_top: Tensor
    #: Whether the slot holds a draw from the complement.
    is_sampled: Tensor
    #: The probability of a draw among the complement, where it is one of two that differ; 0
    #: elsewhere, where draws are independent. None is 0.
    share: Optional[Tensor] = None


def optimal_k(top: Tensor, rest: Tensor, has_loo: bool = False) -> Tensor:
    r"""
    The number of categories to sum when ``N`` evaluations can be made: the ``k`` in
    ``0 .. N - 1`` that makes ``t_k / (N - k)`` least, where ``t_k`` is the mass outside
    of the ``k`` most likely categories (Proposition 2 of [1]). With the other ``N - k``
    evaluations spent on draws from the complement, the variance is at most that of the
    mean of ``N`` draws.

    That bound takes costs as they are. Costs from which a leave-one-out baseline was subtracted
    have a variance in proportion to the square of the complement's mass, which is larger the fewer
    values the baseline is the mean of. So :math:`t_k^2 (1 + 1/b) / (N - k)` is made least, with
    :math:`b = N - k - 1`, and one more for the mean of the top values if :math:`k > 0`.

    :param top: ``[*batch, N - 1]``, the largest probabilities, in descending order.
    :param rest: ``[*batch, 1]``, the mass of all other categories.
    :param has_loo: whether costs have a leave-one-out baseline.
    :return: ``[*batch, 1]``, integers.

    >>> optimal_k(torch.tensor([[0.90, 0.08], [0.25, 0.25]]), torch.tensor([[0.02], [0.5]]))
    tensor([[2],
            [0]])

    [1] Runjing Liu et al. (2019), "Rao-Blackwellized Stochastic Gradients for Discrete
    Distributions". https://arxiv.org/abs/1810.04777
    """
    # From the small end: 1 - sum(top) would have no digit left in a confident table.
    tails = torch.cat([top, rest], -1).flip(-1).cumsum(-1).flip(-1)
    evaluations = torch.arange(tails.shape[-1], 0, -1, device=tails.device)
    if has_loo:
        others = evaluations - 1
        others[1:] += 1
        tails = tails.square() * (1.0 + 1.0 / others)
    return (tails / evaluations).argmin(-1, keepdim=True)


def select_slots(
    log_q: Tensor,
    k: int,
    num_samples: int,
    adaptive: bool = False,
    probe: bool = False,
    batch_shape: Optional[Tuple[int, ...]] = None,
    distinct: bool = False,
    has_loo: bool = False,
) -> Slots:
    """
    Chooses categories: the ``k`` most likely, then ``num_samples`` independent draws from
    the others, in proportion to their probability.

    Two draws may be made without replacement. With probabilities :math:`p_a, p_b` among the
    complement, their weights are then :math:`(1 - p_b) / (2 - p_a - p_b)` and the rest of its
    mass, which are the mean weights over both orders (the unordered set estimator of [2]).

    Needs ``k + num_samples <= K``. One ``topk`` decides which categories are summed, so
    that ties cannot put a category on both sides.

    :param log_q: ``[*table, K]``, log probabilities, not necessarily normalized. No
        gradient flows.
    :param k: number of categories to sum, ``>= 0``.
    :param num_samples: number of draws, ``>= 1``.
    :param adaptive: whether :func:`optimal_k` chooses, for each element of the batch, how
        many of the ``k + num_samples`` slots are summed, at most ``k`` of them.
    :param probe: whether to add a slot with a draw from the whole table, which has
        nearly no weight.
    :param batch_shape: what ``table`` is expanded to. Draws are independent over
        the batch even where the table is shared. Defaults to ``table``.
    :param distinct: whether elements with two draws have them without replacement.
    :param has_loo: whether costs have a leave-one-out baseline, for :func:`optimal_k`.
    :return: slots ``[*batch, k + num_samples]``, or one more with a probe. Slots with a
        weight of 0 hold the most likely category, and the log weight :data:`DEAD`.

    >>> slots = select_slots(torch.tensor([0.1, 0.6, 0.3]).log(), k=2, num_samples=1)
    >>> slots.category, slots.log_weight.exp()
    (tensor([1, 2, 0]), tensor([0.6000, 0.3000, 0.1000]))

    [2] Wouter Kool, Herke van Hoof, Max Welling (2020), "Estimating Gradients for Discrete Random
    Variables by Sampling without Replacement". https://arxiv.org/abs/2002.06043
    """
    with torch.no_grad():
        batch_shape = log_q.shape[:-1] if batch_shape is None else torch.Size(batch_shape)
        # In float64: a complement of 1e-9 is a matter of course.
        probs = log_q.double().softmax(-1)
        num_slots = k + num_samples
        top, top_category = probs.topk(num_slots, -1)
        if adaptive:
            others = probs.scatter(-1, top_category[..., :-1], 0.0)
            limit: Any = optimal_k(top[..., :-1], others.sum(-1, keepdim=True), has_loo)
        else:
            limit = k
        is_top = torch.arange(num_slots, device=log_q.device) < limit
        # Mass is only ever added up: 1 - sum(top) would lose a small complement.
        rest = probs.scatter(-1, top_category, top.masked_fill(is_top, 0.0))
        cdf = rest.cumsum(-1)
        num_drawn = (~is_top).sum(-1, keepdim=True)
        weight = torch.where(is_top, top, cdf[..., -1:] / num_drawn)
        distinct = distinct and (num_samples == 2 or (adaptive and num_slots > 1))
        drawn, other = _draw(cdf, batch_shape, num_slots, distinct)
        share = torch.zeros_like(weight)
        if distinct:
            is_pair = ~is_top & (num_drawn == 2)
            drawn = torch.where(is_pair, torch.cat([drawn[..., :-1], other], -1), drawn)
            share, pair = _weigh_pair(rest, cdf[..., -1:], drawn)
            weight, share = torch.where(is_pair, pair, weight), share.masked_fill(~is_pair, 0.0)
        is_live = weight > math.exp(DEAD)
        category = torch.where(is_top, top_category, drawn)
        category = torch.where(is_live, category, top_category[..., :1])
        # Terms of weight nan would be left out of sums, and nobody would see log q = nan.
        log_weight = weight.log().nan_to_num(nan=0.0, neginf=DEAD).to(log_q.dtype)
        share = share.masked_fill(~is_live, 0.0).to(log_q.dtype)
        parts = [category, log_weight, is_top & is_live, ~is_top & is_live, share]
        parts = [x.expand(category.shape) for x in parts]
        if probe:
            drawn, _ = _draw(probs.cumsum(-1), batch_shape, 1)
            last = (drawn, *(torch.full_like(drawn, v) for v in (PROBE, 0, 0, 0)))
            parts = [torch.cat([x, y.to(x)], -1) for x, y in zip(parts, last)]
        return Slots(*parts)


def _weigh_pair(rest: Tensor, total: Tensor, drawn: Tensor) -> Tuple[Tensor, Tensor]:
    """
    :param rest: ``[*table, K]``, probabilities of the complement, not normalized.
    :param total: ``[*table, 1]``, their sum.
    :param drawn: ``[*batch, m]``, of which the last two were drawn without replacement.
    :return: the share of each of the two in the complement, and its weight: ``[*batch, m]``, with
        zeros before.
    """
    pair = drawn[..., -2:]
    share = rest.expand(drawn.shape[:-1] + rest.shape[-1:]).gather(-1, pair) / total
    others = (1.0 - share).clamp(min=0.0)
    weight = others.flip(-1) / others.sum(-1, keepdim=True)
    # There is only one to be drawn.
    weight = total * weight.masked_fill(pair[..., :1] == pair[..., 1:], 0.5)
    pad = [drawn.shape[-1] - 2, 0]
    return torch.nn.functional.pad(share, pad), torch.nn.functional.pad(weight, pad)


def _draw(
    cdf: Tensor, batch_shape: Tuple[int, ...], num_samples: int, distinct: bool = False
) -> Tuple[Tensor, Tensor]:
    """
    Independent draws from unnormalized cumulative distributions.

    :param cdf: ``[*table, K]``, non-decreasing; not expanded where the table is shared.
    :param batch_shape: ``batch``, to which ``table`` is broadcastable.
    :param distinct: whether a draw is wanted that differs from the last but one.
    :return: categories ``[*batch, n]``, none of mass 0; and a draw ``[*batch, 1]`` to be taken in
        the place of the last one, which differs from the one before it, if it can.
    """
    table = (1,) * (len(batch_shape) - cdf.dim() + 1) + tuple(cdf.shape[:-1])
    own = [d for d, size in enumerate(batch_shape) if table[d] == size]
    order = own + [d for d in range(len(batch_shape) + 1) if d not in own]
    shape = [*batch_shape, num_samples]
    moved = [shape[d] for d in order]
    rows = moved[: len(own)]
    columns = math.prod(moved[len(own) :])
    uniform = torch.rand(rows + [columns], dtype=cdf.dtype, device=cdf.device)
    cdf = cdf.reshape(rows + [cdf.shape[-1]])
    most = cdf.shape[-1] - 1  # a table with nan leads outside
    index = torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True).clamp(max=most)
    other = index[..., :0]
    if distinct:
        by_draw = rows + [columns // num_samples, num_samples]
        previous = index.reshape(by_draw)[..., -2]
        end = cdf.gather(-1, previous)
        start = cdf.gather(-1, (previous - 1).clamp(min=0)).masked_fill(previous == 0, 0.0)
        # What was drawn before is left out.
        last = uniform.reshape(by_draw)[..., -1] * (cdf[..., -1:] - end + start)
        last = torch.where(last < start, last, torch.maximum(last - start + end, end))
        last = torch.searchsorted(cdf, last, right=True)
        other = torch.where(last > most, previous, last)
    back = [order.index(d) for d in range(len(order))]
    return index.reshape(moved).permute(back), other.reshape(moved[:-1] + [int(distinct)]).permute(back)
