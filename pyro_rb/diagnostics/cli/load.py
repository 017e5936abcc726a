# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Models, guides and arguments that are named on the command line: ``package.module:name``."""

import importlib
import inspect
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from pyro.infer.autoguide import AutoGuide, AutoMessenger, AutoNormal
from torch import Tensor, nn

from pyro_rb.diagnostics.run.messages import one_line


def load_model(spec: str) -> Callable:
    """
    The model that ``spec`` names. A class is called without arguments.

    :param str spec: ``package.module:name``.
    :raises ValueError: If there is no such thing, or it is not callable.
    """
    found = _load(spec, "--model")
    model = found() if inspect.isclass(found) else found
    if not callable(model):
        raise ValueError(f"--model: expected something callable, got {model!r}")
    return model


def load_guide(spec: Optional[str], model: Callable) -> Callable:
    """
    The guide that ``spec`` names. An AutoGuide class, or a function whose only argument is
    called ``model``, is called with the model; another class without arguments.

    :param str spec: ``package.module:name``. None means AutoNormal.
    :raises ValueError: If there is no such thing, or it is not callable.
    """
    found = AutoNormal if spec is None else _load(spec, "--guide")
    if inspect.isclass(found):
        guide = found(model) if issubclass(found, (AutoGuide, AutoMessenger)) else found()
    elif inspect.isfunction(found) and list(inspect.signature(found).parameters) == ["model"]:
        guide = found(model)
    else:
        guide = found
    if not callable(guide):
        raise ValueError(f"--guide: expected something callable, got {guide!r}")
    return guide


def load_args(spec: Optional[str]) -> Tuple[Sequence, Dict[str, Any]]:
    """
    The positional and keyword arguments of model and guide.

    :param str spec: ``package.module:name`` of a tuple, or of a function that returns a
        tuple or (tuple, dict). None means no arguments.
    :raises ValueError: If there is no such thing, or it is something else.
    """
    if spec is None:
        return (), {}
    found = _load(spec, "--args")
    made = found() if callable(found) else found
    if isinstance(made, tuple) and len(made) == 2:
        if isinstance(made[0], (tuple, list)) and isinstance(made[1], dict):
            return made
    if not isinstance(made, (tuple, list)):
        raise ValueError(
            f"--args: {spec} should return a tuple, or (tuple, dict), "
            f"got {type(made).__name__}"
        )
    return made, {}


def load_call(options: Any) -> Tuple[Any, Dict[str, Any]]:
    """What model and guide are called with, by ``--args``, ``--batches`` and ``--device``."""
    if options.batches:
        return load_batches(options.args, options.device), {}
    args, kwargs = load_args(options.args)
    return to_device(args, options.device), to_device(kwargs, options.device)


def load_batches(spec: Optional[str], device: str) -> Callable[[], Sequence]:
    """
    A function that makes new positional arguments at each call.

    :raises ValueError: If ``spec`` does not name a function.
    """
    function = None if spec is None else _load(spec, "--args")
    if not callable(function):
        raise ValueError(f"--batches: --args must name a function, got {spec}")
    return lambda: to_device(function(), device)


def to_device(value: Any, device: str) -> Any:
    """Moves tensors and modules, also those in tuples, lists and dicts."""
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _load(spec: str, option: str) -> Any:
    """The object that ``package.module:name`` names."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{option}: expected package.module:name, got {spec!r}")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ValueError(f"{option}: importing {module_name!r} failed: {error}") from error
        raise ValueError(f"{option}: no module named {error.name!r}") from error
    except Exception as error:
        raise ValueError(
            f"{option}: importing {module_name!r} failed: {one_line(error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option}: module {module_name!r} has no {name!r}")
        found = getattr(found, part)
    return found
