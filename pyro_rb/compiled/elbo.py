# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from types import MethodType
from typing import Any, Dict, Sequence, Tuple

import torch
from pyro.infer.elbo import ELBO

from pyro_rb.compiled.graph import Gradient
from pyro_rb.compiled.program import Program
from pyro_rb.compiled.torch_private import check_version
from pyro_rb.infer.report import Report, SiteReport

BACKENDS = ("inductor", "replay")
CHECK_EVERY = 5000


def compile(
    loss: ELBO,
    backend: str = "inductor",
    *,
    check_every: int = CHECK_EVERY,
    background: bool = True,
) -> "CompiledELBO":
    """
    A loss with the same gradients in less time. Its tensor operations are captured as one
    graph, together with those of the backward pass. Later steps run this graph without the Python
    code of model, guide and handlers.

    The first step for each shape of the arguments is eager, that is as Pyro does it. At the second,
    the graph is captured. It is compared with the eager loss at the same random numbers: the loss,
    gradients, buffers and random number generators. The next step, steps 10, 110 and so on, and later
    every ``check_every``-th, are eager and are compared again, and so is the first step at which an
    argument has another value. What could not be captured, or differs, is eager from then on, with
    one warning that says why.

    **Rejection sampling.** A step through :class:`~pyro_rb.infer.rvrs_guide.RVRSGuide` is a graph
    of one round of proposals. The step is eager, with the same proposals, where the round accepts
    too few. With ``local_plate`` it is always eager.

    **Requirements.** Whatever changes from step to step must be a tensor among the arguments, a
    parameter, or a tensor that is changed in place. Plain numbers among the arguments, in
    closures, modules and attributes are part of the graph. For other values another graph is
    captured, up to 8. Structure must not depend on draws: no ``if`` on a draw, no ``.item()``. If
    it depends on arguments or data, steps are eager where it differs. Handlers around
    ``SVI.step``, hooks of parameters and arguments that require grad make steps eager.

    **When it is worse.** Capturing takes as long as about a hundred steps. Inductor takes 10 to
    60 seconds in another process for each shape; until it is ready, the graph is replayed.
    Large networks gain little. Gradients are right to first order only.

    :param loss: An ELBO of Pyro or of pyro_rb.
    :param str backend: ``"inductor"``, the default, compiles the graph with Inductor, which
        needs a C++ compiler, or Triton on GPUs. ``"replay"`` runs the operations of the graph
        one by one. The gradients are then the same bit by bit.
    :param int check_every: The number of steps between comparisons, ``>= 1``. Defaults to
        5000.
    :param bool background: Whether steps go on, replayed, while Inductor compiles in a process
        of its own. If not, the second step for each shape waits for the compiler, so that what is
        done at which step does not depend on time. Defaults to True.
    :return: a loss for :class:`~pyro.infer.svi.SVI` or
        :class:`~pyro_rb.compiled.svi.CompiledSVI`.
    :raises ValueError: naming the argument, if its value is invalid.
    :raises ImportError: if PyTorch is older than 2.11, the oldest version with which this was tested.
    :warns UserWarning: once for each reason why steps are eager.

    Example::

        >>> import pyro, torch, pyro.distributions as dist, pyro_rb
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
        >>> pyro.clear_param_store()
        >>> elbo = pyro_rb.compile(pyro_rb.STLTrace_ELBO(control_variate_scale=1.0), "replay")
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> for step in range(5):
        ...     loss = svi.step(torch.tensor([0.3, 0.8]))
        >>> elbo.num_graphs
        1
    """
    return CompiledELBO(loss, backend, check_every, background)


class CompiledELBO(ELBO):
    """
    What :func:`~pyro_rb.compiled.elbo.compile` returns. Other attributes are those of the loss inside.

    >>> from pyro.infer import Trace_ELBO
    >>> compile(Trace_ELBO(num_particles=3), "replay").num_particles
    3
    """

    def __init__(self, loss: Any, backend: str, check_every: int, background: bool) -> None:
        check_version()
        if not isinstance(loss, ELBO) or isinstance(loss, CompiledELBO):
            raise ValueError(f"Invalid loss: {loss!r}. Expected an ELBO that is not compiled.")
        if type(loss).__name__.startswith("Jit"):
            raise ValueError(
                f"Invalid loss: {type(loss).__name__} is compiled by torch.jit. Expected "
                f"{type(loss).__name__[3:]}."
            )
        if backend not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"Invalid backend: {backend!r}. Expected one of {names}.")
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 1:
            raise ValueError(
                f"Invalid check_every: {check_every!r}. Expected an integer that is at least 1."
            )
        self.eager: Any = loss
        self.backend, self.check_every, self.background = backend, check_every, background
        self._programs: Dict[Tuple, Program] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "eager" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.eager, name)

    def __getstate__(self) -> Dict[str, Any]:
        # Graphs are captured again.
        return {**self.__dict__, "_programs": {}}

    def _get_trace(self, *args: Any) -> Any:
        return self.eager._get_trace(*args)

    def program(self, model: Any, guide: Any) -> Program:
        """:return: the graphs of a model and guide."""
        key = _identity(model), _identity(guide)
        if key not in self._programs:
            self._programs[key] = Program(
                self.eager, model, guide, self.backend, self.check_every, self.background
            )
        return self._programs[key]

    @property
    def num_graphs(self) -> int:
        """The number of graphs that were captured, of all models and guides."""
        return sum(len(program.graphs) for program in self._programs.values())

    def report(self) -> Report:
        """
        :return: the report of the loss inside, if it has one, and a row for each pair of model and
            guide: whether its steps are ``compiled``, ``replayed`` or ``eager``, and why.
        """
        report = Report(self.eager.report() if hasattr(self.eager, "report") else [])
        for program in self._programs.values():
            graphs = program.graphs
            treatment = "replayed" if graphs else "eager"
            if any(graph.is_compiled for graph in graphs):
                treatment = "compiled"
            reason = program.reason or f"{len(graphs)} graphs"
            report.append(SiteReport("(all)", treatment, reason))
        return report

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """:return: an estimate of the loss, made by the eager loss."""
        loss: float = self.eager.loss(model, guide, *args, **kwargs)
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss. An estimate of its gradient is added to the ``.grad``
            of the parameters.
        """
        program = self.program(model, guide)
        found = program.find(args, kwargs)
        if found is None:
            loss = self.eager.loss_and_grads(model, guide, *args, **kwargs)
            program.finish()
            return loss
        for parameter, grad in zip(found.parameters, found.grads):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return found.loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :return: an estimate of the loss, a scalar tensor, with the gradient of
            :meth:`loss_and_grads`.
        """
        program = self.program(model, guide)
        found = program.find(args, kwargs)
        if found is None:
            loss = self.eager.differentiable_loss(model, guide, *args, **kwargs)
            program.finish()
            return loss
        return _with_gradient(found)


def _identity(fn: Any) -> Any:
    """Of a callable that need not be hashable, and the same for a method each time that it is taken from its object."""
    return (id(fn.__self__), id(fn.__func__)) if isinstance(fn, MethodType) else id(fn)


def _with_gradient(found: Gradient) -> torch.Tensor:
    loss: torch.Tensor = _Attach.apply(found.loss, found.grads, *found.parameters)
    return loss


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Any, grads: Sequence[Any], *parameters: Any) -> Any:
        ctx.grads = grads
        return torch.as_tensor(loss, **_kind(parameters))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *[grads[0] * g for g in ctx.grads]


def _kind(parameters: Sequence[torch.Tensor]) -> Dict[str, Any]:
    return {"dtype": parameters[0].dtype, "device": parameters[0].device} if parameters else {}
