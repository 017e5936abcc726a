# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What an RVRSGuide refuses of a model and a guide, as it would be silently wrong.
"""

import warnings
from typing import Any, Optional, Sequence

import torch
from pyro.poutine.messenger import Messenger, unwrap

from pyro_rb.infer.rvrs_signature import is_in
from pyro_rb.ops.flow import has_no_inverse
from pyro_rb.ops.graph import leaves
from pyro_rb.ops.score_identity import base_dists, flat_transforms
from pyro_rb.poutine import ProposalMessenger, TapMessenger
from pyro_rb.poutine.proposal_messenger import Site


def check_sites(
    guide: Any, guide_run: ProposalMessenger, model_run: ProposalMessenger, local_plate: Optional[str]
) -> None:
    """
    :raises ValueError: if the guide lacks a latent site of the model.
    :raises NotImplementedError: naming the site, for what cannot be done.
    """
    if isinstance(unwrap(guide), Messenger):
        raise NotImplementedError(
            f"Found a GuideMessenger, {type(unwrap(guide)).__name__}. Expected a guide that "
            "runs by itself, such as AutoNormal, or a function."
        )
    for name in model_run.latents:
        if name not in guide_run.sites:
            raise ValueError(
                f"The model samples '{name}', which the guide does not. Expected a guide that "
                "samples every latent site of the model: add the site to the guide, or fix its "
                "value by poutine.condition."
            )
    for name, site in guide_run.latents.items():
        if site.no_density is not None:
            raise NotImplementedError(
                f"Guide site '{name}' is drawn by {site.no_density}, which does not know the "
                "density of its draws. Expected a guide that does: make the RVRSGuide of the "
                "guide inside of that one, its attribute 'guide'."
            )
        if not getattr(site.fn, "has_rsample", False):
            raise _no_path_gradient(name, site.fn, "not reparameterized")
    for name, site in [*guide_run.latents.items(), *model_run.sites.items()]:
        for frame in site.frames:
            if frame.name != local_plate and frame.full_size not in (None, frame.size):
                raise NotImplementedError(
                    f"Plate '{frame.name}' at site '{name}' subsamples {frame.size} of "
                    f"{frame.full_size}. Acceptance needs the whole log density. Expected no "
                    f"subsampling; if all latents are inside of the plate, or the others "
                    f"need no rejection, set local_plate={frame.name!r}."
                )
    surplus = [
        name
        for name, site in guide_run.latents.items()
        if name not in model_run.latents and not site.is_auxiliary
    ]
    if surplus:
        warnings.warn(
            f"Found sites {sorted(surplus)} in the guide but not in the model. If that is "
            "meant, mark them by infer={'is_auxiliary': True}."
        )


def check_local_sites(plate: str, guide_run: ProposalMessenger, model_run: ProposalMessenger) -> None:
    """
    :raises NotImplementedError: naming a site that must be inside of the local plate.
    """
    for name, site in model_run.latents.items():
        if is_in(plate, site.frames) and not is_in(plate, guide_run.sites[name].frames):
            raise NotImplementedError(
                f"Site '{name}' is inside of plate '{plate}' in the model, but not "
                "in the guide. Expected a guide that draws it inside of the plate, such "
                "as AutoNormal or a function."
            )
    for name, site in guide_run.latents.items():
        if not is_in(plate, site.frames) and is_known_at_draw_only(site):
            reason = f"it has no inverse, and is outside of plate '{plate}'"
            raise _no_path_gradient(name, site.fn, reason)


def is_known_at_draw_only(site: Site) -> bool:
    """Whether its density is known at its last draw only."""
    return any(has_no_inverse(t) for t in flat_transforms(site.fn))


_HARMLESS = (
    "reparameterized draw",
    "its value was supplied",
    "depends on no parameter",
    "a Delta",  # looked at once, by check_deltas
)


def check_reasons(tap: TapMessenger, run: ProposalMessenger) -> None:
    """
    :raises NotImplementedError: naming the guide site whose draws have no path gradient.
    """
    for name, reason in tap.reasons.items():
        if not str(reason).startswith(_HARMLESS):
            raise _no_path_gradient(name, run.sites[name].fn, reason)


def _no_path_gradient(name: str, fn: Any, reason: str) -> NotImplementedError:
    *_, base = base_dists(fn)
    parts = [type(part).__name__ for part in (base, *flat_transforms(fn))]
    return NotImplementedError(
        f"Guide site '{name}', made of {', '.join(parts)}, has no path gradient: {reason}. "
        "Expected reparameterized draws, with transforms that are known and a support that "
        "does not depend on a parameter. Marginalize discrete sites, or choose another "
        "distribution for the guide."
    )


def check_deltas(guide_run: ProposalMessenger, names: Sequence[str], tap: TapMessenger) -> None:
    """
    What is not drawn must be computed from draws alone, and change with them: the path
    gradient has no part for a direct dependence on parameters.
    """
    for name in names:
        value = guide_run.sites[name].value
        if torch.equal(value[0], value[1]):
            raise NotImplementedError(
                f"Guide site '{name}' has the same value in two draws. Expected a random "
                "draw: a point estimate, as by AutoDelta, leaves nothing to accept or "
                "reject. In local mode, local sites must be drawn inside of the plate."
            )
    stop = {value.grad_fn for value in tap.path.values.values()}
    for name, site in guide_run.sites.items():
        if site.log_prob is None:
            continue
        if ((torch.as_tensor(site.scale, device=site.value.device) - 1).abs() > 1e-6).any():
            raise NotImplementedError(
                f"Guide site '{name}' is scaled by {site.scale}. Expected a guide without poutine.scale "
                "inside: put the same scale around the RVRSGuide and the model given to SVI, and "
                "make the RVRSGuide of the unscaled model and guide."
            )
        if name in tap.path.values:
            continue
        for x in (site.log_prob, site.value):
            if x.requires_grad and (x.grad_fn is None or any(True for _ in leaves(x, stop))):
                raise NotImplementedError(
                    f"Guide site '{name}' of type {type(site.fn).__name__} is computed from "
                    "parameters, not from draws alone. Expected draws from a "
                    "reparameterized distribution, or functions of such draws without "
                    "parameters of their own: AutoDelta cannot be used, nor a learned "
                    "transform outside of a TransformedDistribution."
                )


def check_outside(plate: str, first: ProposalMessenger, second: ProposalMessenger) -> None:
    """No site outside of the local plate may depend on what is inside, which differs."""
    for name, site in first.sites.items():
        other = second.sites[name].log_prob
        if not is_in(plate, site.frames):
            assert site.log_prob is not None and other is not None
            if not is_close(site.log_prob, other):
                raise NotImplementedError(
                    f"Site '{name}' is outside of plate '{plate}', and depends on latents "
                    "inside, which are to be accepted item by item. Expected sites outside "
                    "that depend on none inside: leave local_plate=None."
                )


def is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    rtol = 1e-6 if a.dtype == torch.float64 else 1e-3
    scale = max(1.0, b.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    return torch.allclose(a, b.to(a), rtol=0.0, atol=rtol * scale, equal_nan=True)


def differs(what: str, alone: torch.Tensor, together: torch.Tensor) -> str:
    return (
        f"the log density of the {what} for two proposals at a time is {together.tolist()}, "
        f"and for one at a time {alone.tolist()}. Expected the same: sum over dims by "
        "negative index, do not use batch normalization, and give each batch dim a plate."
    )
