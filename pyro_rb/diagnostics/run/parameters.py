# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters a model and guide have, found by running them once: :func:`find_parameters`."""

from typing import Any, Callable, Dict, Mapping, Optional

from torch import Tensor, nn

from pyro_rb.diagnostics.run.arguments import Arguments
from pyro_rb.diagnostics.run.sites import parameters_of, run_traces


def find_parameters(
    model: Callable,
    guide: Callable,
    args: Arguments = (),
    kwargs: Optional[Mapping[str, Any]] = None,
) -> Dict[str, Tensor]:
    """
    The unconstrained parameters of a model and guide, each tensor once. Both are run.

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
