# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch

from pyro_rb.ops.linear_call import LinearCall, find_rows
from pyro_rb.ops.projection import Means, choose_solver, find_means, pays
from pyro_rb.ops.projection_of_map import find_means_of_map
from pyro_rb.ops.transforms import is_inside_of_func
from pyro_rb.poutine.gaussian_site import View, overlap
from pyro_rb.poutine.local_draws import LocalDraws
from pyro_rb.poutine.random_factor import RandomFactor

ROWS = "rows >= fan-in"
TRANSFORMED = "used inside of a function transform or checkpoint"
DOES_NOT_PAY = "would not pay (solver='auto')"


class ProjectionOptions(NamedTuple):
    """
    :param str solver: one of ``pyro_rb.ops.projection.SOLVERS``.
    :param LocalDraws local: where pre-activations may be drawn row by row; None, where
        weights are shared by all rows.
    :param bool has_moments: whether sites are told the moments of their noise.
    """

    solver: str = "auto"
    local: Optional[LocalDraws] = None
    has_moments: bool = False


class _Means(NamedTuple):
    """The conditional mean of the noise of an argument, and the mean of its square."""

    factor: RandomFactor
    noise: torch.Tensor
    square: Optional[torch.Tensor]


class _Plain(Exception):
    """Says why a use is left as it is."""


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
        random = [factor] if term is None else [factor, term]
        local = options.local
        if local is not None and local.allows(call, random):
            _note(call, views, random, "local", f"{call.func.__name__}: {len(call.args[0])} rows")
            for f in random:
                f.site.condition(f.view, f.free)
            return local.draw(call, random)
        # With gradients: autocast keeps what it casts, and would keep it without.
        z = call({}).detach()
        _check_dtypes(call, z)
        # No mode around this one takes what a solver looks at for a use.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            means, summary = _solve(call, z, factor, term, options)
    except _Plain as e:
        return str(e)
    z_star = call({f.position: f.value(noise) for f, noise, _ in means})
    _note(call, views, [f for f, *_ in means], "projected", summary)
    for f, noise, square in means:
        f.site.condition(f.view, f.free, noise, square)
    # Exactly z, with the gradients of z_star: also those to the other factor.
    return z + (z_star - z_star.detach())


def _find_factors(
    call: LinearCall, views: Dict[int, View]
) -> Tuple[RandomFactor, Optional[RandomFactor]]:
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
    random: List[RandomFactor],
    treatment: str,
    summary: str,
) -> None:
    for f in random:
        f.site.project(f.view.elements, treatment, summary)
    for position in views.keys() - {f.position for f in random}:
        view = views[position]
        view.site.use(view.elements, _why_taken(view))


def _factor(position: int, view: View) -> RandomFactor:
    is_open = not (view.has_repeats or view.is_edited)
    return RandomFactor(position, view, view.free if is_open else None)


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
    if is_inside_of_func():
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
    factor: RandomFactor,
    term: Optional[RandomFactor],
    options: ProjectionOptions,
) -> Tuple[List[_Means], str]:
    """What is known of the noise of each random argument, and a summary."""
    solver = options.solver
    random = [factor] if term is None else [factor, term]
    is_diagonal = all(f.site.draw.is_diagonal for f in random)
    form = find_rows(call, factor.position, term is not None) if is_diagonal else None
    name = call.func.__name__
    if form is None:
        return _solve_map(call, z, random, options, name)
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
    chosen = choose_solver(solver, m, k, num_units, options.has_moments)
    found = find_means(rows, scale, noise, chosen, options.has_moments)
    summary = f"{name}: {m} rows, fan-in {k}, {chosen}"
    if term is None:
        return [_Means(factor, *_map(form.from_units, found))], summary
    weights = _map(lambda x: form.from_units(x[..., :-1]), found)
    return [_Means(factor, *weights), _Means(term, *_map(lambda x: x[..., -1], found))], summary


def _map(fn: Any, found: Means) -> Means:
    mean, square = found
    return fn(mean), None if square is None else fn(square)


def _solve_map(
    call: LinearCall,
    z: torch.Tensor,
    random: List[RandomFactor],
    options: ProjectionOptions,
    name: str,
) -> Tuple[List[_Means], str]:
    """The same for any linear map: convolutions, correlated noise."""
    solver = options.solver
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
    found = find_means_of_map(linear_map, flat, solver, options.has_moments)
    if found is None:
        raise _Plain(f"{name}: the solver did not converge")
    parts = split(found[0])
    squares = {} if found[1] is None else split(found[1])
    summary = f"{name}: {z.numel()} rows, {sum(sizes)} elements, {solver}"
    return [
        _Means(f, parts[key], squares.get(key) if f.site.draw.is_diagonal else None)
        for f, key in zip(random, keys)
    ], summary
