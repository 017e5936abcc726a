# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Dict, List, Mapping, Optional

import torch
from pyro.distributions.torch_distribution import TorchDistribution

from pyro_rb.ops.antithetic import draw_pairs
from pyro_rb.ops.topk import PROBE, Slots, select_slots
from pyro_rb.poutine.draw_messenger import (
    Declined,
    DrawMessenger,
    Strategy,
)
from pyro_rb.poutine.topk_options import TopKOptions
from pyro_rb.poutine.topk_room import Enumerated, Room, sequential_counters
from pyro_rb.poutine.topk_table import (
    IN_A_PLATE,
    AnyTable,
    GatherCategorical,
    JointTable,
    NoTable,
    TableTooLarge,
    as_bits,
    find_table,
)


class _Chosen(TorchDistribution):
    """Has the chosen values for its support, and the shape of another distribution."""

    arg_constraints: Dict[str, Any] = {}

    def __init__(self, fn: Any, values: torch.Tensor) -> None:
        self._values = values  # [m, *batch, *event]
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        return self._values


class TopK(Strategy):
    """
    At discrete sites of a guide, puts the ``k`` most likely values and draws from the others in the
    place of one draw, along an enumeration dim.

    The :class:`~pyro_rb.ops.topk.Slots` of a site, laid out as its ``log_prob``, are in
    ``msg["infer"]["_topk"]``. Where there are no more categories than slots, all are
    enumerated, and there are no ``Slots``. A site with ``infer={"enumerate": ...}`` keeps
    the meaning that Pyro gives it.

    :param TopKOptions options: for sites without ``infer={"topk": ...}``.
    :param bool probe: whether each site gets one more slot, for a draw from the whole
        distribution that has nearly no weight.
    :param int max_evaluations: the largest cartesian product of slots.
    :param int num_draws: the number of independent draws at sites whose values cannot be listed and
        that have no ``infer={"draws": ...}``. Defaults to 1, which leaves these sites as they are.
    :param dict plain: names of sites that get a single draw whatever their own options say, with the reasons.
    :param bool has_loo: whether costs have a leave-one-out baseline, which ``budget`` counts on.
    :param dict never_summed: names of sites that ``sum_up_to`` does not apply to, with the reasons.
    :param bool draws_bits: whether Bernoulli vectors whose values are not all summed have draws in the place
        of likely values, unless a site asks for likely values.
    :raises TooManySummed: at a site, if other sites should not have had all their values summed.
    :raises ValueError: at a site, naming it: if its options are invalid, or cannot be
        followed; if the product of slots is too large.

    >>> import pyro, pyro.distributions as dist
    >>> with DrawMessenger([TopK(TopKOptions(k=1))], first_available_dim=-1):
    ...     int(pyro.sample("z", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))[0])
    2
    """

    def __init__(
        self,
        options: TopKOptions,
        probe: bool = False,
        max_evaluations: int = 2**16,
        num_draws: int = 1,
        plain: Optional[Mapping[str, str]] = None,
        has_loo: bool = False,
        never_summed: Optional[Mapping[str, str]] = None,
        draws_bits: bool = False,
    ) -> None:
        self.draws_bits = draws_bits
        self.options = options
        self.has_loo = has_loo
        self.num_draws = num_draws
        self.plain = {} if plain is None else plain
        self.probe = probe
        self.room = Room(max_evaluations, {} if never_summed is None else never_summed)

    @property
    def enumerated(self) -> List[Enumerated]:
        """The sites that have slots."""
        return self.room.sites

    def begin(self) -> None:
        self.room.sites = []

    def settle(self, site: Any) -> bool:
        # A replay around the loss puts its own options.
        return site["infer"].get("enumerate") is not None

    def draw(self, msg: Any, handler: DrawMessenger) -> str:
        assert handler.first_available_dim is not None
        self.room.first_available_dim = handler.first_available_dim
        options, num_draws = self._find_options(msg), self._find_num_draws(msg)
        is_paired = self._is_paired(msg, num_draws)
        try:
            table = self._find_table(msg)
        except Declined as e:
            return self._draw_several(msg, handler, num_draws, is_paired, str(e))
        if table.num_categories == 1:
            raise Declined("one value")
        is_joint, infer = isinstance(table, JointTable), msg["infer"]

        def draw_instead(note: str) -> str:
            reason = f"{table.num_categories} joint values{note}; {IN_A_PLATE}"
            return self._draw_several(msg, handler, num_draws, is_paired, reason)

        if is_joint and not infer.get("topk") and ("draws" in infer or "antithetic" in infer):
            return draw_instead("")
        num_slots = options.num_slots + self.probe
        is_whole, note = options.num_slots >= table.num_categories, ""
        is_summed = not (is_whole or table.is_truncated) and table.num_categories <= options.sum_up_to
        if is_summed:
            note = self.room.why_not_summed(msg, table.num_categories)
            is_whole = is_summed = not note
        if is_whole:
            num_slots = table.num_categories
        elif is_joint:
            if self.draws_bits and as_bits(msg["fn"]) is not None and not infer.get("topk"):
                # Hardly any of so many values is likely.
                return draw_instead(note)
            note += f"; {IN_A_PLATE}"
        self.room.check(msg, num_slots)
        fn, slots, values = msg["fn"], None, None
        reason = f"{num_slots} of {table.num_categories} {'joint ' * is_joint}values"
        if table.is_truncated:
            reason += ", which have all but 1e-9 of the mass"
        if not is_whole:
            is_adaptive = options.budget is not None
            k = options.num_slots - 1 if is_adaptive else options.k
            slots = select_slots(
                table.log_q,
                k,
                options.num_slots - k,
                is_adaptive,
                self.probe,
                fn.batch_shape,
                distinct=True,
                has_loo=self.has_loo,
            )
            values = table.values(slots.category)
            if self.probe:
                reason += ", one of them for the baseline"
        elif table.is_truncated or is_joint:
            index = torch.arange(num_slots, device=table.log_q.device)
            shape = (1,) * len(fn.batch_shape) + (-1,)
            values = table.values(index.reshape(shape))
        self._enumerate(msg, handler, values, slots, num_slots, True, is_summed)
        return reason + note

    def _draw_several(
        self, msg: Any, handler: DrawMessenger, num_draws: int, is_paired: bool, reason: str
    ) -> str:
        """
        Draws along an enumeration dim, where there is no table.

        :param is_paired: whether they are antithetic pairs. Else they are independent.
        """
        fn = msg["fn"]
        num_slots = num_draws + (self.probe and not is_paired)
        if num_draws < 2 or fn.has_rsample:
            raise Declined(reason)
        self.room.check(msg, num_slots)
        with torch.no_grad():
            if is_paired:
                values = draw_pairs(as_bits(fn).probs, num_draws // 2)
            else:
                values = fn.sample((num_slots,))
        # Laid out by element of the batch, so that each has a baseline of its own.
        shape = fn.batch_shape + (num_slots,)
        is_sampled = torch.arange(num_slots, device=values.device).expand(shape) < num_draws
        log_weight = torch.full(shape, -math.log(num_draws), device=values.device)
        log_weight = log_weight.masked_fill(~is_sampled, PROBE)
        slots = Slots(is_sampled, log_weight, torch.zeros_like(is_sampled), is_sampled)
        self._enumerate(msg, handler, values, slots, num_slots)
        msg["infer"]["_is_paired"] = is_paired
        kind = "antithetic draws" if is_paired else "draws"
        return f"{num_draws} {kind}: {reason}"

    def _find_num_draws(self, msg: Any) -> int:
        asked = msg["infer"].get("draws", self.num_draws)
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise ValueError(
                f"Invalid infer={{'draws': {asked!r}}} at guide site '{msg['name']}'. Expected "
                "an int >= 1."
            )
        return asked

    def _is_paired(self, msg: Any, num_draws: int) -> bool:
        """Whether draws are to be antithetic pairs, where there are several."""
        asked, is_possible = msg["infer"].get("antithetic"), as_bits(msg["fn"]) is not None
        has_own_baseline = bool(msg["infer"].get("baseline"))
        if asked is None:
            # Of more draws, a leave-one-out baseline may be better.
            return is_possible and num_draws == 2 and self.has_loo and not has_own_baseline
        if not isinstance(asked, bool):
            raise ValueError(
                f"Invalid infer={{'antithetic': {asked!r}}} at guide site '{msg['name']}'. "
                "Expected True or False."
            )
        if asked and not (is_possible and num_draws % 2 == 0):
            raise ValueError(
                f"Found infer={{'antithetic': True}} at guide site '{msg['name']}', of type "
                f"{type(msg['fn']).__name__} with draws={num_draws}. Expected a Bernoulli, or one "
                "with to_event(), and an even number of draws."
            )
        if asked and has_own_baseline:
            raise ValueError(
                f"Found infer={{'antithetic': True, 'baseline': ...}} at guide site '{msg['name']}'. "
                "Expected one of the two: the cost of either draw of a pair is subtracted from the other."
            )
        return asked

    def _enumerate(
        self,
        msg: Any,
        handler: DrawMessenger,
        values: Any,
        slots: Optional[Slots],
        num_slots: int,
        has_table: bool = False,
        is_summed: bool = False,
    ) -> None:
        """
        :param values: ``[m, *batch, *event]``; None for the whole support.
        :param slots: None if each value has the weight of its probability.
        """
        fn = msg["fn"]
        if values is not None:
            msg["fn"] = _Chosen(fn, values)
        # Without "enumerate" Pyro does not look at the number of samples.
        msg["infer"] = {**msg["infer"], "enumerate": "parallel", "num_samples": None}
        try:
            handler.enumerate(msg)
        finally:
            msg["fn"] = fn
        dim = msg["infer"]["_enumerate_dim"]
        if slots is not None:
            msg["fn"] = GatherCategorical.of(fn)
            moved = [_move_slots(x, dim) for x in slots if x is not None]
            msg["infer"]["_topk"] = Slots(*moved)
        name, counters = msg["name"], sequential_counters(msg)
        plates = [frame.name for frame in msg["cond_indep_stack"] if frame.vectorized]
        is_markov = "_markov_scope" in msg["infer"]
        self.room.sites.append(
            Enumerated(name, dim, num_slots, counters, has_table, is_summed, is_markov, plates)
        )

    def _find_options(self, msg: Any) -> TopKOptions:
        infer, where = msg["infer"], f" at guide site '{msg['name']}'"
        if msg["name"] in self.plain:
            msg["infer"] = {**infer, "enumerate": None}
            raise Declined(self.plain[msg["name"]])
        asked = infer.get("topk")
        if infer.get("enumerate") not in (None, "parallel", "sequential"):
            raise ValueError(
                f"Invalid infer={{'enumerate': {infer['enumerate']!r}}}{where}. Expected "
                "'parallel', 'sequential' or None."
            )
        if "enumerate" in infer and (asked is None or infer["enumerate"] is not None):
            if asked is None:
                raise Declined(f"infer={{'enumerate': {infer['enumerate']!r}}}")
            raise ValueError(
                f"Found infer={{'enumerate': {infer['enumerate']!r}, 'topk': {asked!r}}}"
                f"{where}. Expected one of the two: 'enumerate' for all values, or 'topk' "
                "for the most likely ones."
            )
        if asked is None:
            options = self.options
        elif isinstance(asked, dict):
            unknown = set(asked) - set(TopKOptions._fields)
            if unknown:
                raise ValueError(
                    f"Unknown options {sorted(unknown)} in infer={{'topk': {asked!r}}}{where}. "
                    f"Expected some of {list(TopKOptions._fields)}."
                )
            options = TopKOptions.make(**asked, default=self.options, where=where)
        else:
            options = TopKOptions.make(k=asked, default=self.options, where=where)
            if options.k == 0:
                raise Declined("infer={'topk': 0}")
        if options.num_slots == 1 and not self.probe:
            raise Declined("one evaluation")
        return options

    def _find_table(self, msg: Any) -> AnyTable:
        name, asked = msg["name"], msg["infer"].get("topk")
        try:
            table = find_table(msg["fn"])
        except NoTable as e:
            if asked is None or isinstance(e, TableTooLarge):
                raise Declined(str(e)) from None
            raise ValueError(
                f"Found infer={{'topk': {asked!r}}} at guide site '{name}', whose values "
                f"cannot be listed: {e}. Remove the option, or set {{'topk': 0}}."
            ) from None
        return table


def _move_slots(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``[*batch, m]`` to the layout of ``log_prob``, with slots at a negative ``dim``."""
    x = x.movedim(-1, 0)
    if -x.dim() < dim:
        return x.transpose(0, dim)
    return x.reshape(x.shape[:1] + (1,) * (-dim - x.dim()) + x.shape[1:])
