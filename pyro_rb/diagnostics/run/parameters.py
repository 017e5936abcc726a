# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters and sites a model and guide have, found by running them once."""

import operator
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn

#: Positional arguments of model and guide, or a function that returns those of a step.
Arguments = Union[Sequence, Callable[[], Sequence]]


def find_parameters(
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
) -> Dict[str, Tensor]:
    """
    The unconstrained parameters of a model and guide, each tensor once. Runs both.

    First come the ``pyro.param`` sites of guide and model, by their names in the param
    store. Then the remaining parameters of guide and model as :class:`torch.nn.Module` (or
    of the module whose methods they are) by their names in the module; where such a name is
    taken, it is preceded by ``guide.`` or ``model.``. Parameters that do not require a
    gradient are left out. A parameter that appears only in some runs may be missed.

    :returns: Leaf tensors by name.
    :rtype: dict

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     scale = pyro.param("scale", torch.tensor(2.), constraint=dist.constraints.positive)
    ...     pyro.sample("z", dist.Normal(0., scale))
    >>> {name: round(tensor.item(), 3) for name, tensor in find_parameters(model, guide).items()}
    {'scale': 0.693}
    """
    traces = run_traces(model, guide, args, dict(kwargs or {}))
    return parameters_of(traces, model, guide)[0]


def current_args(args: Arguments) -> Sequence:
    """
    The positional arguments of model and guide for one step: ``args`` or what it returns.

    :raises TypeError: If that is no tuple.

    **Example**

    >>> current_args(lambda: (1, 2))
    (1, 2)
    """
    given = args() if callable(args) else args
    if not isinstance(given, (tuple, list)):
        what = "args(): expected it to return" if callable(args) else "args: expected"
        raise TypeError(
            f"{what} a tuple of the arguments of model and guide, such as (data,), got "
            f"{type(given).__name__}; for minibatches give a function that draws one and returns it"
        )
    return given


def _check_batches(args: Callable[[], Sequence]) -> None:
    """Minibatches must be those of the random numbers, so that losses can be compared."""
    state = get_rng_state()
    first = current_args(args)
    set_rng_state(state)
    again = current_args(args)
    set_rng_state(state)
    pairs = [pair for pair in zip(first, again) if isinstance(pair[0], Tensor)]
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            "args(): it returned other values when called again with the same random numbers. Draw "
            "the minibatch by the generators of torch, numpy or random, such as "
            "data[torch.randperm(len(data))[:32]], so that all losses see the same"
        )


def run_traces(
    model: Callable, guide: Callable, args: Arguments, kwargs: Dict[str, Any]
) -> Tuple[poutine.Trace, poutine.Trace]:
    """
    The trace of one run of the guide, and that of the model replayed against it.

    :raises TypeError: If one of the four is something else.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     scale = pyro.param("scale", torch.tensor(2.), constraint=dist.constraints.positive)
    ...     pyro.sample("z", dist.Normal(0., scale))
    >>> guide_trace, model_trace = run_traces(model, guide, (), {})
    >>> (model_trace.nodes["z"]["value"] == guide_trace.nodes["z"]["value"]).item()
    True
    """
    for role, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{role}: expected something callable, got {function!r}")
        if isinstance(function, type):
            name = function.__name__
            hint = f"{name}(model)" if role == "guide" else f"{name}()"
            raise TypeError(f"{role}: {name} is a class; give an instance, such as {hint}")
    if callable(args):
        _check_batches(args)
    args = current_args(args)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)


def parameters_of(
    traces: Sequence[poutine.Trace], model: Callable, guide: Callable
) -> Tuple[Dict[str, Tensor], bool]:
    """
    As :func:`find_parameters`, and whether any of them is a ``pyro.param`` site.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     scale = pyro.param("scale", torch.tensor(2.), constraint=dist.constraints.positive)
    ...     pyro.sample("z", dist.Normal(0., scale))
    >>> parameters, any_site = parameters_of(run_traces(model, guide, (), {}), model, guide)
    >>> list(parameters), any_site
    (['scale'], True)
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


def module_parameters(*functions: Callable) -> Dict[str, Tensor]:
    """
    Parameters of model and guide as modules, as ``model.weight`` and so on.

    **Example**

    >>> list(module_parameters(nn.Linear(2, 1), lambda: None))
    ['model.weight', 'model.bias']
    """
    found: Dict[str, Tensor] = {}
    for role, function in zip(("model", "guide"), functions):
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            found.update({f"{role}.{name}": p for name, p in owner.named_parameters()})
    return found


def check_sites(traces: Sequence[poutine.Trace]) -> None:
    """
    Raises a ``ValueError`` unless the guide samples the model's latent sites and no others
    (auxiliary sites, and model sites that are enumerated, aside).

    **Example**

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("y", dist.Normal(0., 1.))
    >>> check_sites(run_traces(model, guide, (), {}))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: model and guide do not match: the model's latent site 'z' is not sampled by ...
    """
    guide_trace, model_trace = traces

    def sampled(trace: poutine.Trace, exempt: str) -> List[str]:
        return [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and not site["is_observed"]
            and not site_is_subsample(site)
            and not (site["infer"] or {}).get(exempt)
        ]

    in_guide = sampled(guide_trace, "is_auxiliary")
    in_model = sampled(model_trace, "")
    surplus = [name for name in in_guide if name not in in_model]
    missing = [
        name for name in sampled(model_trace, "enumerate") if name not in guide_trace.nodes
    ]
    if surplus or missing:
        found = []
        if missing:
            found.append(f"the model's latent {_sites(missing)} not sampled by the guide")
        if surplus:
            found.append(f"the guide's {_sites(surplus)} not in the model")
        raise ValueError(
            f"model and guide do not match: {'; '.join(found)}. Each latent site needs the "
            "same name in both; mark a site that only the guide needs by "
            "infer={'is_auxiliary': True}"
        )


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ValueError(
            "model and guide have no parameter that requires a gradient: "
            "expected a pyro.param() or a torch.nn.Parameter in one of them"
        )
    for name, tensor in parameters.items():
        if not (tensor.is_leaf and tensor.requires_grad):
            raise ValueError(
                f"parameters[{name!r}] is not a leaf that requires a gradient; "
                "of a constrained parameter give the unconstrained tensor, "
                "pyro.param(name).unconstrained()"
            )


def unconstrained(value: Any) -> Tensor:
    """
    The leaf behind the value of a ``pyro.param`` site.

    **Example**

    >>> import pyro, torch
    >>> pyro.clear_param_store()
    >>> scale = pyro.param("scale", torch.tensor(1.), constraint=pyro.distributions.constraints.positive)
    >>> unconstrained(scale).item()
    0.0
    """
    # A module-local parameter without constraint has lost the attribute, and is itself.
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def integer(name: str, value: Any) -> int:
    """
    An argument that has to be an integer, of Python, numpy or torch.

    :raises TypeError: If it is not.

    **Example**

    >>> integer("num_samples", torch.tensor(3))
    3
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def _sites(names: List[str]) -> str:
    listed = ", ".join(repr(name) for name in names)
    return f"site {listed} is" if len(names) == 1 else f"sites {listed} are"
