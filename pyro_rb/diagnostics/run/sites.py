# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a guide and model, and what sites and parameters it shows."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from pyro.ops.provenance import get_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_rb.diagnostics.run.arguments import Arguments, check_batches, current_args
from pyro_rb.infer.run_mixin import RunMixin
from pyro_rb.infer.traces import sample_sites
from pyro_rb.ops.family import strip_independent

Traces = Tuple[poutine.Trace, poutine.Trace]


def run_traces(model: Callable, guide: Callable, args: Arguments, kwargs: Dict[str, Any]) -> Traces:
    """
    The trace of one run of the guide, and that of the model replayed against it.

    :raises TypeError: If one of the four is something else.
    """
    for role, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{role}: expected something callable, got {function!r}")
        if isinstance(function, type):
            name = function.__name__
            hint = f"{name}(model)" if role == "guide" else f"{name}()"
            raise TypeError(f"{role}: {name} is a class; give an instance, such as {hint}")
    if callable(args):
        check_batches(args)
    args = current_args(args)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)


class Sites(NamedTuple):
    """
    What a run has shown; without its tensors, which may be large. Lists have names of latent sites.

    :param list latent: In the guide.
    :param list discrete: Of these.
    :param list countable: Those of them that Pyro can enumerate.
    :param list annotated: Those of them for which ``infer["enumerate"]`` is set.
    :param list scored: In the guide, without a reparameterized draw.
    :param list left_out: Those of them of whose cost ``Trace_ELBO`` leaves out a part: sites that the guide alone has,
        and sites with a scale that has a gradient.
    :param list jacobians: In the guide: Deltas with a log density.
    :param list summed: In the model only, which it enumerates.
    :param list subsampled: Plates that subsample and hold all sites, observed ones too.
    :param bool has_subsample: Whether any plate subsamples.
    :param bool is_point: Whether the guide has Deltas only.
    :param int depth: How deep plates are nested.
    :param int largest_latent: Number of elements at one latent site of the guide, at most.
    :param int largest: At one site of the model, at most.
    """

    latent: List[str]
    discrete: List[str]
    countable: List[str]
    annotated: List[str]
    scored: List[str]
    left_out: List[str]
    jacobians: List[str]
    summed: List[str]
    subsampled: List[str]
    has_subsample: bool
    is_point: bool
    depth: int
    largest_latent: int
    largest: int

    @property
    def reference(self) -> str:
        """Of Pyro's losses, the one whose gradient others are compared with: without bias, and the simplest."""
        return "TraceEnum_ELBO" if self.summed or self.left_out else "Trace_ELBO"


def read_sites(traces: Traces) -> Sites:
    """:param traces: Of guide and model."""
    guide, model = (latent_sites(trace) for trace in traces)
    names = {name for name, _ in guide}
    discrete = [(name, site) for name, site in guide if _is_discrete(site["fn"])]
    countable = [(name, site) for name, site in discrete if getattr(site["fn"], "has_enumerate_support", False)]
    scored = [(name, site) for name, site in guide if not _is_reparameterized(site["fn"])]
    in_model = {name for name, _ in model}
    samples: List[Any] = [s for trace in traces for s in trace.nodes.values() if s["type"] == "sample"]
    frames = [frame for site in samples for frame in site["cond_indep_stack"]]
    return Sites(
        latent=[name for name, _ in guide],
        discrete=[name for name, _ in discrete],
        countable=[name for name, _ in countable],
        annotated=[name for name, site in countable if site["infer"].get("enumerate")],
        scored=[name for name, _ in scored],
        left_out=[n for n, s in scored if n not in in_model or getattr(s["scale"], "requires_grad", False)],
        jacobians=[name for name, site in guide if _has_log_density(site["fn"])],
        summed=[n for n, site in model if n not in names and (site["infer"] or {}).get("enumerate")],
        subsampled=_enclosing_subsamples(samples),
        has_subsample=bool(_subsampled(samples)),
        is_point=all(isinstance(strip_independent(site["fn"]), dist.Delta) for _, site in guide),
        depth=max([-frame.dim for frame in frames if frame.dim is not None], default=0),
        largest_latent=max([_size(site) for _, site in guide], default=0),
        largest=max(_size(site) for site in traces[1].nodes.values()),
    )


def check_sites(traces: Traces) -> None:
    """
    :raises ValueError: Unless the guide samples the model's latent sites and no others (auxiliary sites, and model
        sites that are enumerated, aside).
    """
    guide, model = (latent_sites(trace) for trace in traces)
    in_model = [name for name, _ in model]
    surplus = [n for n, site in guide if n not in in_model and not (site["infer"] or {}).get("is_auxiliary")]
    missing = [
        name
        for name, site in model
        if name not in traces[0].nodes and not (site["infer"] or {}).get("enumerate")
    ]
    found = []
    if missing:
        found.append(f"the model's latent {_listed(missing)} not sampled by the guide")
    if surplus:
        found.append(f"the guide's {_listed(surplus)} not in the model")
    if found:
        raise ValueError(
            f"model and guide do not match: {'; '.join(found)}. Each latent site needs the "
            "same name in both; mark a site that only the guide needs by "
            "infer={'is_auxiliary': True}"
        )


def parameters_of(traces: Traces, model: Callable, guide: Callable) -> Tuple[Dict[str, Tensor], bool]:
    """
    As :func:`~pyro_rb.diagnostics.run.parameters.find_parameters`, and whether any of them is a ``pyro.param`` site.
    """
    found: Dict[str, Tensor] = {}
    seen = set()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param" and name not in found:
                tensor = unconstrained(site["value"])
                if tensor.requires_grad and id(tensor) not in seen:
                    found[name] = tensor
                    seen.add(id(tensor))
    any_site = bool(found)
    for role, function in (("guide", guide), ("model", model)):
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            for name, tensor in owner.named_parameters():
                if tensor.requires_grad and id(tensor) not in seen:
                    found[f"{role}.{name}" if name in found else name] = tensor
                    seen.add(id(tensor))
    return found, any_site


def unconstrained(value: Any) -> Tensor:
    """The leaf behind the value of a ``pyro.param`` site."""
    # A module-local parameter without constraint has lost the attribute, and is itself.
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def leaves(traces: Traces) -> List[Tensor]:
    """The leaves of the graph behind all sites: what a backward pass gives gradients to."""
    tensors: List[Any] = []
    sites: List[Any] = [s for trace in traces for s in trace.nodes.values() if s["type"] == "sample"]
    for site in sites:
        tensors.append(site["value"])
        try:
            tensors.append(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
        except (ValueError, RuntimeError, NotImplementedError):  # then there is no gradient either
            pass
    queue = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    seen, found = set(queue), []
    while queue:
        function = queue.pop()
        if hasattr(function, "variable"):
            found.append(function.variable)
        following = {parent for parent, _ in function.next_functions if parent is not None} - seen
        seen |= following
        queue.extend(following)
    return found


def settle_plates(loss: Any, sites: Sites) -> None:
    """
    Tells a loss how deep the plates are nested, if it would guess. It would say so in the log, each
    time that one is made.
    """
    guesses = isinstance(loss, (TraceEnum_ELBO, RunMixin)) or getattr(loss, "vectorize_particles", False)
    if guesses and loss.max_plate_nesting == math.inf:
        loss.max_plate_nesting = sites.depth + (loss.vectorize_particles and loss.num_particles > 1)


def without_dependents(loss: TraceGraph_ELBO, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> List[str]:
    """
    Sites of the guide without a reparameterized draw, on which no other site depends as far as
    :class:`~pyro.infer.tracegraph_elbo.TraceGraph_ELBO` knows. It follows tensors. What a value
    decides by ``if``, ``while``, ``range()`` or ``.item()`` it takes for independent of it,
    leaves it out of the costs of that site, and its gradient is biased.
    """
    model_trace, guide_trace = next(iter(loss._get_traces(model, guide, args, kwargs)))
    seen: Set[str] = set()
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
        for name, site in sample_sites(trace):
            seen |= get_provenance(site["log_prob"]) - {name}
    scored = [n for n, s in latent_sites(guide_trace) if not getattr(s["fn"], "has_rsample", False)]
    return [name for name in scored if name not in seen]


def beyond_particles(loss: Any, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> List[str]:
    """
    Sites whose distributions have more dimensions than plates and vectorized particles: a value that carries the
    particles meets another dimension there. Pyro broadcasts both, without a word, and each row counts once for each.
    """
    particles = pyro.plate("num_particles_vectorized", loss.num_particles, dim=-loss.max_plate_nesting)
    guide_trace, model_trace = run_traces(particles(model), particles(guide), args, kwargs)
    shapes = {
        name: getattr(site["fn"], "batch_shape", ())  # a subsample has none
        for trace in (guide_trace, model_trace)
        for name, site in sample_sites(trace)
    }
    return [name for name, shape in shapes.items() if len(shape) > loss.max_plate_nesting]


def latent_sites(trace: poutine.Trace) -> List[Tuple[str, Any]]:
    """Sample sites with their names, without observed ones and subsampling."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    ]


def _subsampled(samples: Sequence[Any]) -> Set[str]:
    return {s["name"] for s in samples if site_is_subsample(s) and len(s["value"]) < s["fn"].size}


def _enclosing_subsamples(samples: Sequence[Any]) -> List[str]:
    held = [{f.name for f in s["cond_indep_stack"]} for s in samples if not site_is_subsample(s)]
    return sorted(name for name in _subsampled(samples) if all(name in names for names in held))


def _is_discrete(fn: Any) -> bool:
    if getattr(fn, "has_enumerate_support", False):
        return True
    try:
        return not _is_reparameterized(fn) and bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):  # a support that is not known
        return not _is_reparameterized(fn)


def _is_reparameterized(fn: Any) -> bool:
    return bool(getattr(fn, "has_rsample", False))


def _has_log_density(fn: Any) -> bool:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta) and bool(torch.any(torch.as_tensor(fn.log_density, device=fn.v.device) != 0))


def _size(site: Any) -> int:
    value = site.get("value")
    return value.numel() if isinstance(value, Tensor) else 1


def _listed(names: List[str]) -> str:
    listed = ", ".join(repr(name) for name in names)
    return f"site {listed} is" if len(names) == 1 else f"sites {listed} are"
