# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which distribution is it? An instance of a class may have changed what the class does."""

import sys
from typing import Any, Callable, List, Optional

import torch
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.distributions.kl import _KL_REGISTRY

GAUSSIANS = (Normal, MultivariateNormal, LowRankMultivariateNormal)

#: What a subclass may change and still be the same distribution, beside special methods.
_HARMLESS = frozenset(
    "arg_constraints conjugate_update expand infer_shapes _abc_impl _validate_args".split()
)
_SPECIAL = frozenset(["__call__", "__getattribute__"])


def find_changes(fn: Any, family: type) -> List[str]:
    """
    What a distribution does in other ways than the class that it is an instance of:
    the names of methods and attributes that its subclass, or the instance, replaces.

    >>> class Shifted(Normal):
    ...     def log_prob(self, value):
    ...         return super().log_prob(value - 1)
    >>> find_changes(Shifted(0.0, 1.0), Normal)
    ['log_prob']
    """
    classes = type(fn).__mro__
    depth = classes.index(family)
    changed = {name for cls in classes[:depth] for name in vars(cls)}
    # An instance has its parameters as attributes, also those that are computed once.
    changed |= {name for name, value in vars(fn).items() if callable(value)}
    return sorted(
        name
        for name in changed - _HARMLESS
        if (name in _SPECIAL or not (name.startswith("__") and name.endswith("__")))
        and any(name in vars(cls) for cls in classes[depth:])
    )


def is_exactly(fn: Any, family: type) -> bool:
    """
    Whether a distribution is one of a family: an instance of the class, or of a subclass
    that changes nothing of it, such as Pyro's.

    >>> is_exactly(Normal(0.0, 1.0), Normal)
    True
    >>> is_exactly(Normal(0.0, 1.0), torch.distributions.ExponentialFamily)
    False
    """
    if isinstance(fn, family) and not find_changes(fn, family):
        return True
    return family is MultivariateNormal and _is_gpytorch(fn)


def _is_gpytorch(fn: Any) -> bool:
    """
    Whether it is GPyTorch's own MultivariateNormal, of a size that GPyTorch solves by
    Cholesky. It has other methods, for structured covariances, and the same density.
    """
    gpytorch = sys.modules.get("gpytorch")
    if gpytorch is None:
        return False
    family = gpytorch.distributions.MultivariateNormal
    limit = gpytorch.settings.max_cholesky_size.value()
    return isinstance(fn, family) and fn.event_shape[-1] <= limit and not find_changes(fn, family)


def strip_independent(fn: Any, also_changed: bool = False) -> Any:
    """
    The distribution inside of any number of :class:`~torch.distributions.Independent`.

    :param bool also_changed: whether to strip subclasses, too, without a look at what they change.

    >>> normal = Normal(torch.zeros(2), 1.0)
    >>> strip_independent(Independent(normal, 1)) is normal
    True
    """
    while isinstance(fn, Independent) if also_changed else is_exactly(fn, Independent):
        fn = fn.base_dist
    return fn


def find_family(fn: Any) -> Optional[type]:
    """
    Which of Normal, MultivariateNormal and LowRankMultivariateNormal a distribution is,
    after stripping ``Independent``; None if it is neither, or not reparameterized.

    >>> find_family(Independent(Normal(torch.zeros(2), 1.0), 1)).__name__
    'Normal'
    >>> find_family(torch.distributions.Cauchy(torch.zeros(2), 1.0))
    """
    base = strip_independent(fn)
    if not getattr(fn, "has_rsample", False):
        return None
    return next((family for family in GAUSSIANS if is_exactly(base, family)), None)


def find_kl(p: Any, q: Any) -> Optional[Callable[[Any, Any], torch.Tensor]]:
    """
    The formula that is registered for the divergence of two distributions, for what they
    are exactly: ``torch.distributions.kl_divergence`` takes that of their base classes.

    >>> find_kl(Normal(0.0, 1.0), torch.distributions.Laplace(0.0, 1.0)).__name__
    '_kl_normal_laplace'
    >>> class Shifted(Normal):
    ...     def log_prob(self, value):
    ...         return super().log_prob(value - 1)
    >>> find_kl(Normal(0.0, 1.0), Shifted(0.0, 1.0))
    """
    for left in type(p).__mro__:
        for right in type(q).__mro__:
            found = _KL_REGISTRY.get((left, right))
            if found is not None and is_exactly(p, left) and is_exactly(q, right):
                return found
    return None
