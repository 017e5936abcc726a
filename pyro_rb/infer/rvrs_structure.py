# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Looks at a model and a guide before they are first used by an RVRSGuide, and refuses what
would be silently wrong.
"""

import warnings
import zlib
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from pyro.distributions import Delta
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger, unwrap

from pyro_rb.infer.rvrs_proposals import (
    Proposer,
    Values,
    check_reasons,
    is_in,
    missing_site,
    no_path_gradient,
    strip,
)
from pyro_rb.infer.rvrs_signature import (
    Latent,
    Structure,
    StructureChanged,
    shapes,
    sign,
)
from pyro_rb.ops.flow import has_no_inverse
from pyro_rb.ops.graph import leaves
from pyro_rb.ops.normal import is_normal
from pyro_rb.ops.score_identity import base_dists, flat_transforms
from pyro_rb.poutine import ProposalMessenger, TapMessenger
from pyro_rb.poutine.proposal_messenger import Site

#: Log densities with more elements in a proposal than this are evaluated twice.
SMALL = 20_000


class Look(NamedTuple):
    """One run of the guide and of the model, as they are."""

    guide: ProposalMessenger
    model: ProposalMessenger
    arguments: Tuple

    @property
    def sites(self) -> List[Site]:
        return [*self.guide.sites.values(), *self.model.sites.values()]

    @property
    def signature(self) -> Tuple:
        return sign(self.guide), sign(self.model), self.arguments


def look(model: Callable, guide: Callable, args: Tuple, kwargs: Dict) -> Look:
    """Runs guide and model once, out of sight."""
    subsamples: Values = {}
    with torch.no_grad():
        with ProposalMessenger(subsamples=subsamples) as guide_run:
            guide(*args, **kwargs)
        values = {name: site.value for name, site in guide_run.latents.items()}
        with ProposalMessenger(values=values, subsamples=subsamples) as model_run:
            model(*args, **kwargs)
    return Look(guide_run, model_run, shapes(args, kwargs))


def find_structure(
    model: Callable,
    guide: Callable,
    args: Tuple,
    kwargs: Dict,
    local_plate: Optional[str],
    found: Look,
) -> Structure:
    """
    Runs model and guide for two proposals at a time, and again for each of these.

    :param found: by :func:`look`.
    :raises ValueError: if the guide lacks a latent site of the model, or there is no such
        local plate around one.
    :raises NotImplementedError: naming the site, for what cannot be done.
    """
    if isinstance(unwrap(guide), Messenger):
        raise NotImplementedError(
            f"Found a GuideMessenger, {type(unwrap(guide)).__name__}. Expected a guide that "
            "runs by itself, such as AutoNormal, or a function."
        )
    guide_run, model_run = found.guide, found.model
    for name in model_run.latents:
        if name not in guide_run.sites:
            raise missing_site(name)
    for name, site in guide_run.latents.items():
        if site.no_density is not None:
            raise NotImplementedError(
                f"Guide site '{name}' is drawn by {site.no_density}, which does not know the "
                "density of its draws. Expected a guide that does: make the RVRSGuide of the "
                "guide inside of that one, its attribute 'guide'."
            )
        if not getattr(site.fn, "has_rsample", False):
            raise no_path_gradient(name, site.fn, "not reparameterized")
        _check_plates(name, site, local_plate)
    for name, site in model_run.sites.items():
        _check_plates(name, site, local_plate)
    _warn_of_surplus(guide_run, model_run)

    structure = Structure(
        dim=_left_of_plates(found.sites),
        guide_signature=sign(guide_run),
        model_signature=sign(model_run),
        sites={
            name: Latent(site.frames, site.event_dim, tuple(site.value.shape))
            for name, site in model_run.latents.items()
        },
        num_elements=sum(_count(site) for site in found.sites),
        arguments=found.arguments,
    )
    what: Any = found.signature
    if local_plate is not None:
        # Thresholds of items do not depend on how many of them there are in a call.
        what = sign(guide_run, local_plate), sign(model_run, local_plate)
        in_plate = {n: is_in(local_plate, s.frames) for n, s in guide_run.latents.items()}
        for name, site in model_run.latents.items():
            if is_in(local_plate, site.frames) and not in_plate[name]:
                raise NotImplementedError(
                    f"Site '{name}' is inside of plate '{local_plate}' in the model, but not "
                    "in the guide. Expected a guide that draws it inside of the plate, such "
                    "as AutoNormal or a function."
                )
        structure = structure._replace(
            frame=_find_plate(local_plate, model_run),
            is_chosen=local_plate in guide_run.has_chosen | model_run.has_chosen,
            has_globals=not all(in_plate.values()),
        )
        for name, site in guide_run.latents.items():
            if not in_plate[name] and _has_no_inverse(site):
                reason = f"it has no inverse, and is outside of plate '{local_plate}'"
                raise no_path_gradient(name, site.fn, reason)
    structure = structure._replace(
        is_small=structure.num_elements <= SMALL, key=zlib.crc32(repr(what).encode())
    )
    try:
        return _try_out(Proposer(model, guide, args, kwargs, structure))
    except StructureChanged as e:
        raise unstable(e) from e


def unstable(change: StructureChanged) -> NotImplementedError:
    return NotImplementedError(
        f"Two runs with the same arguments differ in their sites: of the {change}. Expected "
        "the same latents, plates and sizes in each run."
    )


def _has_no_inverse(site: Site) -> bool:
    """Whether its density is known at its last draw only."""
    return any(has_no_inverse(t) for t in flat_transforms(site.fn))


def _count(site: Site) -> int:
    sizes = [x.numel() for x in (site.value, site.log_prob) if isinstance(x, torch.Tensor)]
    return max(sizes, default=0)


def _left_of_plates(sites: Sequence[Site]) -> int:
    dims = [frame.dim for site in sites for frame in site.frames if frame.dim is not None]
    return min(dims, default=0) - 1


def _check_plates(name: str, site: Site, local_plate: Optional[str]) -> None:
    for frame in site.frames:
        if frame.name != local_plate and frame.full_size not in (None, frame.size):
            raise NotImplementedError(
                f"Plate '{frame.name}' at site '{name}' subsamples {frame.size} of "
                f"{frame.full_size}. Acceptance needs the whole log density. Expected no "
                f"subsampling; if all latents are inside of the plate, or the others "
                f"need no rejection, set local_plate={frame.name!r}."
            )


def _warn_of_surplus(
    guide_run: ProposalMessenger, model_run: ProposalMessenger
) -> None:
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


def _find_plate(name: str, run: ProposalMessenger) -> CondIndepStackFrame:
    frames = {f.name: f for site in run.latents.values() for f in site.frames}
    if name not in frames:
        raise ValueError(
            f"Invalid local_plate: {name!r}. Expected the name of a plate around a latent "
            f"site of the model, one of {sorted(frames)}."
        )
    if frames[name].dim is None:
        raise NotImplementedError(
            f"local_plate '{name}' is a loop. Expected a vectorized plate, used by "
            "`with pyro.plate(...)`."
        )
    return frames[name]


def _try_out(proposer: Proposer) -> Structure:
    """
    Two proposals at a time must be what each of them is by itself.

    :return: the structure, with what was found out.
    """
    structure = proposer.structure
    with torch.enable_grad():
        if structure.has_globals:
            with ProposalMessenger():  # out of sight
                proposer.draw_globals()
        tap = TapMessenger()
        with _hint("guide", proposer):
            guide_run = proposer.run(proposer.guide, 2, {}, tap)
    check_reasons(tap, guide_run)
    inside = {n: s for n, s in guide_run.latents.items() if s.log_prob is not None}
    _check_deltas(guide_run, [name for name in inside if name in structure.sites], tap)
    drawn = {
        name: site
        for name, site in inside.items()
        if not isinstance(list(base_dists(site.fn))[-1], Delta)
    }
    with torch.no_grad():
        is_function = not any(map(_has_no_inverse, drawn.values()))
        if is_function:
            rows = _rows(guide_run.sites, guide_run, list(drawn))
            alone = [[_run_alone(proposer, proposer.guide, row) for row in rows] for _ in "ab"]
            together = proposer.log_prob_sum(guide_run)
            # Otherwise there is dropout, of which the mask belongs to the draw.
            is_function = torch.equal(*map(torch.cat, alone))
        if is_function and not _is_close(torch.cat(alone[0]), together):
            raise NotImplementedError(_differs("guide", torch.cat(alone[0]), together))
        rows = _rows(structure.sites, guide_run, [n for n in inside if n in structure.sites])
        alone = [[_run_alone(proposer, proposer.model, row) for row in rows] for _ in "ab"]
        first, second = map(torch.cat, alone)
        if not _is_close(first, second):
            raise NotImplementedError(
                "The log density of the model differs between two runs at the same values, "
                f"by {(first - second).abs().max().item():.3g}. Expected a function of the "
                "latents: switch dropout off by .eval(), and sample what is random."
            )
        if structure.plate is not None:
            _check_outside(proposer, rows)
        structure = _find_a_way(proposer, {n: s.value for n, s in inside.items()}, first)
    if is_function and all(is_normal(site.fn) for site in drawn.values()):
        structure = structure._replace(redraws=tuple(drawn))
    return structure


_REFUSALS = (
    AssertionError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    StructureChanged,
    TypeError,
    UserWarning,
    ValueError,
)


def _find_a_way(proposer: Proposer, values: Values, alone: torch.Tensor) -> Structure:
    """
    How to evaluate the model for several proposals.

    :param values: of two proposals.
    :param alone: log densities of each by itself.
    """
    structure, reasons = proposer.structure, []
    for is_mapped in (False, True):
        proposer.structure = structure._replace(is_looped=is_mapped, is_mapped=is_mapped)
        try:
            with warnings.catch_warnings():
                # What vmap cannot do at once is no gain.
                warnings.filterwarnings("error", ".*performance drop", UserWarning)
                together = proposer.evaluate(2, values).log_p
            if _is_close(alone, together):
                break
            reasons.append(_differs("model", alone, together))
        except _REFUSALS as e:
            reasons.append((str(e) or type(e).__name__).split("Trace Shapes:")[0].strip())
    else:
        proposer.structure = structure._replace(is_looped=True)
    if reasons:
        by_vmap = " by torch.vmap" if proposer.structure.is_mapped else ", which is slow"
        warnings.warn(
            f"The model is evaluated for one proposal at a time{by_vmap}, as it cannot "
            f"be for several along dim {structure.dim}: {reasons[0]}\nExpected a model "
            "that allows for batch dims on the left, as for vectorize_particles=True."
        )
    return proposer.structure


@contextmanager
def _hint(what: str, proposer: Proposer) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        if type(e) not in (IndexError, RuntimeError, TypeError, ValueError):
            raise
        raise type(e)(
            f"{e}\nThe {what} runs once, but not for 2 proposals at a time, along dim "
            f"{proposer.structure.dim} of each site. Expected code that allows for batch "
            "dims on the left, as for vectorize_particles=True: index from the right, and "
            "put batch dims in plates."
        ) from e


def _rows(
    sites: Mapping[str, Any], run: ProposalMessenger, names: Sequence[str]
) -> List[Values]:
    """The values of each of two proposals, in the shapes of a run without proposals."""
    values = {name: strip(sites[name], run.sites[name].value.detach()) for name in names}
    return [{name: value[i] for name, value in values.items()} for i in range(2)]


def _run_alone(proposer: Proposer, fn: Callable, values: Values) -> torch.Tensor:
    return proposer.log_prob_sum(proposer.run_alone(fn, values))


def _check_deltas(
    guide_run: ProposalMessenger, names: Sequence[str], tap: TapMessenger
) -> None:
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
            raise _scaled(name, site.scale)
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


def _scaled(name: str, scale: Any) -> NotImplementedError:
    return NotImplementedError(
        f"Guide site '{name}' is scaled by {scale}. Expected a guide without poutine.scale "
        "inside: put the same scale around the RVRSGuide and the model given to SVI, and "
        "make the RVRSGuide of the unscaled model and guide."
    )


def _check_outside(proposer: Proposer, rows: Sequence[Values]) -> None:
    """No site outside of the local plate may depend on what is inside."""
    plate = proposer.structure.plate
    globals_ = {name: value for name, (value, _) in proposer.globals.items()}
    runs = []
    for row in rows:
        values = {**row, **globals_}
        with ProposalMessenger(values=values, subsamples=proposer.subsamples) as run:
            proposer.model(*proposer.args, **proposer.kwargs)
        runs.append(run.sites)
    for name, site in runs[0].items():
        other = runs[1][name].log_prob
        if all(frame.name != plate for frame in site.frames):
            assert site.log_prob is not None and other is not None
            if not _is_close(site.log_prob, other):
                raise NotImplementedError(
                    f"Site '{name}' is outside of plate '{plate}', and depends on latents "
                    "inside, which are to be accepted item by item. Expected sites outside "
                    "that depend on none inside: leave local_plate=None."
                )


def _is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    rtol = 1e-6 if a.dtype == torch.float64 else 1e-3
    scale = max(1.0, b.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    return torch.allclose(a, b.to(a), rtol=0.0, atol=rtol * scale, equal_nan=True)


def _differs(what: str, alone: torch.Tensor, together: torch.Tensor) -> str:
    return (
        f"the log density of the {what} for two proposals at a time is {together.tolist()}, "
        f"and for one at a time {alone.tolist()}. Expected the same: sum over dims by "
        "negative index, do not use batch normalization, and give each batch dim a plate."
    )
