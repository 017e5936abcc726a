# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from pyro import distributions as dist
from pyro.distributions.torch_distribution import MaskedDistribution

from pyro_rb.ops.countable import negative_binomial_window, poisson_window
from pyro_rb.ops.family import strip_independent
from pyro_rb.ops.gather import compact, gather_last

#: Most elements of a table, all rows together: in float32 it then takes 0.3 GB to choose
#: slots, and about half a second.
MAX_TABLE = 2**23

#: The same, of the joint values of the variables of an event, which may be drawn one by one instead.
MAX_JOINT_TABLE = 2**16

#: Smallest Categorical whose expanded table costs more than the look-up.
MIN_GATHER = 64


class NoTable(Exception):
    """Says why a distribution has no table."""


class TableTooLarge(NoTable):
    """Says how large a table would be."""


class GatherCategorical(dist.Categorical):
    """
    A Categorical whose ``log_prob``, and its gradient, take memory for the values and for
    one table. PyTorch's own takes memory for a table at each value.

    >>> q = GatherCategorical(torch.tensor([0.25, 0.75]))
    >>> q.log_prob(torch.tensor([[1], [0]])).exp()
    tensor([[0.7500],
            [0.2500]])
    """

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return gather_last(self.logits, value.long())

    @classmethod
    def of(cls, fn: Any) -> Any:
        """Turns a large Categorical into one; leaves other distributions as they are."""
        if type(fn) is not dist.Categorical or fn.param_shape[-1] < MIN_GATHER:
            return fn
        new = fn.expand(fn.batch_shape, _instance=cls.__new__(cls))
        new._validate_args = fn._validate_args
        if "logits" not in fn.__dict__:
            # In the class above they are the logarithm of probabilities for each element.
            new.logits = _unexpanded(fn).logits.expand(fn.batch_shape + (-1,))
        return new


class Table(NamedTuple):
    """The probabilities of a discrete distribution, and its values."""

    #: ``[*table, K]``, detached; ``table`` is broadcastable to the batch shape.
    log_q: torch.Tensor
    #: ``[K, *event]``. None where the number of the category is the value.
    support: Optional[torch.Tensor] = None
    #: Whether the table ends where the distribution does not.
    is_truncated: bool = False

    @property
    def num_categories(self) -> int:
        return self.log_q.shape[-1]

    def values(self, index: torch.Tensor) -> torch.Tensor:
        """
        :param index: categories ``[*batch, m]``.
        :return: values ``[m, *batch, *event]``, laid out as by ``enumerate_support``.
        """
        index = index.movedim(-1, 0)
        return index if self.support is None else self.support[index]


class OneHotTable(Table):
    def values(self, index: torch.Tensor) -> torch.Tensor:
        return F.one_hot(index.movedim(-1, 0), self.num_categories).to(self.log_q)


class JointTable(NamedTuple):
    """The joint probabilities of the independent variables of an event, and their joint values."""

    log_q: torch.Tensor  # [*table, K ** variables], the last variable runs fastest
    base: Any  # the table of one variable, of K values
    shape: torch.Size  # of the variables
    is_truncated: bool = False

    @property
    def num_categories(self) -> int:
        return self.log_q.shape[-1]

    def values(self, index: torch.Tensor) -> torch.Tensor:
        """As :meth:`Table.values`."""
        num_values, num_variables = self.base.num_categories, self.shape.numel()
        places = num_values ** torch.arange(num_variables - 1, -1, -1, device=index.device)
        digits = index.unsqueeze(-2) // places.unsqueeze(-1) % num_values
        return self.base.values(digits.reshape(index.shape[:-1] + self.shape + index.shape[-1:]))


AnyTable = Union[Table, JointTable]


def find_table(fn: Any) -> AnyTable:
    """
    Makes the table of a distribution over finitely many values that does not say how to
    be reparameterized, or of a Poisson, Geometric or NegativeBinomial up to where less
    than 1e-9 of the mass is left. Batch dims along which a distribution is expanded have
    size 1 in the table. The variables of an event by ``to_event`` have one of joint values.

    :raises NoTable: with the reason, where there is none.
    :raises TableTooLarge: if it would have more than :data:`MAX_TABLE` elements, or
        :data:`MAX_JOINT_TABLE` if of joint values.

    >>> find_table(dist.Binomial(2, torch.tensor(0.5))).log_q.exp()
    tensor([0.2500, 0.5000, 0.2500])
    """
    with torch.no_grad():
        if getattr(fn, "has_rsample", False):
            raise NoTable("reparameterized")
        if isinstance(fn, MaskedDistribution):
            raise NoTable("a masked distribution; use poutine.mask in its place")
        if isinstance(fn, dist.Independent):
            return _joint_table(fn)
        if type(fn) is dist.Categorical:
            return _checked(Table(compact(_unexpanded(fn).logits)))
        if type(fn) is dist.OneHotCategorical:
            return _checked(OneHotTable(compact(fn.logits)))
        if type(fn) in _WINDOWS:
            return _truncated_table(fn)
        if not getattr(fn, "has_enumerate_support", False):
            raise NoTable("no enumerable support")
        event_shape, fn = fn.event_shape, _unexpanded(fn)
        if hasattr(fn, "total_count"):
            # Before the values are listed.
            _check_size(fn.total_count.max().item() + 1, fn.batch_shape)
        try:
            support = fn.enumerate_support(expand=False)
        except NotImplementedError as e:
            raise NoTable(f"no enumerable support: {e}") from None
        _check_size(len(support), fn.batch_shape)
        log_q = fn.log_prob(support).movedim(0, -1)
        return Table(log_q, support.reshape(support.shape[:1] + event_shape))


def as_bits(fn: Any) -> Any:
    """The Bernoulli of each element of a vector or array of bits; None for other distributions."""
    fn = strip_independent(fn, also_changed=True)
    return fn if type(fn) is dist.Bernoulli else None


def _joint_table(fn: Any) -> AnyTable:
    base = strip_independent(fn, also_changed=True)
    num_dims = len(fn.event_shape) - len(base.event_shape)
    if num_dims == 0:
        return find_table(base)
    shape = torch.Size(base.batch_shape[-num_dims:])  # some distributions have a tuple
    num_variables, num_rows = shape.numel(), max(1, math.prod(fn.batch_shape))
    if type(base) in _WINDOWS:
        raise NoTable(f"{num_variables} variables without a largest value; {IN_A_PLATE}")

    def check(num_values: int) -> None:
        if num_variables * math.log2(num_values) + math.log2(num_rows) > math.log2(MAX_JOINT_TABLE):
            raise TableTooLarge(f"too many joint values of {num_variables} variables; {IN_A_PLATE}")

    if getattr(base, "has_enumerate_support", False):
        check(2)  # without a look at its values
    table = find_table(base)
    check(table.num_categories)
    log_q = table.log_q.expand(table.log_q.shape[: -1 - num_dims] + shape + (-1,))
    joint = log_q.new_zeros(log_q.shape[: -1 - num_dims] + (1,))
    for row in log_q.flatten(-1 - num_dims, -2).unbind(-2):
        joint = (joint.unsqueeze(-1) + row.unsqueeze(-2)).flatten(-2)
    return JointTable(joint, table, shape)


def _truncated_table(fn: Any) -> Table:
    fn = _unexpanded(fn)
    last = _WINDOWS[type(fn)](fn).max().item()
    _check_size(last + 1, fn.batch_shape)
    support = torch.arange(math.ceil(last) + 1, device=fn.mean.device).to(fn.mean.dtype)
    shape = (-1,) + (1,) * len(fn.batch_shape)
    return Table(fn.log_prob(support.reshape(shape)).movedim(0, -1), support, True)


#: What makes a difference to variables of one event, where the model allows it.
IN_A_PLATE = "in a plate, without to_event(), each variable has values of its own"


def _checked(table: Table) -> Table:
    _check_size(table.num_categories, table.log_q.shape[:-1])
    return table


def _check_size(num_categories: float, batch_shape: torch.Size) -> None:
    size = num_categories * math.prod(batch_shape)
    if not size <= MAX_TABLE:
        raise TableTooLarge(f"a table of {size:.3g} elements, more than {MAX_TABLE}")


def _unexpanded(fn: Any) -> Any:
    """The same distribution, without the batch dims along which it is but expanded."""
    if type(fn) not in _ARGUMENTS:
        return fn
    num_kept = 1 if type(fn) is dist.Categorical else 0
    names = _ARGUMENTS[type(fn)]
    if "probs" in names:
        # What was made of the other was made for each element.
        names = tuple(n for n in names if n not in ("probs", "logits") or n in fn.__dict__)
    given = {name: compact(getattr(fn, name), num_kept) for name in names}
    if "probs" in given and "logits" in given:
        del given[max(("probs", "logits"), key=lambda name: given[name].numel())]
    return type(fn)(**given, validate_args=False)


#: Arguments of distributions that can be made without ``expand``.
_ARGUMENTS: Dict[Any, Tuple[str, ...]] = {
    dist.Bernoulli: ("probs", "logits"),
    dist.BetaBinomial: ("concentration1", "concentration0", "total_count"),
    dist.Binomial: ("total_count", "probs", "logits"),
    dist.Categorical: ("probs", "logits"),
    dist.Geometric: ("probs", "logits"),
    dist.NegativeBinomial: ("total_count", "probs", "logits"),
    dist.Poisson: ("rate",),
}
_WINDOWS: Dict[Any, Callable[[Any], torch.Tensor]] = {
    dist.Poisson: lambda fn: poisson_window(fn.rate),
    dist.Geometric: lambda fn: negative_binomial_window(
        torch.ones_like(fn.logits), -F.softplus(fn.logits)
    ),
    dist.NegativeBinomial: lambda fn: negative_binomial_window(
        fn.total_count, -F.softplus(-fn.logits)
    ),
}
