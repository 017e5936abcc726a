# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import torch

from pyro_rb.ops.linear_call import LinearCall, find_rows
from pyro_rb.ops.projection import choose_solver, pays, project_map, project_rows
from pyro_rb.poutine.gaussian_site import Elements, GaussianSite, View, overlap

ROWS = "rows >= fan-in"
TRANSFORMED = "used inside of a function transform or checkpoint"
DOES_NOT_PAY = "would not pay (solver='auto')"


class ProjectionOptions(NamedTuple):
    """
    :param str pre_activations: ``"shared"`` or ``"local"``.
    :param str solver: one of ``pyro_rb.ops.projection.SOLVERS``.
    """

    pre_activations: str = "shared"
    solver: str = "auto"


class _Plain(Exception):
    """Says why a use is left as it is."""


class _Factor(NamedTuple):
    """A random argument of a call, with what may be projected of it."""

    position: int
    view: View
    free: Elements

    @property
    def site(self) -> GaussianSite:
        return self.view.site

    @property
    def noise(self) -> torch.Tensor:
        """Of the argument; of the whole site, where elements go together."""
        draw = self.site.draw
        return self.view.replay(draw.noise) if draw.is_diagonal else draw.noise

    @property
    def free_scale(self) -> torch.Tensor:
        """The scale of a diagonal one, zero where nothing is projected."""
        scale = self.view.replay(self.site.draw.scale)
        return scale if self.free is True else scale * torch.as_tensor(self.free)

    def spread(self, noise: torch.Tensor) -> torch.Tensor:
        """The share of the argument that free noise has."""
        draw = self.site.draw
        if draw.is_diagonal:
            return self.free_scale * noise
        return self.view.replay(draw.spread(noise))

    def value(self, noise: torch.Tensor) -> torch.Tensor:
        """The argument, with other noise where it is free."""
        draw = self.site.draw
        if not draw.is_diagonal:
            return self.view.replay(draw.loc + draw.spread(noise))
        if self.free is not True:
            noise = torch.where(torch.as_tensor(self.free), noise, self.noise)
        return self.view.replay(draw.loc) + self.view.replay(draw.scale) * noise


def project_use(
    call: LinearCall, views: Dict[int, View], options: ProjectionOptions
) -> Union[torch.Tensor, str]:
    """
    Evaluates a linear call such that gradients see the conditional mean of the noise
    given the result, in the place of the noise.

    :param LinearCall call: the call.
    :param dict views: the Gaussian arguments, by position.
    :param ProjectionOptions options: of the estimator.
    :return: the result; or the reason why it was not projected.
    """
    try:
        factor, term = _find_factors(call, views)
        _check_factors(call)
        if options.pre_activations == "local" and _can_be_local(call, factor, term):
            return _draw_locally(call, views, factor, term)
        # With gradients: autocast keeps what it casts, and would keep it without.
        z = call({}).detach()
        _check_dtypes(call, z)
        with torch.no_grad():
            stars, summary = _solve(call, z, factor, term, options.solver)
    except _Plain as e:
        return str(e)
    z_star = call({f.position: f.value(noise) for f, noise in stars})
    _note(call, views, [f for f, _ in stars], "projected", summary)
    # Exactly z, with the gradients of z_star: also those to the other factor.
    return z + (z_star - z_star.detach())


def _find_factors(
    call: LinearCall, views: Dict[int, View]
) -> Tuple[_Factor, Optional[_Factor]]:
    """The random factor, and the random term if there is one that may be projected too."""
    found = [i for i in call.factors if i in views]
    if not found:
        raise _Plain(f"{ROWS} (added to a product)")
    if len(found) > 1:
        raise _Plain("product of Gaussian values")
    if not torch.is_grad_enabled():
        raise _Plain("used without gradient")
    if is_transformed():
        raise _Plain(TRANSFORMED)
    factor = _factor(found[0], views[found[0]])
    if factor.free is None:
        raise _Plain(_why_taken(factor.view))
    if call.term is None or call.term not in views:
        return factor, None
    term = _factor(call.term, views[call.term])
    if term.free is None:
        return factor, None
    if term.site is factor.site and factor.site.draw.is_diagonal:
        if overlap(term.view.elements, factor.view.elements) is not None:
            raise _Plain("used twice")
    return factor, term


def _note(
    call: LinearCall,
    views: Dict[int, View],
    random: List[_Factor],
    treatment: str,
    summary: str,
) -> None:
    for f in random:
        f.site.project(f.view.elements, treatment, summary)
    for position in views.keys() - {f.position for f in random}:
        view = views[position]
        view.site.use(view.elements, _why_taken(view))


def _factor(position: int, view: View) -> _Factor:
    is_open = not (view.has_repeats or view.is_edited)
    return _Factor(position, view, view.free if is_open else None)


def _why_taken(view: View) -> str:
    if view.is_edited:
        return "changed in place"
    if view.has_repeats:
        return "shows an element more than once"
    if overlap(view.elements, view.site.used) is not None:
        return "used twice"
    return view.site.plain_reason


def is_transformed() -> bool:
    """Whether tensors may be other than they seem, or are to be made a second time."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(False) is not None


def _check_factors(call: LinearCall) -> None:
    for i in call.factors:
        x = call.args[i]
        if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.layout != torch.strided:
            raise _Plain(f"{call.func.__name__} of sparse or other tensors")
        if not x.numel():
            raise _Plain(f"{call.func.__name__} of no elements")


def _check_dtypes(call: LinearCall, z: torch.Tensor) -> None:
    dtypes = {call.args[i].dtype for i in call.factors} | {z.dtype}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise _Plain(f"{call.func.__name__} with a result of {z.dtype}")


def _solve(
    call: LinearCall,
    z: torch.Tensor,
    factor: _Factor,
    term: Optional[_Factor],
    solver: str,
) -> Tuple[List[Tuple[_Factor, torch.Tensor]], str]:
    """The conditional mean of the noise of each random argument, and a summary."""
    random = [factor] if term is None else [factor, term]
    is_diagonal = all(f.site.draw.is_diagonal for f in random)
    form = find_rows(call, factor.position, term is not None) if is_diagonal else None
    name = call.func.__name__
    if form is None:
        return _solve_map(call, z, random, solver, name)
    rows = form.rows
    units = [form.to_units(x) for x in (factor.free_scale, factor.noise)]
    if term is not None:
        one = torch.ones_like(rows[..., :1])
        rows = torch.cat([rows, one], -1)
        extra = [term.free_scale, term.noise]
        units = [torch.cat([x, y.unsqueeze(-1)], -1) for x, y in zip(units, extra)]
    scale, noise = units
    m, k = rows.shape[-2:]
    if m >= k:
        raise _Plain(f"{ROWS} ({name}: {m} >= {k})")
    num_units = noise.numel() // k
    if solver == "auto" and not pays(m, k, num_units):
        raise _Plain(f"{name}: {m} rows, fan-in {k}: {DOES_NOT_PAY}")
    chosen = choose_solver(solver, m, k, num_units)
    found = project_rows(rows, scale, noise, chosen)
    summary = f"{name}: {m} rows, fan-in {k}, {chosen}"
    if term is None:
        return [(factor, form.from_units(found))], summary
    return [(factor, form.from_units(found[..., :-1])), (term, found[..., -1])], summary


def _solve_map(
    call: LinearCall, z: torch.Tensor, random: List[_Factor], solver: str, name: str
) -> Tuple[List[Tuple[_Factor, torch.Tensor]], str]:
    """The same for any linear map: convolutions, correlated noise."""
    # Two arguments from one correlated site share its noise.
    noises = {id(f.site) if not f.site.draw.is_diagonal else id(f): f.noise for f in random}
    keys = [id(f.site) if not f.site.draw.is_diagonal else id(f) for f in random]
    sizes = [noise.numel() for noise in noises.values()]
    if z.numel() >= sum(sizes):
        raise _Plain(f"{ROWS} ({name}: {z.numel()} >= {sum(sizes)})")
    if solver == "auto" and sum(sizes) < 2 * z.numel():
        raise _Plain(f"{name}: {z.numel()} rows, {sum(sizes)} elements: {DOES_NOT_PAY}")
    fixed = {}
    if call.term is not None:
        fixed[call.term] = torch.zeros_like(call.args[call.term])

    def split(flat: torch.Tensor) -> Dict[int, torch.Tensor]:
        parts = zip(noises.items(), flat.split(sizes))
        return {key: part.reshape(noise.shape) for (key, noise), part in parts}

    def linear_map(flat: torch.Tensor) -> torch.Tensor:
        parts = split(flat)
        return call({**fixed, **{f.position: f.spread(parts[k]) for f, k in zip(random, keys)}})

    flat = torch.cat([noise.reshape(-1) for noise in noises.values()])
    found = project_map(linear_map, flat, solver)
    if found is None:
        raise _Plain(f"{name}: the solver did not converge")
    parts = split(found)
    summary = f"{name}: {z.numel()} rows, {sum(sizes)} elements, {solver}"
    return [(f, parts[key]) for f, key in zip(random, keys)], summary


def _can_be_local(call: LinearCall, factor: _Factor, term: Optional[_Factor]) -> bool:
    random = [factor] if term is None else [factor, term]
    return (
        call.is_layer
        and factor.position == 1
        and all(f.site.draw.is_diagonal and f.free is True for f in random)
    )


def _draw_locally(
    call: LinearCall, views: Dict[int, View], factor: _Factor, term: Optional[_Factor]
) -> torch.Tensor:
    """Draws the pre-activations of each row with noise of their own."""
    x = call.args[0]
    random = [factor] if term is None else [factor, term]
    mean = call({f.position: f.view.replay(f.site.draw.loc) for f in random})
    variances = {f.position: f.view.replay(f.site.draw.variance) for f in random}
    if call.term is not None and term is None:
        variances[call.term] = torch.zeros_like(call.args[call.term])
    variance = call({0: x.square(), **variances})
    # The slope of a square root is infinite at zero, where a unit has no noise.
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    _note(call, views, random, "local", f"{call.func.__name__}: {len(x)} rows")
    return torch.addcmul(mean, deviation, torch.randn_like(variance))
