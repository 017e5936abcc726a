# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import warnings
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
from pyro.infer import SVI
from tqdm import tqdm

from pyro_rb.compiled.background import InductorError
from pyro_rb.compiled.elbo import CompiledELBO, compile
from pyro_rb.compiled.fused import FusedSteps
from pyro_rb.compiled.graph import Graph
from pyro_rb.compiled.program import MAX_UNSTABLE, Program

#: Steps, or a few unrolled ones, that are made without a look at whether the graph is still valid.
_IN_A_ROW = 100


@dataclass
class _Steps:
    ready: Dict[int, FusedSteps] = field(default_factory=dict)
    #: What is being compiled, to take the place of it.
    coming: Dict[int, FusedSteps] = field(default_factory=dict)
    #: How many in a row were soon of no use, as the optimizer had changed.
    num_short: int = 0

    def find_valid(self, graph: Graph, num_steps: int, optim: Any) -> Optional[FusedSteps]:
        """
        :raises NotImplementedError: if the optimizer keeps changing.
        """
        known = self.ready.get(num_steps) or self.coming.get(num_steps)
        why = "" if known is None else known.update.why_invalid(optim)
        if known is not None and why:
            self.num_short = self.num_short + 1 if graph.calls - known.since < _IN_A_ROW else 0
            self.clear()
            if self.num_short >= MAX_UNSTABLE:
                raise NotImplementedError(f"{why} keeps changing. Expected no change but of learning rates")
        return self.ready.get(num_steps)

    def clear(self) -> None:
        self.ready.clear()
        self.coming.clear()


class CompiledSVI(SVI):
    """
    An :class:`~pyro.infer.svi.SVI` whose whole step is one graph: loss, gradient and optimizer.

    The steps are those of ``SVI`` with the loss that :func:`~pyro_rb.compiled.elbo.compile` makes,
    and what is said there holds here. The update by the optimizer is in the graph as well. The state
    of the optimizer stays where Pyro keeps it. So ``optim.get_state``, ``set_state``, ``save`` and
    ``load``, and schedulers of PyTorch, work as before.

    **Requirements.** ``Adam``, ``AdamW`` or ``ClippedAdam``, alone or in a scheduler, also with
    options for each parameter. With other optimizers, with ``clip_args``, and where a parameter
    that is used gets no gradient, Pyro's own loop over the parameters makes the update. That
    is slower, and a warning says so.

    **When it is worse.** As for :func:`~pyro_rb.compiled.elbo.compile`. One more graph is compiled, and
    one for each number of steps in a graph.

    :param model: As in ``SVI``.
    :param guide: As in ``SVI``.
    :param optim: As in ``SVI``, a :class:`~pyro.optim.optim.PyroOptim`.
    :param loss: An ELBO, or what :func:`~pyro_rb.compiled.elbo.compile` returned, whose backend is
        then used.
    :param int unroll: The number of steps in one graph in :meth:`run`, ``>= 1``. Compiling 10 steps
        takes several times as long as 1, and saves time on small models only. Defaults to 1.
    :raises ValueError: if ``unroll`` is not a positive integer.

    Example::

        >>> import pyro, torch, pyro.distributions as dist, pyro_rb
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
        >>> pyro.clear_param_store()
        >>> loss = pyro_rb.compile(pyro_rb.STLTrace_ELBO(), "replay")
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> svi = pyro_rb.CompiledSVI(model, AutoNormal(model), optim, loss)
        >>> losses = svi.run(100, torch.tensor([0.3, 0.8]), progress_bar=False)
        >>> losses.shape
        torch.Size([100])
    """

    def __init__(
        self, model: Any, guide: Any, optim: Any, loss: Any, *, unroll: int = 1, **kwargs: Any
    ) -> None:
        if not isinstance(unroll, int) or isinstance(unroll, bool) or unroll < 1:
            raise ValueError(f"Invalid unroll: {unroll!r}. Expected an integer that is at least 1.")
        self.compiled = loss if isinstance(loss, CompiledELBO) else compile(loss)
        self.unroll = unroll
        #: Of graphs: what makes steps, by their number.
        self._steps: Any = WeakKeyDictionary()
        #: Why Pyro's loop makes the update, and of which optimizer; empty if it does not.
        self._why_loop, self._looped = "", None
        #: Times that an operation failed where a graph with the update was made.
        self._num_failed = 0
        super().__init__(model, guide, optim, self.compiled, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """
        Makes one step.

        :return: an estimate of the loss.
        """
        for (loss,) in self._fused(1, args, kwargs):
            return loss
        found: float = super().step(*args, **kwargs)
        return found

    def run(
        self, num_steps: int, *args: Any, progress_bar: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """
        Makes steps, all with the same arguments. Ctrl-C ends the run early. What model and guide
        depend on must not be replaced during the run, for example by another thread. It is checked
        every 100 steps only.

        :param int num_steps: number of steps, ``>= 0``.
        :param args: arguments of model and guide; ``kwargs`` likewise.
        :param bool progress_bar: Whether to show a progress bar. Defaults to True.
        :return: the losses of the steps that were made, of shape ``[num_steps]`` unless the run was
            ended early. If a step raises an error, those before it stand, and their losses are lost.
        """
        losses: List[float] = []
        with tqdm(total=num_steps, disable=not progress_bar) as bar:
            try:
                while len(losses) < num_steps:
                    size = self.unroll if num_steps - len(losses) >= self.unroll else 1
                    for found in self._make(size, args, kwargs):
                        losses += found
                        bar.update(len(found))
                        if len(losses) % 100 < len(found):
                            bar.set_postfix(loss=f"{found[-1]:.4g}", refresh=False)
                        if num_steps - len(losses) < size:
                            break
            except KeyboardInterrupt:
                pass
        return torch.tensor(losses)

    def _make(self, num_steps: int, args: Tuple, kwargs: Dict[str, Any]) -> Iterator[List[float]]:
        """
        Yields the losses of the next steps, a few at a time: those of a graph of so many steps, or of one step; or that
        of a step that is eager.
        """
        for size in dict.fromkeys((num_steps, 1)):
            is_made = False
            for losses in self._fused(size, args, kwargs):
                is_made = True
                yield losses
            if is_made:
                return
        yield [self.step(*args, **kwargs)]

    def _fused(self, num_steps: int, args: Tuple, kwargs: Dict[str, Any]) -> Iterator[List[float]]:
        """
        Yields the losses of steps that a graph makes, ``num_steps`` at a time; nothing if it must
        not. Nothing else may run in between but what looks at the losses.
        """
        program = self.compiled.program(self.model, self.guide)
        ready = program.ready(num_steps, args, kwargs)
        if ready is None or self._looped is self.optim:
            return
        try:
            fused = self._find(ready.graph, num_steps, ready.tensors, program)
        except RuntimeError as e:
            self._num_failed += 1
            if not isinstance(e, NotImplementedError) and self._num_failed < MAX_UNSTABLE:
                return  # an operation failed, as it may at some draws
            self._why_loop, self._looped = str(e), self.optim
            warnings.warn(
                f"The update of the parameters is not compiled, Pyro's loop over them makes it: {e}.",
                stacklevel=3,
            )
            return
        if fused is None or not fused.is_free():
            return
        for _ in range(_IN_A_ROW):
            losses = fused(ready.graph, ready.tensors)
            if losses is None:
                return
            yield losses
            if not program.goes_on(ready, num_steps):
                return

    def _find(
        self, graph: Graph, num_steps: int, tensors: List[torch.Tensor], program: Program
    ) -> Optional[FusedSteps]:
        steps = self._steps.setdefault(graph, _Steps())
        fused = steps.find_valid(graph, num_steps, self.optim)
        if fused is not None and fused.is_compiled and not graph.is_compiled and program.backend == "replay":
            steps.clear()
            fused = None
        is_new = fused is None
        if is_new and not all(p in self.optim.optim_objs for p in graph.named.values()):
            return None
        if program.backend == "inductor" and (is_new or num_steps in steps.coming):
            if num_steps not in steps.coming:
                steps.coming[num_steps] = FusedSteps(graph, self.optim, num_steps, tensors, False)
            try:
                if steps.coming[num_steps].compile(tensors, program.background):
                    fused = steps.ready[num_steps] = steps.coming.pop(num_steps)
            except InductorError as e:
                steps.coming.clear()
                program.replay_only(str(e))
        if fused is None and (num_steps == 1 or program.backend == "replay"):
            is_split = num_steps == 1
            fused = FusedSteps(graph, self.optim, num_steps, tensors, is_split)
            steps.ready[num_steps] = fused
        return fused
