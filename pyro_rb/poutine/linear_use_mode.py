# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch.overrides import TorchFunctionMode

from pyro_rb.ops.linear_call import LinearCall
from pyro_rb.poutine.gaussian_site import GaussianSite, Step, View
from pyro_rb.poutine.projected_use import ProjectionOptions, project_use

#: Results show elements of the first argument, each once if their number is the same.
_SHAPES = frozenset(
    """T mT H mH adjoint broadcast_to clone contiguous expand expand_as flatten movedim
    moveaxis permute ravel reshape reshape_as squeeze swapaxes swapdims t transpose
    unflatten unsqueeze view view_as""".split()
)
#: Results show elements of the first argument, chosen by the others.
_CHOICES = frozenset(
    """__getitem__ chunk index_select narrow select split split_with_sizes tensor_split
    unbind""".split()
)
#: Nothing is learned about the elements.
_METADATA = frozenset(
    """__hash__ __len__ __repr__ can_cast device dim dtype element_size get_device grad_fn
    has_names itemsize layout names nbytes ndim ndimension nelement numel output_nr
    requires_grad result_type retains_grad shape size storage_offset stride
    _version""".split()
)
_METADATA_OF_SECOND = frozenset("expand_as reshape_as type_as view_as".split())
_CASTS = frozenset("cpu cuda double float to type".split())
#: Memory may be changed through the result, or behind its back.
_LEAKS = frozenset(
    """__setitem__ data data_ptr numpy __array__ __dlpack__ __cuda_array_interface__ storage
    untyped_storage set_ share_memory_ resize_""".split()
)
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class LinearUseMode(TorchFunctionMode):
    """
    Watches what PyTorch functions do with Gaussian values while it is on, and projects
    the noise at linear uses. All other uses are noted, and run as they are.

    An element is projected at its first use at most. A further use of it, of any kind,
    makes the run void: see ``GaussianSite.violated``.

    :param ProjectionOptions options: how to project.
    :param str reason: why nothing is to be projected, if so.
    """

    def __init__(self, options: ProjectionOptions, reason: str = "") -> None:
        super().__init__()
        self._options = options
        self._reason = reason
        #: Whether linear uses are projected, or only noted.
        self.projects = True
        self.sites: Dict[str, GaussianSite] = {}
        self._views: Dict[int, View] = {}  # keeps the tensors, lest an id be used again

    def forget(self) -> None:
        """Forgets all sites."""
        self.sites.clear()
        self._views.clear()

    def add_site(self, site: GaussianSite, value: torch.Tensor) -> None:
        """Starts to watch the value of a site."""
        self.sites[site.name] = site
        self._views[id(value)] = View(site, value)

    def find(self, value: Any) -> Optional[View]:
        """What is known of a tensor."""
        view = self._views.get(id(value))
        return view if view is not None and view.tensor is value else None

    @property
    def views(self) -> List[View]:
        return list(self._views.values())

    def __torch_function__(
        self, func: Callable, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found: List[View] = []
        self._collect(args, found)
        if kwargs:
            self._collect(kwargs.values(), found)
        if not found:
            if func in _DERIVATIVES:
                self._note_derivative()
            return func(*args, **kwargs)
        name = _name(func)
        if _is_harmless(name, args, kwargs, found):
            return func(*args, **kwargs)
        if name in _SHAPES or name in _CHOICES:
            if len(found) == 1 and args and args[0] is found[0].tensor:
                return self._view(func, name, args, kwargs, found[0])
        result = self._project(func, args, kwargs, found)
        if isinstance(result, torch.Tensor):
            return result
        if name in _CASTS:
            same = func(*args, **kwargs)
            if same is found[0].tensor:
                return same
        if func in _DERIVATIVES:
            self._note_derivative()
        changes = name in _LEAKS or kwargs.get("out") is not None or _is_in_place(name)
        for view in found:
            view.site.use(True if changes else view.elements, result)
        return func(*args, **kwargs)

    def _collect(self, items: Iterable[Any], found: List[View]) -> None:
        """What is known of the tensors in nested arguments."""
        for item in items:
            view = self._views.get(id(item))
            if view is not None and view.tensor is item:
                found.append(view)
            elif isinstance(item, (tuple, list)):
                self._collect(item, found)
            elif isinstance(item, dict):
                self._collect(item.values(), found)

    def _project(
        self, func: Callable, args: Tuple, kwargs: Any, found: List[View]
    ) -> Union[torch.Tensor, str]:
        """The result of a projected use; or the reason why there is none."""
        call = LinearCall.bind(func, args, kwargs)
        if call is None:
            return f"non-linear use ({_name(func)})"
        views = {i: v for i, v in enumerate(map(self.find, call.args)) if v is not None}
        if len(views) < len(found):
            return f"non-linear use ({_name(func)})"
        reason = self._reason or ("" if self.projects else "used in the guide")
        return reason or project_use(call, views, self._options)

    def _view(
        self, func: Callable, name: str, args: Tuple, kwargs: Any, parent: View
    ) -> Any:
        found = func(*args, **kwargs)
        args, kwargs = _freeze(args[1:]), _freeze(kwargs)
        results = list(enumerate(found)) if isinstance(found, (tuple, list)) else [(None, found)]
        for item, result in results:
            if self.find(result) is not None:
                continue
            if result.dtype != parent.tensor.dtype:
                parent.site.use(parent.elements, f"non-linear use ({name})")
                continue
            is_whole = name in _SHAPES and result.numel() == parent.tensor.numel()
            step = Step(func, args, kwargs, item)
            self._views[id(result)] = View(parent.site, result, parent, step, is_whole)
        return found

    def _note_derivative(self) -> None:
        # Derivatives of projected uses are not those of the uses.
        for site in self.sites.values():
            if site.projected is not None:
                site.violate(site.projected, "torch.autograd inside of the model")


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if name == "__get__" else f"{attribute}_"
    return name


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_harmless(name: str, args: Tuple, kwargs: Any, found: List[View]) -> bool:
    if len(found) == 1:
        is_first = bool(args) and args[0] is found[0].tensor
        if is_first and (
            name in _METADATA
            or name.startswith(("is_", "new_"))
            or name.endswith("_like")
            or (name == "type" and len(args) == 1 and not kwargs)
        ):
            return True
        return len(args) == 2 and args[1] is found[0].tensor and name in _METADATA_OF_SECOND
    # Validation asks for NaN in this way.
    return name in ("eq", "__eq__") and len(args) == 2 and args[0] is args[1]


def _freeze(x: Any) -> Any:
    """A copy that later changes in place do not reach."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, (tuple, list)):
        return type(x)(map(_freeze, x)) if type(x) in (tuple, list) else x
    if isinstance(x, dict):
        return {key: _freeze(item) for key, item in x.items()}
    return x
