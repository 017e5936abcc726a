# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What is wrong with one sample site: its distribution's arguments, value and density."""

from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints

from pyro_rb.diagnostics.stats.coordinates import coordinate_name

# Arguments that may be infinite: the log of a probability of zero.
MAY_BE_INFINITE = ("logits", "log_density")
_INNER = ("base_dist", "component_distribution", "mixture_distribution", "_component_distribution",
          "_mixture_distribution")  # fmt: skip


def arguments_of(distribution: Any) -> Iterator[Tuple[str, Tensor, Any]]:
    """Name, tensor and constraint of each argument, also of the distributions within."""
    limits = getattr(distribution, "arg_constraints", {})
    # What is not in vars() was not given, and is computed when it is asked for.
    for name, value in list(vars(distribution).items()):
        name = name.replace("_unbroadcasted_", "")
        if isinstance(value, Tensor) and value.is_floating_point() and not name.startswith("_"):
            yield name, value, limits.get(name)
    for inner in _INNER:
        if inner in vars(distribution):
            yield from arguments_of(vars(distribution)[inner])


def find_bad_argument(site: Any) -> Optional[str]:
    """Describes the first argument that is not finite or out of its range."""
    for name, value, limit in arguments_of(site["fn"]):
        bad = value.isnan() if name in MAY_BE_INFINITE else ~value.isfinite()
        if not is_used(bad, site).any() and _is_checkable(limit):
            ok = limit.check(value)
            bad = ~ok if ok.shape == value.shape else (~ok).any().expand(value.shape)
        bad = is_used(bad, site)
        if bad.any():
            what = f"argument {name!r} of {describe(site['fn'])}"
            finite = value.isfinite() | value.isnan()
            reason = "" if not (finite & bad).any() or value.isnan().any() else f", not {limit}"
            return f"{what} is {show(value, bad)}{reason}"
    return None


def find_bad_value(site: Any) -> Optional[str]:
    """Describes the value, if it is not finite."""
    value = site["value"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    bad = is_used(~value.isfinite(), site)
    what = "the observed value" if site["is_observed"] else "the value"
    return f"{what} is {show(value, bad)}" if bad.any() else None


def find_bad_log_prob(site: Any, infinite: bool = False) -> Optional[str]:
    """
    Describes the log probability, if it is NaN or plus infinity.

    :param bool infinite: Also if it is minus infinity.
    """
    log_prob = local_log_prob(site)
    if log_prob is None:
        return None
    bad = log_prob.isnan() | (log_prob == float("inf"))
    if infinite and not site["infer"].get("_enumerate_dim"):
        bad = ~log_prob.isfinite()
    if not bad.any():
        return None
    text = f"log_prob of {describe(site['fn'])} is {show(log_prob, bad)}"
    value = site["value"]
    if isinstance(value, Tensor) and value.shape == bad.shape:
        text += f", at the value {value[bad][0].item():.6g}" + _arguments_at(site["fn"], bad)
    try:
        if not site["fn"].support.check(value).all():
            text += f", which is outside of the support, {site['fn'].support}"
    except (AttributeError, NotImplementedError, ValueError, RuntimeError):
        pass
    return text


def find_bad_derivative(site: Any) -> Optional[str]:
    """Describes the first derivative of the log probability, at this site, that is bad."""
    inputs: Dict[str, Tensor] = {}
    value = site["value"]
    if isinstance(value, Tensor) and value.requires_grad:
        # A leaf, so that the derivatives are those of this site's density alone.
        inputs["the value"] = value = value.detach().requires_grad_()
    log_prob = local_log_prob({**site, "value": value})
    if log_prob is None or not log_prob.requires_grad:
        return None
    inputs.update({f"argument {name!r}": x for name, x, _ in arguments_of(site["fn"])})
    for name, tensor in inputs.items():
        grad = _derivative(log_prob, tensor) if tensor.requires_grad else None
        if grad is None or grad.isfinite().all():
            continue
        bad = ~grad.isfinite()
        text = (
            f"the derivative of log_prob of {describe(site['fn'])} with respect to {name} "
            f"is {show(grad, bad)}"
        )
        if tensor.shape == bad.shape:
            text += f", where it is {tensor[bad][0].item():.6g}"
            text += _arguments_at(site["fn"], bad) if tensor is value else ""
        return text + _masked_hint(site)
    return None


def _derivative(log_prob: Tensor, tensor: Tensor) -> Optional[Tensor]:
    try:
        return torch.autograd.grad(log_prob.sum(), tensor, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:  # through a part of the graph that was freed by the step
        return None


def local_log_prob(site: Any) -> Optional[Tensor]:
    """As it enters the loss, computed anew; None if it cannot be."""
    try:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return scale_and_mask(log_prob, site["scale"], site["mask"])
    except (ValueError, RuntimeError, NotImplementedError):
        return None


def is_used(bad: Tensor, site: Any) -> Tensor:
    """Without the elements that a mask takes out."""
    mask = site["mask"]
    if not isinstance(mask, Tensor):
        return bad & (mask is not False)
    mask = mask.reshape(mask.shape + (1,) * len(site["fn"].event_shape))
    try:
        joint = torch.broadcast_shapes(bad.shape, mask.shape)
    except RuntimeError:  # an argument whose shape is another than that of the value
        return bad
    # An argument that is shared by several elements is used if one of them is.
    return bad & mask.expand(joint) if joint == bad.shape else bad & mask.any()


def show(tensor: Tensor, bad: Tensor) -> str:
    """The first bad element, where it is, and how many there are: ``nan at [3] (2 of 5)``."""
    index = int(bad.flatten().int().argmax())
    text = f"{tensor.flatten()[index].item():.6g}"
    if tensor.numel() == 1:
        return text
    return f"{text} at {coordinate_name('', tensor.shape, index)} ({int(bad.sum())} of {bad.numel()})"


def describe(distribution: Any) -> str:
    """The name of the distribution at the core, without wrappers that reshape it."""
    while type(distribution).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _arguments_at(distribution: Any, bad: Tensor) -> str:
    """The arguments at the first bad element, as it may be one of them that is too large or too small."""
    found = []
    for name, tensor, limit in arguments_of(distribution):
        if not _is_checkable(limit) or limit.event_dim:  # a vector or matrix for each element
            continue
        try:
            found.append(f"{name} {tensor.expand(bad.shape)[bad][0].item():.6g}")
        except RuntimeError:  # of another shape
            continue
    return f" with {', '.join(found)}" if found else ""


def _masked_hint(site: Any) -> str:
    if not isinstance(site["mask"], Tensor):
        return ""
    value = site["value"]
    numbers: List[Tensor] = [value] + [x for _, x, _ in arguments_of(site["fn"])]
    if all(x.isfinite().all() for x in numbers if x.is_floating_point()):
        return ""
    return (
        "; a mask hides the log_prob of elements that are not finite, not their derivative: "
        "give them any valid number"
    )


def _is_checkable(limit: Any) -> bool:
    return limit is not None and not constraints.is_dependent(limit)
