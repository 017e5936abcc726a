# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The one place that touches PyTorch's private names for capturing and compiling graphs.
"""

import importlib
import threading
from typing import Any, Callable, List, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401

#: The oldest version of PyTorch that this was tried with.
FLOOR = (2, 11)

#: Whose shapes depend on values, which its tags do not say.
PACK = torch.ops.aten._pack_padded_sequence.default
ASSERTS = (torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg)

_OPTIONS = {
    # The draws are those of the eager loss, in its order.
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    # Shapes and strides are known to be those that the graph was made for.
    "size_asserts": False,
    "alignment_asserts": False,
}


#: The names that are used below, by module.
_NEEDED = {
    "torch._C": ("DisableTorchFunction",),
    "torch._guards": ("TracingContext", "tracing"),
    "torch._subclasses.fake_tensor": ("FakeTensorMode",),
    "torch": ("_ops", "_foreach_add_", "_foreach_copy_", "_foreach_lerp"),
    "torch.fx.experimental.proxy_tensor": (
        "make_fx",
        "get_proxy_mode",
        "get_proxy_slot",
        "has_proxy_slot",
    ),
    "torch.utils._python_dispatch": ("TorchDispatchMode", "_disable_current_modes"),
    "torch._inductor": ("CompiledArtifact", "standalone_compile"),
}


def check_version() -> None:
    """
    :raises ImportError: naming the version, if PyTorch is too old, or has not what is needed.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < FLOOR:
        raise ImportError(
            f"pyro_rb.compile needs torch {FLOOR[0]}.{FLOOR[1]} or later, and found "
            f"{torch.__version__}. Update torch, or use the loss as it is."
        )
    for module, names in _NEEDED.items():
        for name in names:
            try:
                getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as e:
                raise ImportError(
                    f"pyro_rb.compile needs {module}.{name}, which torch {torch.__version__} "
                    "has not. Use the loss as it is, or a version of torch that pyro_rb was "
                    f"tested with, such as {FLOOR[0]}.{FLOOR[1]}."
                ) from e


def trace(fn: Callable, inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """Runs ``fn``, and returns its operations, of those of autograd too, as one graph."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # One for all nodes, which have their shapes from it. To make one for each takes longer than all else.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(fn)(*inputs)


def is_tracked(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the result of operations in the graph that is being captured."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

    mode = get_proxy_mode()
    return mode is not None and has_proxy_slot(tensor, mode.tracer)


#: What a tensor in the graph depends on, the worst of all.
NOTHING, INPUTS, PARAMETERS, DRAWS = range(4)


def origin(tensor: torch.Tensor) -> int:
    """
    What the value of a tensor depends on: on numbers in the code only, on inputs of the graph that need no gradient,
    on parameters, or on random numbers.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode: Any = get_proxy_mode()
    if not is_tracked(tensor):
        return PARAMETERS if tensor.requires_grad else INPUTS
    waiting: List[Any] = [get_proxy_slot(tensor, mode.tracer).proxy.node]
    seen = set(waiting)
    worst = NOTHING
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            worst = max(worst, INPUTS)
        elif node.op == "get_attr":
            if any(user.target != torch.ops.aten.lift_fresh_copy.default for user in node.users):
                found = getattr(mode.tracer.root, node.target)
                worst = max(worst, PARAMETERS if found.requires_grad else INPUTS)
        elif node.op != "call_function" or _draws(node.target):
            return DRAWS
        new = [x for x in node.all_input_nodes if x not in seen]
        seen.update(new)
        waiting.extend(new)
    return worst


def is_unwritten(tensor: Any) -> bool:
    """Whether no operation in the graph gave a tensor its numbers."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    if not isinstance(tensor, torch.Tensor) or not is_tracked(tensor):
        return False
    mode: Any = get_proxy_mode()
    node = get_proxy_slot(tensor, mode.tracer).proxy.node
    return node.target is torch.ops.aten.empty.memory_format and not node.users


def _draws(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def outside_of_graph() -> Any:
    """Within, operations are not recorded."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def outside_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Of the numbers that a tensor has now."""
    with outside_of_graph():
        return tensor.detach().clone()


def plain_calls() -> Any:
    """
    Within, operations are called at once, without what Python may have put around them, such as
    :func:`torch.set_default_device`; a graph has the devices that it was captured with.
    """
    return torch._C.DisableTorchFunction()


def written(operation: Any, args: Sequence[Any]) -> List[Any]:
    """Those of the arguments of an operation that it changes in place."""
    if operation is torch.ops.aten.native_batch_norm.default:  # does not say so
        return list(args[3:5])
    infos = [argument.alias_info for argument in operation._schema.arguments]
    return [x for x, info in zip(args, infos) if info is not None and info.is_write]


def is_operation(target: Any) -> bool:
    """Whether the target of a node is an operation of PyTorch."""
    return isinstance(target, torch._ops.OpOverload)


def shares_memory(operation: Any) -> List[bool]:
    """By argument of an operation: whether its result may be in the memory of that."""
    return [argument.alias_info is not None for argument in operation._schema.arguments]


def owns_memory(operation: Any) -> bool:
    """Whether the results of an operation are in new memory."""
    returns = operation._schema.returns if is_operation(operation) else []
    return bool(returns) and all(r.alias_info is None for r in returns)


def memory(x: torch.Tensor) -> int:
    """The same for tensors that share it."""
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether something is called when a tensor gets its gradient."""
    hooks = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    return bool(hooks)


def foreach(name: str) -> Callable[..., Any]:
    """
    The operation of that name on lists of tensors.

    >>> list(foreach("add")([torch.zeros(2), torch.ones(1)], 1.0))
    [tensor([1., 1.]), tensor([2.])]
    """
    found: Callable[..., Any] = getattr(torch, f"_foreach_{name}")
    return found


def bare(operation: Any) -> Callable:
    """What an operation calls in the end."""
    found: Callable = getattr(operation, "_op", operation)
    return found


#: What Inductor makes of a graph. It can be called, and saved for another process.
Compiled = Any


def compile_graph(
    graph: torch.fx.Graph, inputs: Sequence[torch.Tensor], is_long: bool = False
) -> Compiled:
    """
    Compiles a graph by Inductor. Random numbers are drawn as PyTorch draws them.

    :param graph: without tensors of its own.
    :param bool is_long: whether to call the kernels from C++, too, if they are on the CPU.
    """
    import torch._inductor.config

    options = {k: v for k, v in _OPTIONS.items() if hasattr(torch._inductor.config, k)}
    if is_long and all(x.device.type == "cpu" for x in inputs):
        options["cpp_wrapper"] = True
    with torch.no_grad():
        return torch._inductor.standalone_compile(
            torch.fx.GraphModule({}, graph),
            list(inputs),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": options},
        )


def prepare_load() -> None:
    """
    Does beforehand what :func:`load` would take seconds for. Modules are imported here; what the
    processor can do is found out by other processes, for which a thread waits.
    """
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor import codecache, cpu_vec_isa

    for find in (cpu_vec_isa.pick_vec_isa, codecache.torch_key):  # which keep what they found
        threading.Thread(target=find, daemon=True).start()


def load(path: str) -> Compiled:
    """What another process has saved."""
    import torch._inductor

    return torch._inductor.CompiledArtifact.load(path=path, format="binary")
