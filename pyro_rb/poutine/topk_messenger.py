# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import torch
from pyro.distributions.torch_distribution import (
    TorchDistribution,
    TorchDistributionMixin,
)
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops.topk import Slots, select_slots
from pyro_rb.poutine.topk_options import TopKOptions
from pyro_rb.poutine.topk_table import (
    GatherCategorical,
    NoTable,
    Table,
    TableTooLarge,
    find_table,
)

#: Dims for slots; a tensor has at most 64 in all.
MAX_DIMS = 40
#: Slots of all sites that a site might depend on, multiplied. No more are risked.
MAX_JOINT = 2**20


class _Chosen(TorchDistribution):
    """Has the chosen values for its support, and the shape of another distribution."""

    arg_constraints: Dict[str, Any] = {}

    def __init__(self, fn: Any, values: torch.Tensor) -> None:
        self._values = values  # [m, *batch, *event]
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        return self._values


class _Enumerated(NamedTuple):
    """A site that this handler enumerated, in full or in part."""

    name: str
    dim: int
    num_slots: int
    counters: Dict[str, int]  # of the sequential plates around it
    plates: List[str]  # the others around it


class _Plain(Exception):
    """Says why a site is left as it is."""


class TopKMessenger(EnumMessenger):
    """
    Puts, at discrete sites of a guide, the ``k`` most likely values and draws from the
    others in the place of one draw, along an enumeration dim.

    The :class:`~pyro_rb.ops.topk.Slots` of a site, laid out as its ``log_prob``, are in
    ``msg["infer"]["_topk"]``. Where there are no more categories than slots, all are
    enumerated, and there are no ``Slots``. A site with ``infer={"enumerate": ...}`` keeps
    the meaning that Pyro gives it. :attr:`reasons` tells about each latent site.

    :param TopKOptions options: for sites without ``infer={"topk": ...}``.
    :param int first_available_dim: as for
        :class:`~pyro.poutine.enum_messenger.EnumMessenger`.
    :param bool probe: whether each site gets one more slot, for a draw from the whole
        distribution that has nearly no weight.
    :param int max_evaluations: the largest cartesian product of slots.
    :param dict plain: names of sites that are to have a single draw whatever they say
        themselves, with the reasons.
    :raises ValueError: at a site, naming it: if its options are invalid, or cannot be
        followed; if the product of slots is too large.

    >>> import pyro, pyro.distributions as dist
    >>> with TopKMessenger(TopKOptions(k=1), first_available_dim=-1):
    ...     int(pyro.sample("z", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))[0])
    2
    """

    def __init__(
        self,
        options: TopKOptions,
        first_available_dim: int,
        probe: bool = False,
        max_evaluations: int = 2**16,
        plain: Optional[Mapping[str, str]] = None,
    ) -> None:
        super().__init__(first_available_dim)
        self.options = options
        self.probe = probe
        self.max_evaluations = max_evaluations
        self.plain = {} if plain is None else plain
        #: Latent sites, with what there is to say of the treatment.
        self.reasons: Dict[str, str] = {}
        self.enumerated: List[_Enumerated] = []

    def __enter__(self) -> Any:
        self.reasons = {}
        self.enumerated = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if _is_drawn(msg):
            try:
                self._enumerate(msg)
                return
            except _Plain as e:
                self.reasons[msg["name"]] = str(e)
        super()._pyro_sample(msg)

    def _enumerate(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        options = self._find_options(msg)
        table = self._find_table(msg)
        slots = None
        num_slots = options.num_slots + self.probe
        if options.num_slots >= table.num_categories:
            num_slots = table.num_categories
        counters = _sequential_counters(msg)
        self._check_room(num_slots, counters)
        self.check_product(name, fn.batch_shape, num_slots)

        self.reasons[name] = f"{num_slots} of {table.num_categories} values"
        if table.is_truncated:
            self.reasons[name] += ", which have all but 1e-9 of the mass"
        if options.num_slots < table.num_categories:
            is_adaptive = options.budget is not None
            k = options.num_slots - 1 if is_adaptive else options.k
            slots = select_slots(
                table.log_q, k, options.num_slots - k, is_adaptive, self.probe, fn.batch_shape
            )
            msg["fn"] = _Chosen(fn, table.values(slots.category))
            if self.probe:
                self.reasons[name] += ", one of them for the baseline"
        elif table.is_truncated:
            index = torch.arange(num_slots, device=table.log_q.device)
            shape = (1,) * len(fn.batch_shape) + (-1,)
            msg["fn"] = _Chosen(fn, table.values(index.reshape(shape)))
        # Without "enumerate" Pyro does not look at the number of samples.
        msg["infer"] = {**msg["infer"], "enumerate": "parallel", "num_samples": None}
        try:
            super()._pyro_sample(msg)
        finally:
            msg["fn"] = fn
        dim = msg["infer"]["_enumerate_dim"]
        if slots is not None:
            msg["fn"] = GatherCategorical.of(fn)
            msg["infer"]["_topk"] = Slots(*(_move_slots(x, dim) for x in slots))
        plates = [frame.name for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.enumerated.append(_Enumerated(name, dim, num_slots, counters, plates))

    def _find_options(self, msg: Any) -> TopKOptions:
        infer, where = msg["infer"], f" at guide site '{msg['name']}'"
        if msg["name"] in self.plain:
            msg["infer"] = {**infer, "enumerate": None}
            raise _Plain(self.plain[msg["name"]])
        asked = infer.get("topk")
        if "enumerate" in infer and (asked is None or infer["enumerate"] is not None):
            if asked is None:
                raise _Plain(f"infer={{'enumerate': {infer['enumerate']!r}}}")
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
                raise _Plain("infer={'topk': 0}")
        if options.num_slots == 1 and not self.probe:
            raise _Plain("one evaluation")
        return options

    def _find_table(self, msg: Any) -> Table:
        name, asked = msg["name"], msg["infer"].get("topk")
        try:
            table = find_table(msg["fn"])
        except NoTable as e:
            if asked is None or isinstance(e, TableTooLarge):
                raise _Plain(str(e)) from None
            raise ValueError(
                f"Found infer={{'topk': {asked!r}}} at guide site '{name}', whose values "
                f"cannot be listed: {e}. Remove the option, or set {{'topk': 0}}."
            ) from None
        if table.num_categories == 1:
            raise _Plain("one value")
        return table

    def _check_room(self, num_slots: int, counters: Dict[str, int]) -> None:
        if any(-site.dim >= MAX_DIMS for site in self.enumerated):
            raise _Plain("no tensor dim is left")
        # Iterations of a sequential plate do not depend on one another, and sites that
        # share a dim, as steps of a Markov chain do, are summed one after the other.
        sizes: Dict[int, int] = {}
        for site in self.enumerated:
            if all(site.counters.get(p, c) == c for p, c in counters.items()):
                sizes[site.dim] = max(site.num_slots, sizes.get(site.dim, 1))
        joint = math.prod(sizes.values())
        if joint > 1 and joint * num_slots > MAX_JOINT:
            raise _Plain(f"with earlier sites there might be more than {MAX_JOINT} terms")

    def check_product(self, name: str, shape: torch.Size, num_slots: int = 1) -> None:
        """
        :param name: of a site.
        :param shape: its batch shape.
        :param num_slots: its own slots, if they are not yet in the shape.
        :raises ValueError: if the shape has too many slots of several sites.
        """
        assert self.first_available_dim is not None
        num_enum_dims = max(0, len(shape) + self.first_available_dim + 1)
        product = num_slots * math.prod(shape[:num_enum_dims])
        if product <= self.max_evaluations:
            return
        sites = {
            site.name: site.num_slots
            for site in self.enumerated
            if len(shape) >= -site.dim and shape[site.dim] > 1
        }
        if num_slots > 1:
            sites[name] = num_slots
        if len(sites) > 1:
            raise ValueError(
                f"Site '{name}' needs {product} evaluations, the product over the guide "
                f"sites that it depends on, {sites}. Expected at most "
                f"max_evaluations={self.max_evaluations}. Set infer={{'topk': 0}}, a plain "
                "draw, at most of these sites, or raise max_evaluations."
            )


def _is_drawn(msg: Any) -> bool:
    return not (
        msg["done"]
        or msg["is_observed"]
        or msg["value"] is not None
        or msg["infer"].get("_do_not_trace")
        or site_is_subsample(msg)
        or not isinstance(msg["fn"], TorchDistributionMixin)
    )


def _sequential_counters(msg: Any) -> Dict[str, int]:
    return {f.name: f.counter for f in msg["cond_indep_stack"] if not f.vectorized}


def _move_slots(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``[*batch, m]`` to the layout of ``log_prob``, with slots at a negative ``dim``."""
    x = x.movedim(-1, 0)
    if -x.dim() < dim:
        return x.transpose(0, dim)
    return x.reshape(x.shape[:1] + (1,) * (-dim - x.dim()) + x.shape[1:])
