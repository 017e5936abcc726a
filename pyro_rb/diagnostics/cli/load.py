# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Models, guides and arguments that are named on the command line: ``package.module:name`` or
``path/to/file.py:name``.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from types import FunctionType, ModuleType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pyro
from pyro.infer.autoguide import AutoGuide, AutoMessenger, AutoNormal
from torch import Tensor, nn

from pyro_rb.diagnostics.run.messages import one_line

_SPEC = re.compile(r"(?P<module>.+?)(:(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*))?")


def load_model(spec: str) -> Callable:
    """
    The model that ``spec`` names. A class is called without arguments.

    :raises ValueError: If there is no such thing, or it is not callable.
    """
    found = _load(spec, "--model", "model")
    model = found() if inspect.isclass(found) else found
    if not callable(model):
        raise ValueError(f"--model: expected something callable, got {model!r}")
    return model


def load_guide(spec: Optional[str], model: Callable) -> Callable:
    """
    The guide that ``spec`` names. An AutoGuide class, or a function whose only argument is
    called ``model``, is called with the model; another class without arguments.

    :param str spec: None means AutoNormal.
    :raises ValueError: If there is no such thing, or it is not callable.
    """
    found = AutoNormal if spec is None else _load(spec, "--guide", "guide")
    if inspect.isclass(found):
        guide = found(model) if issubclass(found, (AutoGuide, AutoMessenger)) else found()
    elif inspect.isfunction(found) and list(inspect.signature(found).parameters) == ["model"]:
        guide = found(model)
    else:
        guide = found
    if not callable(guide):
        raise ValueError(f"--guide: expected something callable, got {guide!r}")
    return guide


def load_call(options: Any, model: Callable) -> Tuple[Any, Dict[str, Any]]:
    """
    What model and guide are called with. Without ``--args``: what ``make_args()`` returns, or the
    tuple ``args``, or variables with the names of the model's arguments, of the model's module.

    :raises ValueError: If it is not to be found, or something else.
    """
    spec, module = options.args, _module(options.model, "--model", "model")[0]
    if spec is not None:
        found = _load(spec, "--args", "make_args")
    else:
        spec, found = f"{options.model}, make_args", getattr(module, "make_args", None)
    if options.batches:
        if not callable(found):
            raise ValueError(f"--batches: --args must name a function, got {options.args}")
        if _is_pair(found()):
            raise ValueError(f"--batches: {spec} returned (tuple, dict). Expected a tuple of positional arguments")
        return (lambda: to_device(found(), options.device)), {}
    if found is None:
        return to_device(_implied_args(model, module, options.model), options.device)
    made = found() if callable(found) else found
    args: Any = made
    kwargs: Dict[str, Any] = {}
    if _is_pair(made):
        args, kwargs = made
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            f"--args: {spec} should return a tuple, or (tuple, dict), got {type(args).__name__}"
        )
    return to_device(args, options.device), to_device(kwargs, options.device)


def _is_pair(made: Any) -> bool:
    """Whether these are positional and keyword arguments."""
    is_two = isinstance(made, tuple) and len(made) == 2
    return is_two and isinstance(made[0], (tuple, list)) and isinstance(made[1], dict)


def _implied_args(model: Callable, module: ModuleType, spec: str) -> Tuple[Sequence, Dict[str, Any]]:
    """Arguments from the variables of the model's module."""
    signature = inspect.signature(getattr(model, "forward", model))
    given = getattr(module, "args", None)
    if isinstance(given, (tuple, list)):
        try:
            signature.bind(*given)
            return given, {}
        except TypeError:  # another args
            pass
    args: List[Any] = []
    kwargs: Dict[str, Any] = {}
    missing = []
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = vars(module).get(name, _NOTHING)
        is_data = value is not _NOTHING and not isinstance(value, (FunctionType, ModuleType, type))
        if parameter.default is parameter.empty:
            if not is_data:
                missing.append(name)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        elif parameter.default is None and isinstance(value, Tensor):  # such as obs=None
            kwargs[name] = value
    if missing:
        needed = [n for n, p in signature.parameters.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
        shown = f"({', '.join(needed)}{',' if len(needed) == 1 else ''})"
        raise ValueError(
            f"--model {spec} needs {', '.join(map(repr, missing))}: give --args MODULE:make_args, a function "
            f"that returns {shown}, or define make_args, or {' and '.join(missing)}, in the model's script"
        )
    return tuple(args), kwargs


def to_device(value: Any, device: str) -> Any:
    """Moves tensors and modules, also those in tuples, lists and dicts."""
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


_NOTHING = object()


def _load(spec: str, option: str, usual: str) -> Any:
    """The object that is named; of a file without a name, the one with the usual name."""
    found, name = _module(spec, option, usual)
    what: Any = found
    for part in name.split("."):
        if not hasattr(what, part):
            raise ValueError(f"{option}: module {found.__name__!r} has no {name!r}")
        what = getattr(what, part)
    return what


def _module(spec: str, option: str, usual: str) -> Tuple[ModuleType, str]:
    """The module that is named, and the name of the object in it."""
    match = _SPEC.fullmatch(spec)
    module, name = (match["module"], match["name"]) if match else (spec, None)
    is_file = module.endswith(".py") or "/" in module or os.sep in module
    name = name or (usual if is_file else None)
    if not name:
        raise ValueError(f"{option}: expected package.module:name or path/to/file.py:name, got {spec!r}")
    before = set(pyro.get_param_store())
    try:
        found = _import_file(module, option) if is_file else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if is_file or error.name is None or not (module + ".").startswith(error.name + "."):
            raise ValueError(f"{option}: importing {module!r} failed: {error}") from error
        hint = f"{module.replace('.', '/')}.py:{name}"
        raise ValueError(
            f"{option}: no module named {error.name!r} here; give its path, such as path/to/{hint}, or "
            "add its folder to PYTHONPATH"
        ) from error
    except _NoFile as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(f"{option}: importing {module!r} failed: {one_line(error)}") from error
    if set(pyro.get_param_store()) - before:
        warnings.warn(
            f"importing {module!r} has run and maybe trained a model: what follows starts from its parameters. "
            "Put such lines under: if __name__ == '__main__':"
        )
    return found, name


class _NoFile(Exception):
    pass


def _import_file(path: str, option: str) -> ModuleType:
    """Imports a file as ``python path/to/file.py`` would, or as a part of its package."""
    full = os.path.realpath(os.path.expanduser(path))
    full = full if full.endswith(".py") else full + ".py"
    if not os.path.isfile(full):
        raise _NoFile(f"{option}: there is no file {path!r} in {os.getcwd()}")
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and os.path.realpath(file) == full:
            return module
    folder, stem = os.path.dirname(full), os.path.basename(full)[:-3]
    dotted = stem
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        dotted = f"{package}.{dotted}"
    sys.path.insert(0, folder)
    if dotted != stem:
        return importlib.import_module(dotted)
    # Another module of that name may be there already.
    name = stem if stem not in sys.modules else f"{stem}_{abs(hash(full))}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
