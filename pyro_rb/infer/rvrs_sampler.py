# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Rejection sampling of the proposals of a guide.
"""

import math
from typing import Any, Callable, Iterable, List, NamedTuple, Sequence

import torch

from pyro_rb.infer.rvrs_proposals import Proposals, Proposer, Values
from pyro_rb.infer.rvrs_signature import StructureChanged
from pyro_rb.ops.rejection import acceptance, first_accepted

#: Elements of all sites in a round of proposals, beyond which there are more rounds: as
#: many as a processor's cache holds, so that larger rounds are slower, not faster.
ROUND_ELEMENTS = 2**22

#: Items of the local plate that are looked at together: their columns fit in the cache.
BLOCK = 2**14

#: With at most as many elements of all sites, the first round is large enough but for one
#: call in 200: what more proposals take is nothing beside the time of another round.
FEW_ELEMENTS = 1000


class RejectionSamplingError(RuntimeError):
    """Too few proposals were accepted within ``max_steps``."""


class Accepted(NamedTuple):
    """S accepted proposals. ``batch`` is empty, or the items of the local plate."""

    #: ``[S, *batch]``
    log_weight: torch.Tensor
    #: Positions among all proposals, ``[S, *batch]``.
    position: torch.Tensor
    #: Proposals up to and including the last one that was accepted, ``[*batch]``.
    num_proposed: torch.Tensor
    #: All proposals, if they have a graph.
    rounds: List[Proposals]
    #: Values of the draws at some sites, each ``[S, *plates, *event]``, if they have none.
    values: Values
    #: Log weights and acceptance probabilities of the first proposals, ``[M, *batch]``, of
    #: which the number does not depend on what was accepted.
    first_log_weight: torch.Tensor
    first_acceptance: torch.Tensor
    #: How many log weights were not finite, of how many.
    num_invalid: int
    num_log_weights: int
    #: The threshold, ``[*batch]`` or a scalar.
    T: torch.Tensor


def largest_round(proposer: Proposer) -> int:
    """Number of proposals."""
    return max(1, ROUND_ELEMENTS // max(1, proposer.structure.num_elements))


class _Search:
    """
    Looks for the first S accepted proposals of each item. What is kept of proposals is
    that of the items which lack some.

    :param T: thresholds, ``[N]``.
    """

    def __init__(self, num_samples: int, T: torch.Tensor, epsilon: float) -> None:
        self.num_samples = num_samples
        self.T = T
        self.epsilon = epsilon
        #: Items that lack draws, L of N; of these, which proposals were accepted, and the
        #: columns of all proposals, each ``[M, L, *shape]``.
        self.items: Any = None
        self.is_accepted: Any = None
        self.columns: List[torch.Tensor] = []
        #: Of all items: the first S positions, ``[S, N]``, and the columns there.
        self.position: Any = None
        self.found: List[torch.Tensor] = []
        #: Acceptance probabilities of the first proposals.
        self.acceptance: Any = None

    @property
    def is_done(self) -> bool:
        return self.items is not None and not len(self.items)

    def look_at(self, columns: List[torch.Tensor], all_finite: bool) -> None:
        """
        :param columns: log weights of the next proposals, and what else is to be known of
            those that are accepted, each ``[M, N, *shape]``.
        """
        T = self.T
        if self.items is not None and len(self.items) < len(T):
            columns = [x[:, self.items] for x in columns]
            T = T[self.items]
        a = acceptance(columns[0], T, self.epsilon, all_finite)
        is_accepted = torch.rand_like(a) < a
        if self.items is not None:
            is_accepted = torch.cat([self.is_accepted, is_accepted])
            columns = [torch.cat(pair) for pair in zip(self.columns, columns)]
        lacks = is_accepted.sum(0, dtype=torch.int32) < self.num_samples
        has_all = not lacks.any()
        rest = self.T.new_empty(0, dtype=torch.long) if has_all else lacks.nonzero().squeeze(-1)
        if self.items is None:
            # What this says of items that lack some is replaced later.
            self.acceptance = a
            self.position, _ = first_accepted(is_accepted, self.num_samples)
            self.position.clamp_(max=len(a) - 1)
            self.found = [_gather(x, self.position) for x in columns]
            self.items = rest
        elif len(rest) < len(self.items):
            done = (~lacks).nonzero().squeeze(-1)
            items = self.items[done]
            index, _ = first_accepted(is_accepted[:, done], self.num_samples)
            self.position[:, items] = index
            for found, x in zip(self.found, columns):
                found[:, items] = x[index, done]
            self.items = self.items[rest]
        is_rest = slice(0, 0) if has_all else rest
        self.is_accepted = is_accepted[:, is_rest]
        self.columns = [x[:, is_rest] for x in columns]


def _gather(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """
    :param x: ``[M, N, *shape]``.
    :param position: ``[S, N]``.
    :return: ``[S, N, *shape]``.
    """
    index = position.reshape(position.shape + (1,) * (x.dim() - 2))
    return x.gather(0, index.expand(position.shape + x.shape[2:]))


def sample(
    proposer: Proposer,
    num_samples: int,
    find_T: Callable[[], torch.Tensor],
    epsilon: float,
    guess: float,
    max_steps: int,
    with_grad: bool = False,
    names: Sequence[str] = (),
    is_checked: bool = True,
) -> Accepted:
    """
    Proposes in rounds, until enough are accepted.

    :param num_samples: S.
    :param find_T: gives the threshold ``[*batch]``, after the first proposals were made
        and before they are looked at.
    :param guess: of the mean acceptance, from which the size of the rounds is chosen.
    :param max_steps: proposals at most.
    :param with_grad: whether proposals are to have the graph of the log joint.
    :param names: of the sites whose values are wanted, if gradients are disabled.
    :param is_checked: whether distributions are to validate, if that is on.
    """
    guess = max(guess, epsilon)
    num_items = proposer.structure.num_items
    # So that more proposals are rarely needed; for many items, the slowest counts.
    margin = 3.0 if proposer.structure.num_elements <= FEW_ELEMENTS else 1.0
    first = math.ceil((num_samples + margin * math.sqrt(num_samples)) / guess)
    expected = math.ceil(first + math.log(num_items) / guess)
    largest = largest_round(proposer)
    rounds: List[Proposals] = []
    searches: List[_Search] = []
    num_proposed = num_invalid = 0
    num_lacking, size = num_items, expected
    while num_lacking:
        size = min(size, max(first, largest), max_steps - num_proposed)
        if size <= 0:
            raise _exhausted(searches, num_proposed, max_steps)
        columns: List[List[torch.Tensor]] = []
        all_finite = True
        for i in range(0, size, largest):
            # Graphs of more would be large; those that are accepted are evaluated again.
            has_graph = with_grad and num_proposed < largest
            proposals = proposer.propose(min(largest, size - i), has_graph, is_checked=is_checked)
            if torch.is_grad_enabled():
                rounds.append(proposals)
            log_weight = proposals.log_weight
            num_proposed += len(log_weight)
            num_invalid += proposals.num_invalid
            all_finite &= proposals.num_invalid == 0
            values = [_by_item(proposer, proposals.values[name]) for name in names]
            columns.append([log_weight.reshape(len(log_weight), -1), *values])
        if not searches:
            T, batch = find_T().to(log_weight), log_weight.shape[1:]
            parts = T.expand(num_items).split(BLOCK) if num_items > 1 else [T.reshape(1)]
            searches = [_Search(num_samples, part, epsilon) for part in parts]
            first_log_weight = cat([rows[0] for rows in columns])[:first]
        for i, search in enumerate(searches):
            block = slice(i * BLOCK, (i + 1) * BLOCK)
            part = [cat([x[:, block] for x in xs]) for xs in zip(*columns)]
            for rows in zip(*(x.split(first) for x in part)):
                if not search.is_done:
                    search.look_at(list(rows), all_finite)
        num_lacking = sum(len(search.items) for search in searches)
        size = math.ceil((1 + math.log(max(1, num_lacking))) / guess)
        if num_proposed >= expected:
            size = max(size, num_proposed)
    found, *values = (torch.cat(x, 1) for x in zip(*(s.found for s in searches)))
    position = torch.cat([s.position for s in searches], 1).reshape((num_samples,) + batch)
    first_acceptance = torch.cat([s.acceptance for s in searches], 1)
    return Accepted(
        found.reshape(position.shape),
        position,
        position[-1] + 1,
        rounds,
        {n: _by_item(proposer, x, back=True) for n, x in zip(names, values)},
        first_log_weight.reshape((-1,) + batch),
        first_acceptance.reshape((-1,) + batch),
        num_invalid,
        num_proposed * num_items,
        T,
    )


def _by_item(proposer: Proposer, value: torch.Tensor, back: bool = False) -> torch.Tensor:
    """
    Moves the dim of the items of ``[M, *plates, *event]`` to the second place, where there
    is a local plate, and otherwise inserts one; or moves it back.
    """
    structure = proposer.structure
    if structure.plate_dim is None:
        return value.squeeze(1) if back else value.unsqueeze(1)
    dim = structure.plate_dim - structure.dim
    return value.movedim(1, dim) if back else value.movedim(dim, 1)


def redraw(proposer: Proposer, accepted: Accepted) -> Accepted:
    """
    Gives a graph to draws that were made without, so that the proposals that were not
    accepted need none.
    """
    proposals = proposer.propose(len(accepted.log_weight), True, accepted.values)
    found = proposals.log_weight
    distance = (found[0] - accepted.log_weight[0]).abs().max()
    if not distance <= 1e-3 * found[0].abs().max().clamp(min=1.0):
        raise StructureChanged("log densities of two runs at the same values")
    count = torch.arange(len(found), device=found.device)
    count = count.reshape((-1,) + (1,) * (found.dim() - 1))
    return accepted._replace(
        position=count.expand_as(found), rounds=[proposals], num_invalid=0
    )


def cat(xs: List[torch.Tensor]) -> torch.Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(xs)


def take(proposer: Proposer, accepted: Accepted, names: Iterable[str]) -> Values:
    """
    :return: values of the accepted draws at some sites, ``[S, *plates, *event]``.
    """
    if not accepted.rounds:
        return {name: accepted.values[name] for name in names}
    position = accepted.position.reshape(len(accepted.position), -1)
    values = {}
    for name in names:
        x = cat([_by_item(proposer, r.values[name]) for r in accepted.rounds])
        values[name] = _by_item(proposer, _gather(x, position), back=True)
    return values


def _exhausted(
    searches: List[_Search], num_proposed: int, max_steps: int
) -> RejectionSamplingError:
    counts = [s.is_accepted.sum(0) for s in searches]
    least = min(int(count.min()) for count in counts if len(count))
    block = next(i for i, count in enumerate(counts) if len(count) and count.min() == least)
    search, column = searches[block], int(counts[block].argmin())
    item = int(search.items[column])
    log_weight, T = search.columns[0][:, column], search.T[item]
    worst = ""
    if len(searches[0].T) > 1:
        worst = f" for item {block * BLOCK + item} of {sum(len(s.T) for s in searches)}, the worst"
    a = acceptance(log_weight, T, search.epsilon)
    finite = log_weight[log_weight.isfinite()]
    mean = finite.mean().item() if len(finite) else -math.inf
    return RejectionSamplingError(
        f"Accepted {least} of the {search.num_samples} samples wanted{worst}, "
        f"after {num_proposed} proposals (max_steps={max_steps}). Mean acceptance "
        f"{a.mean().item():.3g} at T = {T.item():.4g}; mean log weight {mean:.4g}, "
        f"{len(log_weight) - len(finite)} of them not finite. Expected T near minus the log "
        "weights. Fit the proposal by plain SVI first, leave T=None to have it found, or "
        "raise epsilon, T or max_steps."
    )
