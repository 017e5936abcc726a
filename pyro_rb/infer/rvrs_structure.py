# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Looks at a model and a guide before they are first used by an RVRSGuide: finds their sites and plates,
and how to evaluate them for several proposals.
"""

import warnings
import zlib
from typing import (
    Any,
    Callable,
    Dict,
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

from pyro_rb.infer.rvrs_checks import (
    check_deltas,
    check_local_sites,
    check_outside,
    check_reasons,
    check_sites,
    differs,
    is_close,
    is_known_at_draw_only,
)
from pyro_rb.infer.rvrs_proposals import Proposer, Values, strip
from pyro_rb.infer.rvrs_signature import (
    Latent,
    Structure,
    StructureChanged,
    is_in,
    shapes,
    sign,
)
from pyro_rb.ops.normal import is_normal
from pyro_rb.ops.score_identity import base_dists
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
    model: Callable, guide: Callable, args: Tuple, kwargs: Dict, local_plate: Optional[str], found: Look
) -> Structure:
    """
    Runs model and guide for two proposals at a time, and again for each of these.

    :param found: by :func:`look`.
    :raises ValueError: if the guide lacks a latent site of the model, or there is no such
        local plate around one.
    :raises NotImplementedError: naming the site, for what cannot be done.
    """
    guide_run, model_run = found.guide, found.model
    check_sites(guide, guide_run, model_run, local_plate)
    dims = [frame.dim for site in found.sites for frame in site.frames if frame.dim is not None]
    structure = Structure(
        dim=min(dims, default=0) - 1,
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
        structure = structure._replace(
            frame=_find_plate(local_plate, model_run),
            is_chosen=local_plate in guide_run.has_chosen | model_run.has_chosen,
            has_globals=not all(is_in(local_plate, s.frames) for s in guide_run.latents.values()),
        )
        check_local_sites(local_plate, guide_run, model_run)
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


def _count(site: Site) -> int:
    sizes = [x.numel() for x in (site.value, site.log_prob) if isinstance(x, torch.Tensor)]
    return max(sizes, default=0)


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
        guide_run = _draw_two(proposer, tap)
    check_reasons(tap, guide_run)
    inside = {n: s for n, s in guide_run.latents.items() if s.log_prob is not None}
    check_deltas(guide_run, [name for name in inside if name in structure.sites], tap)
    drawn = {
        name: site
        for name, site in inside.items()
        if not isinstance(list(base_dists(site.fn))[-1], Delta)
    }
    with torch.no_grad():
        is_function = not any(map(is_known_at_draw_only, drawn.values()))
        if is_function:
            rows = _rows(guide_run.sites, guide_run, list(drawn))
            alone, again = _evaluate_twice(proposer, proposer.guide, rows)
            together = proposer.log_prob_sum(guide_run)
            # Otherwise there is dropout, of which the mask belongs to the draw.
            is_function = torch.equal(alone, again)
            if is_function and not is_close(alone, together):
                raise NotImplementedError(differs("guide", alone, together))
        rows = _rows(structure.sites, guide_run, [n for n in inside if n in structure.sites])
        alone, again = _evaluate_twice(proposer, proposer.model, rows)
        if not is_close(alone, again):
            raise NotImplementedError(
                "The log density of the model differs between two runs at the same values, "
                f"by {(alone - again).abs().max().item():.3g}. Expected a function of the "
                "latents: switch dropout off by .eval(), and sample what is random."
            )
        if structure.plate is not None:
            check_outside(structure.plate, *[_run_whole_model(proposer, row) for row in rows])
        structure = _find_a_way(proposer, {n: s.value for n, s in inside.items()}, alone)
    if is_function and all(is_normal(site.fn) for site in drawn.values()):
        structure = structure._replace(redraws=tuple(drawn))
    return structure


_REFUSALS = (AssertionError, IndexError, RuntimeError, StructureChanged, TypeError, UserWarning, ValueError)


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
            if is_close(alone, together):
                break
            reasons.append(differs("model", alone, together))
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


def _draw_two(proposer: Proposer, tap: TapMessenger) -> ProposalMessenger:
    try:
        return proposer.run(proposer.guide, 2, {}, tap)
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        if type(e) not in (IndexError, RuntimeError, TypeError, ValueError):
            raise
        raise type(e)(
            f"{e}\nThe guide runs once, but not for 2 proposals at a time, along dim "
            f"{proposer.structure.dim} of each site. Expected code that allows for batch "
            "dims on the left, as for vectorize_particles=True: index from the right, and "
            "put batch dims in plates."
        ) from e


def _rows(sites: Mapping[str, Any], run: ProposalMessenger, names: Sequence[str]) -> List[Values]:
    """The values of each of two proposals, in the shapes of a run without proposals."""
    values = {name: strip(sites[name], run.sites[name].value.detach()) for name in names}
    return [{name: value[i] for name, value in values.items()} for i in range(2)]


def _evaluate_twice(proposer: Proposer, fn: Callable, rows: List[Values]) -> List[torch.Tensor]:
    """Log densities of each proposal by itself, in two runs."""
    return [torch.cat([proposer.log_prob_sum(proposer.run_alone(fn, row)) for row in rows]) for _ in "ab"]


def _run_whole_model(proposer: Proposer, row: Values) -> ProposalMessenger:
    values = {**row, **{name: value for name, (value, _) in proposer.globals.items()}}
    with ProposalMessenger(values=values, subsamples=proposer.subsamples) as run:
        proposer.model(*proposer.args, **proposer.kwargs)
    return run
