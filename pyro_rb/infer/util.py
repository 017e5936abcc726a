# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The one place that touches Pyro's private names.
"""

import weakref
from contextlib import contextmanager
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Tuple,
)

import torch
from pyro import get_param_store, poutine
from pyro.distributions import MaskedDistribution
from pyro.infer.traceenum_elbo import (
    _check_tmc_elbo_constraint,
    _compute_model_factors,
    shared_intermediates,
)
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import _ENUM_ALLOCATOR
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import (
    check_if_enumerated,
    check_model_guide_match,
    check_site_shape,
)

from pyro_rb.ops.importance import unsqueeze_right
from pyro_rb.ops.transforms import is_inside_of_func

#: The plate that Pyro puts around vectorized particles.
PARTICLES = "num_particles_vectorized"
#: Names of the vectorized plates that a site is in, as symbols.
Ordinal = FrozenSet[str]


def sample_sites(trace: Trace) -> Iterator[Tuple[str, Any]]:
    """Names and sites of a trace, of type sample: latent, observed and subsampling."""
    return ((n, site) for n, site in trace.nodes.items() if site["type"] == "sample")


def shapes(*traces: Trace) -> Tuple:
    """Of log densities and values, with the names of the sites."""
    return tuple(
        (name, site["log_prob"].shape, getattr(site["value"], "shape", None))
        for trace in traces
        for name, site in sample_sites(trace)
    )


def is_replayed() -> bool:
    """
    Whether the code runs inside of a handler that may supply values of sample sites,
    so that a guide's values need not be draws of its distributions.

    >>> import pyro
    >>> is_replayed()
    False
    >>> with pyro.poutine.replay(trace=pyro.poutine.Trace()):
    ...     is_replayed()
    True
    """
    return any(isinstance(frame, ReplayMessenger) for frame in _PYRO_STACK)


def site_values(*traces: Trace) -> List[torch.Tensor]:
    """The tensors that sample statements and :func:`pyro.param` statements returned."""
    nodes = [site for trace in traces for site in trace.nodes.values()]
    values = [site["value"] for site in nodes if site["type"] in ("sample", "param")]
    return [value for value in values if isinstance(value, torch.Tensor)]


def find_density_scale(site: Any) -> Any:
    """
    The factor by which ``scale`` and all masks multiply the log density of a site's draw.

    :param site: of a trace, with a ``log_prob``.
    :return: a float, or a tensor that can be broadcast to the draw, or None if the factor
        has a gradient, or a mask is inside of a transform.

    >>> import pyro, pyro.distributions as dist
    >>> with pyro.poutine.trace() as tp, pyro.poutine.scale(scale=0.5):
    ...     _ = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> find_density_scale(tp.trace.nodes["z"])
    0.5
    """
    layer = fn = site["fn"]
    mask = 1.0 if site["mask"] is None else site["mask"]
    factor = _sum_to(site["scale"] * mask, fn.batch_shape)
    if isinstance(factor, torch.Tensor):
        factor = unsqueeze_right(factor, fn.event_dim)
    is_transformed = False
    while layer is not None:
        if isinstance(layer, MaskedDistribution):
            if is_transformed:
                return None
            mask = layer._mask
            if isinstance(mask, torch.Tensor):
                mask = unsqueeze_right(mask, layer.event_dim)
            factor = factor * mask
        is_transformed |= isinstance(layer, torch.distributions.TransformedDistribution)
        layer = getattr(layer, "base_dist", None)
    if not isinstance(factor, torch.Tensor):
        return float(factor)
    return None if factor.requires_grad else factor


def _sum_to(factor: Any, batch_shape: torch.Size) -> Any:
    """A larger batch of factors than of draws multiplies each draw's density by their sum."""
    if not isinstance(factor, torch.Tensor):
        return factor
    shape = torch.broadcast_shapes(factor.shape, batch_shape)
    return factor if shape == batch_shape else factor.expand(shape).sum_to_size(batch_shape)


def under(messenger: Messenger, fn: Callable) -> Callable:
    """
    Returns ``fn`` such that it runs under a messenger outside of all that are, and inside of
    each that may stop a message: what it makes of a value, all others see.

    >>> outer, inner = Messenger(), Messenger()
    >>> with inner:
    ...     under(outer, lambda: _PYRO_STACK == [outer, inner])()
    True
    """
    return partial(_run_under, messenger, fn)


def _run_under(messenger: Messenger, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    with messenger:  # starts it anew
        pass
    installed: Dict[int, Messenger] = {
        i + 1: _InsideBlock(frame, messenger)
        for i, frame in enumerate(_PYRO_STACK)
        if isinstance(frame, BlockMessenger)
    }
    for place in sorted(installed, reverse=True):
        _PYRO_STACK.insert(place, installed[place])
    _PYRO_STACK.insert(0, messenger)
    try:
        return fn(*args, **kwargs)
    finally:
        for frame in [messenger, *installed.values()]:
            _PYRO_STACK.remove(frame)


class _InsideBlock(Messenger):
    """Hands to a messenger outside of a block the messages that the block stops."""

    def __init__(self, block: BlockMessenger, messenger: Messenger) -> None:
        super().__init__()
        self._block, self._messenger = block, messenger

    def _process_message(self, msg: Any) -> None:
        if self._block.hide_fn(msg):
            self._messenger._process_message(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if self._block.hide_fn(msg):
            self._messenger._postprocess_message(msg)


def reserve_dims(leftmost: int) -> None:
    """Gives sites outside of :func:`pyro.markov`, from now on, dims left of ``leftmost``."""
    _ENUM_ALLOCATOR.next_available_dim = min(_ENUM_ALLOCATOR.next_available_dim, leftmost - 1)


def forget_parameters() -> None:
    """
    Makes the ``SVI.step`` that is being made believe that there are no parameters, so that it
    does not call its optimizer.

    >>> import pyro, torch
    >>> with pyro.poutine.trace(param_only=True) as capture:
    ...     _ = pyro.param("loc", torch.zeros(()))
    ...     forget_parameters()
    >>> list(capture.trace.nodes)
    []
    """
    for frame in _PYRO_STACK:
        if isinstance(frame, TraceMessenger) and frame.param_only:
            for name in frame.trace.param_nodes:
                frame.trace.remove_node(name)


class Cost(NamedTuple):
    """A term of the ELBO, as ``TraceEnum_ELBO`` takes its expectation."""

    #: The site of model or guide. Empty for a sum over sites that the model enumerates.
    site: str
    ordinal: Ordinal
    #: Packed.
    value: Any


def compute_costs(
    model_trace: Trace, guide_trace: Trace
) -> Tuple[List[Cost], Dict[str, Ordinal]]:
    """
    The terms of the ELBO, of which ``pyro.infer.util.Dice`` takes the expectation.

    :param model_trace: packed, as by ``pack_tensors``.
    :param guide_trace: likewise.
    :return: log probabilities of the model, in which sites that the model enumerates are
        summed out, and negative ones of the guide; and the ordinal of each site.
    """
    names = {id(site["packed"]["log_prob"]): n for n, site in sample_sites(model_trace)}
    terms, log_factors, ordering, sum_dims, scale = _compute_model_factors(
        model_trace, guide_trace
    )
    costs = [Cost(names[id(x)], t, x) for t, xs in terms.items() for x in xs]
    if log_factors and is_inside_of_func():
        summed = [
            name
            for name, site in sample_sites(model_trace)
            if name not in guide_trace and site["infer"].get("_enumerate_dim") is not None
        ]
        raise NotImplementedError(
            f"Found torch.func around a model that enumerates the sites {summed}, whose sums Pyro does "
            "not compute there. Expected these sites in the guide, or loss.backward()."
        )
    if log_factors:
        dim_to_size = {
            dim: size
            for terms in log_factors.values()
            for term in terms
            for dim, size in zip(term._pyro_dims, term.shape)
        }
        with shared_intermediates() as cache:
            ring = SampleRing(cache=cache, dim_to_size=dim_to_size)
            log_factors = contract_tensor_tree(log_factors, sum_dims, ring=ring)
        for ordinal, terms in log_factors.items():
            scaled = [packed.scale_and_mask(term, scale=scale) for term in terms]
            costs.extend(Cost("", ordinal, term) for term in scaled)
    for name, site in sample_sites(guide_trace):
        costs.append(Cost(name, ordering[name], packed.neg(site["packed"]["log_prob"])))
    return costs, ordering


def compute_baseline(
    name: str, site: Any, downstream_cost: torch.Tensor
) -> Tuple[torch.Tensor, Any]:
    """
    Evaluates and updates what ``infer={"baseline": {...}}`` asks for at a guide site.

    :param downstream_cost: detached, of the shape of the site's batch.
    :return: the baseline, of the same shape, and the loss of its own parameters.
    :raises ValueError: naming the site, if the baseline has another shape.
    :raises NotImplementedError: inside of :mod:`torch.func`.
    """
    if is_inside_of_func():
        raise NotImplementedError(
            f"Found torch.func around infer={{'baseline': ...}} at guide site '{name}', which learns "
            "parameters of its own. Expected a site without it, or loss.backward()."
        )
    _, loss, baseline = _construct_baseline(name, site, downstream_cost)
    return torch.as_tensor(baseline, device=downstream_cost.device), loss


def is_guide_messenger(guide: Any) -> bool:
    """Whether a guide runs the model inside of itself."""
    return isinstance(poutine.unwrap(guide), Messenger)


def get_traces(
    model: Any, guide: Any, args: Tuple, kwargs: Dict[str, Any]
) -> Tuple[Trace, Trace]:
    """Runs a guide, and a model against it, as ``pyro.infer.enum.get_importance_trace`` does."""
    if is_guide_messenger(guide):
        guide(*args, **kwargs)
        messenger: Any = poutine.unwrap(guide)
        model_trace, guide_trace = messenger.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def prune(model_trace: Trace, guide_trace: Trace, max_plate_nesting: Any) -> Tuple[Trace, Trace]:
    """
    What ``pyro.infer.enum.get_importance_trace`` does before it computes log densities: compares
    the traces, if validation is on, and leaves out subsampling.
    """
    if is_validation_enabled():
        model, guide = (_pad_shapes(trace, max_plate_nesting) for trace in (model_trace, guide_trace))
        check_model_guide_match(model, guide, max_plate_nesting)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def _pad_shapes(trace: Trace, max_plate_nesting: Any) -> Trace:
    """
    A trace for a comparison of shapes. Of a shape that is longer than ``max_plate_nesting`` and shorter
    than that and the event together, Pyro would drop dims of the event.
    """
    short: Dict[str, Any] = {}
    for name, site in sample_sites(trace):
        event_dim = getattr(site["fn"], "event_dim", 0)
        shape = site["fn"].shape(*site["args"], **site["kwargs"]) if event_dim > 1 else ()
        num_missing = max_plate_nesting + event_dim - len(shape)
        if max_plate_nesting < len(shape) and num_missing > 0:
            short[name] = {**site, "fn": _Shaped(event_dim, (1,) * num_missing + shape)}
    if not short:
        return trace
    padded = trace.copy()
    padded.nodes.update(short)
    return padded


class _Shaped(NamedTuple):
    """Stands for a distribution, where only its shape matters."""

    event_dim: int
    sizes: Tuple[int, ...]

    def shape(self, *args: Any, **kwargs: Any) -> torch.Size:
        return torch.Size(self.sizes)


def check_traces(
    model_trace: Trace, guide_trace: Trace, max_plate_nesting: Any, enumerates: bool
) -> None:
    """
    What ``Trace_ELBO``, or ``TraceEnum_ELBO``, checks of traces with log densities, if
    validation is on; but for warnings that a site outside of a plate comes after one
    inside, which need not depend on it.
    """
    if is_validation_enabled():
        for trace in (model_trace, guide_trace):
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    check_site_shape(site, max_plate_nesting)
        if enumerates:
            _check_tmc_elbo_constraint(model_trace, guide_trace)
        else:
            check_if_enumerated(guide_trace)


def pack_traces(model_trace: Trace, guide_trace: Trace) -> None:
    """
    Names the dims of densities by plates and sites, as terms of different weights need.

    :raises ValueError: naming a site, if its density has a dim that is that of no plate.
    """
    try:
        guide_trace.pack_tensors()
        model_trace.pack_tensors(guide_trace.plate_to_symbol)
    except ValueError as e:
        for name, site in [*sample_sites(guide_trace), *sample_sites(model_trace)]:
            shape = tuple(site["log_prob"].shape)
            known = {*site["infer"].get("_dim_to_symbol", ())}
            if any(size > 1 and i - len(shape) not in known for i, size in enumerate(shape)):
                dims = sorted(f.dim for f in site["cond_indep_stack"] if f.vectorized)
                raise ValueError(
                    f"Found log densities of shape {shape} at site '{name}', which has plates at the dims "
                    f"{dims}. Expected a plate for each dim of a size other than 1, since some sites "
                    "have several values, whose weights are by plate. Often an observation "
                    "of shape [N, 1] has a mean of shape [N]: give both the same shape, or make the dim part "
                    "of the event by .to_event(). Or use STLTrace_ELBO, R2G2_ELBO or Trace_ELBO, which add up all "
                    "elements, whatever they belong to."
                ) from e
        raise


def parameter_table() -> Dict[str, torch.Tensor]:
    """The unconstrained parameters in the param store, by name; not a copy."""
    table: Dict[str, torch.Tensor] = get_param_store()._params
    return table


def set_parameter_table(table: Mapping[str, torch.Tensor]) -> None:
    """
    Puts back parameters that have been replaced or made since.

    :param table: a copy of what :func:`parameter_table` returned.
    """
    store = get_param_store()
    for name, parameter in list(store._params.items()):
        if table.get(name) is not parameter:
            store._param_to_name.pop(parameter, None)
            if name in table:
                store._params[name] = table[name]
                store._param_to_name[table[name]] = name
            else:
                del store._params[name], store._constraints[name]


def is_plain_call() -> bool:
    """Whether no handler is around the code but those that collect parameters, as SVI does."""
    return all(map(_only_collects, _PYRO_STACK))


def _only_collects(frame: Any) -> bool:
    if isinstance(frame, TraceMessenger):
        return bool(frame.param_only)
    cls = type(frame)
    is_plain = cls._process_message is Messenger._process_message
    is_plain &= cls._postprocess_message is Messenger._postprocess_message
    return is_plain and not any(hasattr(cls, name) for name in _ACTIVE)


#: Methods of handlers that do something to a site.
_ACTIVE = ("_pyro_sample", "_pyro_post_sample", "_pyro_subsample", "_pyro_post_subsample", "_pyro_param")


@contextmanager
def without_handlers() -> Iterator[None]:
    """Within, code runs as if there were no handler around it."""
    saved = _PYRO_STACK[:]
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = saved


def announce_parameters(named: Mapping[str, torch.Tensor]) -> None:
    """
    Tells handlers that collect parameters that these were used, as their statements would.

    :param named: unconstrained parameters that are in the param store.

    >>> import pyro, torch
    >>> loc = pyro.param("loc", torch.zeros(()))
    >>> with pyro.poutine.trace(param_only=True) as capture:
    ...     announce_parameters({"loc": loc.unconstrained()})
    >>> list(capture.trace.nodes)
    ['loc']
    """
    for frame in _PYRO_STACK:
        for name, parameter in named.items() if hasattr(frame, "_pyro_post_param") else ():
            # As Pyro does for a parameter without a constraint.
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
            msg = {"type": "param", "name": name, "value": parameter}
            frame._pyro_post_param(msg)  # type: ignore[attr-defined]
