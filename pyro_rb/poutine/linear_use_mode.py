# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Optional,
    Tuple,
    Union,
)

import torch
from torch.overrides import TorchFunctionMode

from pyro_rb.ops.linear_call import LinearCall
from pyro_rb.poutine.gaussian_site import GaussianSite, Step, View
from pyro_rb.poutine.projected_use import (
    TRANSFORMED,
    ProjectionOptions,
    is_transformed,
    project_use,
)


def _functions(names: str) -> FrozenSet[Callable]:
    """The functions, methods and getters of PyTorch that have these names."""
    found = (
        getattr(space, name, None) for name in names.split() for space in (torch, torch.Tensor)
    )
    functions = (f if callable(f) else getattr(f, "__get__", None) for f in found)
    return frozenset(f for f in functions if f is not None)


#: Results show elements of the first argument, each once if their number is the same.
_SHAPES = _functions(
    """T mT H mH adjoint broadcast_to clone contiguous expand expand_as flatten movedim
    moveaxis permute ravel reshape reshape_as squeeze swapaxes swapdims t transpose
    unflatten unsqueeze view view_as"""
)
#: Results show elements of the first argument, chosen by the others.
_CHOICES = _functions(
    """__getitem__ chunk index_select narrow select split split_with_sizes tensor_split
    unbind"""
)
#: Nothing is learned about the elements of the first argument.
_METADATA = _functions(
    """__hash__ __len__ __repr__ can_cast device dim dtype element_size get_device
    has_names itemsize layout names nbytes ndim ndimension nelement numel output_nr
    requires_grad result_type retains_grad shape size storage_offset stride _version
    empty_like full_like ones_like rand_like randint_like randn_like zeros_like
    new new_empty new_empty_strided new_full new_ones new_tensor new_zeros
    is_complex is_conj is_contiguous is_cpu is_cuda is_distributed is_floating_point
    is_inference is_leaf is_meta is_mkldnn is_mps is_neg is_nested is_pinned is_quantized
    is_same_size is_shared is_signed is_sparse is_sparse_csr is_xla is_xpu"""
)
_METADATA_OF_SECOND = _functions("expand_as is_same_size reshape_as type_as view_as")
_EQUALITY = _functions("eq __eq__")
_CASTS = _functions("cpu cuda double float to type")
#: Memory may be changed through the result, or behind its back.
_LEAKS = frozenset(
    """__setitem__ data data_ptr numpy __array__ __dlpack__ __cuda_array_interface__ storage
    untyped_storage set_ share_memory_ resize_""".split()
)
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
# Of PyTorch before 2.3 the compiler looks away from modes.
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


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
        self._by_memory: Dict[int, View] = {}

    def forget(self) -> None:
        """Forgets all sites."""
        for known in (self.sites, self._views, self._by_memory):
            known.clear()

    def add_site(self, site: GaussianSite, value: torch.Tensor) -> None:
        """Starts to watch the value of a site."""
        self.sites[site.name] = site
        self._add(View(site, value))

    def _add(self, view: View) -> None:
        memory = _address(view.tensor)
        if memory:
            self._by_memory.setdefault(memory, view)
        self._views[id(view.tensor)] = view

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
        if _is_compiling():
            return func(*args, **kwargs)
        if self._options.local is not None:
            self._options.local.note_call(func, args, kwargs)
        found: List[View] = []
        self._collect(args, found)
        if kwargs:
            self._collect(kwargs.values(), found)
        if not found:
            if func in _DERIVATIVES:
                self._note_derivative()
            return func(*args, **kwargs)
        if _is_harmless(func, args, kwargs, found):
            return func(*args, **kwargs)
        if func in _SHAPES or func in _CHOICES:
            if len(found) == 1 and args and args[0] is found[0].tensor:
                return self._view(func, args, kwargs, found[0])
        result = self._project(func, args, kwargs, found)
        if isinstance(result, torch.Tensor):
            return result
        if func in _CASTS:
            same = func(*args, **kwargs)
            if same is found[0].tensor:
                return same
        if func in _DERIVATIVES:
            self._note_derivative()
        name = _name(func)
        changes = name in _LEAKS or kwargs.get("out") is not None or _is_in_place(name)
        for view in found:
            view.site.use(True if changes else view.elements, result)
        return func(*args, **kwargs)

    def _collect(self, items: Iterable[Any], found: List[View]) -> None:
        """What is known of the tensors in nested arguments."""
        for item in items:
            if isinstance(item, torch.Tensor):
                view = self._views.get(id(item))
                if view is None or view.tensor is not item:
                    view = self._find_memory(item)
                if view is not None:
                    found.append(view)
            elif isinstance(item, (tuple, list)):
                self._collect(item, found)
            elif isinstance(item, dict):
                self._collect(item.values(), found)

    def _find_memory(self, x: torch.Tensor) -> Optional[View]:
        """What is known of a tensor that was made of a known one by means not seen."""
        memory = _address(x)
        if memory:
            return self._by_memory.get(memory)
        inner = _unwrap(x)  # a function transform has wrapped it
        return None if inner is x else self.find(inner) or self._find_memory(inner)

    def _project(
        self, func: Callable, args: Tuple, kwargs: Any, found: List[View]
    ) -> Union[torch.Tensor, str]:
        """The result of a projected use; or the reason why there is none."""
        call = LinearCall.bind(func, args, kwargs)
        if call is None:
            return f"non-linear use ({_name(func)})"
        views = {i: v for i, v in enumerate(map(self.find, call.args)) if v is not None}
        if len(views) < len(found):
            return TRANSFORMED if is_transformed() else f"non-linear use ({_name(func)})"
        reason = self._reason or ("" if self.projects else "used in the guide")
        return reason or project_use(call, views, self._options)

    def _view(self, func: Callable, args: Tuple, kwargs: Any, parent: View) -> Any:
        found = func(*args, **kwargs)
        args, kwargs = _freeze(args[1:]), _freeze(kwargs)
        results = list(enumerate(found)) if isinstance(found, (tuple, list)) else [(None, found)]
        for item, result in results:
            if self.find(result) is not None:
                continue
            if result.dtype != parent.tensor.dtype:
                parent.site.use(parent.elements, f"non-linear use ({_name(func)})")
                continue
            is_whole = func in _SHAPES and result.numel() == parent.tensor.numel()
            step = Step(func, args, kwargs, item)
            self._add(View(parent.site, result, parent, step, is_whole))
        return found

    def _note_derivative(self) -> None:
        # Derivatives of projected uses are not those of the uses.
        for site in self.sites.values():
            if site.projected is not None:
                site.violate(site.projected, "torch.autograd inside of the model")


def _address(x: torch.Tensor) -> int:
    """Zero if it is empty, or has no memory of its own."""
    with torch._C.DisableTorchFunction():  # modes around this one see no use of it
        try:
            return x.data_ptr()
        except RuntimeError:
            return 0


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if name == "__get__" else f"{attribute}_"
    return name


def _unwrap(x: torch.Tensor) -> torch.Tensor:
    """The tensor inside of one that a function transform made of it."""
    try:
        return torch._C._functorch.get_unwrapped(x)
    except RuntimeError:
        return x


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_harmless(func: Callable, args: Tuple, kwargs: Any, found: List[View]) -> bool:
    if len(found) == 1:
        tensor = found[0].tensor
        if args and args[0] is tensor:
            is_question = func is torch.Tensor.type and len(args) == 1 and not kwargs
            return func in _METADATA or is_question
        return len(args) == 2 and args[1] is tensor and func in _METADATA_OF_SECOND
    # Validation asks for NaN in this way.
    return func in _EQUALITY and len(args) == 2 and args[0] is args[1]


def _freeze(x: Any) -> Any:
    """A copy that later changes in place do not reach."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, (tuple, list)):
        return type(x)(map(_freeze, x)) if type(x) in (tuple, list) else x
    if isinstance(x, dict):
        return {key: _freeze(item) for key, item in x.items()}
    return x
