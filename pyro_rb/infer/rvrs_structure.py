# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Looks at a model and a guide before they are first used by an RVRSGuide, and refuses what
would be silently wrong.
"""

import warnings
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
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
    Structure,
    Values,
    check_reasons,
    missing_site,
    no_path_gradient,
    strip,
)
from pyro_rb.ops.graph import leaves
from pyro_rb.ops.score_identity import base_dists
from pyro_rb.poutine import ProposalMessenger, TapMessenger
from pyro_rb.poutine.proposal_messenger import Site

#: Log densities with more elements in a proposal than this are evaluated twice.
SMALL = 20_000


def find_structure(
    model: Callable,
    guide: Callable,
    args: Tuple,
    kwargs: Dict,
    local_plate: Optional[str],
) -> Structure:
    """
    Runs model and guide once as they are, once for two proposals at a time, and again
    for each of these.

    :raises ValueError: if the guide lacks a latent site of the model, or there is no such
        local plate around one.
    :raises NotImplementedError: naming the site, for what cannot be done.
    """
    if isinstance(unwrap(guide), Messenger):
        raise NotImplementedError(
            f"Found a GuideMessenger, {type(unwrap(guide)).__name__}. Expected a guide that "
            "runs by itself, such as AutoNormal, or a function."
        )
    guide_run, model_run = _run_both(model, guide, args, kwargs)
    for name in model_run.latents:
        if name not in guide_run.sites:
            raise missing_site(name)
    for name, site in guide_run.latents.items():
        if not getattr(site.fn, "has_rsample", False):
            raise no_path_gradient(name, site.fn, "not reparameterised")
    _warn_of_surplus(guide_run, model_run)

    sites = [*guide_run.sites.values(), *model_run.sites.values()]
    options: Dict[str, Any] = {}
    if local_plate is not None:
        frame = _find_plate(local_plate, model_run)
        in_plate = {n: _is_in(local_plate, s) for n, s in guide_run.latents.items()}
        for name, site in model_run.latents.items():
            if _is_in(local_plate, site) and not in_plate[name]:
                raise NotImplementedError(
                    f"Site '{name}' is inside of plate '{local_plate}' in the model, but not "
                    "in the guide. Expected a guide that draws it inside of the plate, such "
                    "as AutoNormal or a function."
                )
        options = {
            "plate": local_plate,
            "plate_dim": frame.dim,
            "has_globals": not all(in_plate.values()),
            "num_items": frame.size,
            "is_subsampled": frame.full_size not in (None, frame.size),
        }
    num_elements = sum(
        site.log_prob.numel() for site in sites if site.log_prob is not None
    )
    structure = Structure(
        dim=_left_of_plates(sites),
        is_small=num_elements <= SMALL,
        sites=model_run.latents,
        **options,
    )
    proposer = Proposer(model, guide, args, kwargs, structure)
    is_looped = _try_out(proposer, model_run.latents)
    return structure._replace(is_looped=is_looped)


def find_dim(model: Callable, guide: Callable, args: Tuple, kwargs: Dict) -> int:
    """The dim of proposals."""
    runs = _run_both(model, guide, args, kwargs)
    return _left_of_plates([site for run in runs for site in run.sites.values()])


def _run_both(
    model: Callable, guide: Callable, args: Tuple, kwargs: Dict
) -> Tuple[ProposalMessenger, ProposalMessenger]:
    subsamples: Values = {}
    with torch.no_grad():
        with ProposalMessenger(subsamples=subsamples) as guide_run:
            guide(*args, **kwargs)
        values = {name: site.value for name, site in guide_run.latents.items()}
        with ProposalMessenger(values=values, subsamples=subsamples) as model_run:
            model(*args, **kwargs)
    return guide_run, model_run


def _left_of_plates(sites: Sequence[Site]) -> int:
    dims = [frame.dim for site in sites for frame in site.frames if frame.dim is not None]
    return min(dims, default=0) - 1


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


def _is_in(plate: str, site: Site) -> bool:
    return any(frame.name == plate for frame in site.frames)


def _find_plate(name: str, run: ProposalMessenger) -> CondIndepStackFrame:
    frames = {f.name: f for site in run.latents.values() for f in site.frames}
    if name not in frames:
        raise ValueError(
            f"Invalid local_plate: {name!r}. Expected the name of a plate around a latent "
            f"site of the model, one of {sorted(frames)}."
        )
    if frames[name].dim is None:
        raise NotImplementedError(
            f"local_plate '{name}' is a loop. Expected a vectorised plate, used by "
            "`with pyro.plate(...)`."
        )
    return frames[name]


def _try_out(proposer: Proposer, model_sites: Mapping[str, Site]) -> bool:
    """
    Two proposals at a time must be what each of them is by itself.

    :return: whether the model can only be run for one at a time.
    """
    with torch.enable_grad():
        if proposer.structure.has_globals:
            with ProposalMessenger():  # out of sight
                proposer.draw_globals()
        tap = TapMessenger()
        with _hint("guide", proposer):
            guide_run = proposer.run(proposer.guide, 2, {}, tap)
    check_reasons(tap, guide_run)
    names = proposer.latents(guide_run)
    _check_deltas(guide_run, [n for n in names if n in model_sites], tap)
    drawn = [
        name
        for name in names
        if not isinstance(list(base_dists(guide_run.sites[name].fn))[-1], Delta)
    ]
    with torch.no_grad():
        rows = _rows(guide_run.sites, guide_run, drawn)
        alone = [[_run_alone(proposer, proposer.guide, row) for row in rows] for _ in "ab"]
        together = proposer.log_prob_sum(guide_run)
        # Otherwise there is dropout, of which the mask belongs to the draw.
        if torch.equal(*map(torch.cat, alone)) and not _is_close(torch.cat(alone[0]), together):
            raise NotImplementedError(_differs("guide", torch.cat(alone[0]), together))
        rows = _rows(model_sites, guide_run, [n for n in names if n in model_sites])
        alone = [[_run_alone(proposer, proposer.model, row) for row in rows] for _ in "ab"]
        first, second = map(torch.cat, alone)
        if not _is_close(first, second):
            raise NotImplementedError(
                "The log density of the model differs between two runs at the same values, "
                f"by {(first - second).abs().max().item():.3g}. Expected a function of the "
                "latents: switch dropout off by .eval(), and sample what is random."
            )
        if proposer.structure.plate is not None:
            _check_outside(proposer, rows)
        values = {name: guide_run.sites[name].value for name in names}
        try:
            together = proposer.log_prob_sum(proposer.run(proposer.model, 2, values))
            why = "" if _is_close(first, together) else _differs("model", first, together)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
            why = str(e) or type(e).__name__
            why = why.split("Trace Shapes:")[0].strip()
    if why:
        warnings.warn(
            "The model is evaluated for one proposal at a time, which is slow, as it cannot "
            f"be for several along dim {proposer.structure.dim}: {why}\nExpected a model "
            "that allows for batch dims on the left, as for vectorize_particles=True."
        )
    return bool(why)


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
    sites: Mapping[str, Site], run: ProposalMessenger, names: Sequence[str]
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
        if ((torch.as_tensor(site.scale) - 1).abs() > 1e-6).any():
            raise _scaled(name, site.scale)
        if name in tap.path.values:
            continue
        for x in (site.log_prob, site.value):
            if x.requires_grad and (x.grad_fn is None or any(leaves(x, stop))):
                raise NotImplementedError(
                    f"Guide site '{name}' of type {type(site.fn).__name__} is computed from "
                    "parameters, not from draws alone. Expected draws from a "
                    "reparameterised distribution, or functions of such draws without "
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
        "negative index, do not use batch normalisation, and give each batch dim a plate."
    )
