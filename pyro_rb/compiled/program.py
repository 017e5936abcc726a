# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The graphs of one loss, model and guide: when they are made, when they are compared with the
eager loss, and when they are given up.
"""

import operator
import warnings
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from pyro_rb.compiled.background import InductorError
from pyro_rb.compiled.call import describe, parts, what_changes
from pyro_rb.compiled.check import EagerStep
from pyro_rb.compiled.graph import Gradient, Graph, Step
from pyro_rb.compiled.make_graph import make_graph
from pyro_rb.compiled.reach import Reachable
from pyro_rb.compiled.watch import NotCapturable
from pyro_rb.infer import RVRSGuide
from pyro_rb.infer.generators import get_torch_generators, set_torch_generators
from pyro_rb.infer.util import is_plain_call

MAX_GRAPHS = 8
MAX_UNSTABLE = 3
#: Captures of a loss that takes another way for rare random numbers.
MAX_ATTEMPTS = 5
#: Steps at which a graph was not valid, if they are more than one in so many.
MAX_MISSES = 5
#: Kinds of arguments that came once, if graphs make no more steps meanwhile.
MAX_NEW = 20
KEEP = "Expected a tensor that is no argument, such as a buffer, and is changed in place"
ADVICE = "Pass what changes from step to step as an argument, a number as a tensor"


class Ready(NamedTuple):
    """What may make steps."""

    graph: Graph
    #: Among the arguments.
    tensors: List[torch.Tensor]
    #: All that are for such arguments.
    graphs: List[Graph]
    phase: Any


class Program:
    """
    :param elbo: the eager loss.
    :param model: its model.
    :param guide: its guide.
    :param str backend: ``"inductor"`` or ``"replay"``.
    :param int check_every: the steps between comparisons, in the long run.
    :param bool background: whether steps go on while Inductor compiles.
    """

    def __init__(
        self, elbo: Any, model: Any, guide: Any, backend: str, check_every: int, background: bool
    ) -> None:
        self.elbo, self.model, self.guide = elbo, model, guide
        self.backend, self.check_every, self.background = backend, check_every, background
        #: Why steps are eager; empty if they are not.
        self.reason = ""
        self._graphs: Dict[Tuple, List[Graph]] = {}
        #: Eager steps to be made before a graph is captured.
        self._pending: Dict[Tuple, int] = {}
        #: For which of these a step is being made.
        self._waiting: Optional[Tuple] = None
        self._unstable = self._attempts = self._calls = 0
        self._warned: Set[str] = set()
        self._rejecting = [m for m in self._reach().modules if isinstance(m, RVRSGuide)]

    @property
    def graphs(self) -> List[Graph]:
        return [graph for graphs in self._graphs.values() for graph in graphs]

    def find(self, args: Tuple, kwargs: Dict[str, Any]) -> Optional[Gradient]:
        """
        :return: the loss and its gradient, or None if the eager loss is to be called, and then :meth:`finish`.
        """
        self._waiting = None
        if self.reason:
            return None
        if not is_plain_call():
            self._warn("a handler is around the loss, such as poutine.block")
            return None
        try:
            return self._find(args, kwargs)
        except NotCapturable as e:
            # An error of the model itself is raised here, as by the eager loss.
            found = None if e.__cause__ is None else self._step_eagerly(args, kwargs).gradient
            self._give_up(str(e))
            return found

    def finish(self) -> None:
        """Is told that the eager loss has raised nothing."""
        if self._waiting in self._pending:
            self._pending[self._waiting] -= 1

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._graphs.clear()
        self._pending.clear()
        self._warn(reason)

    def _warn(self, reason: str, treatment: str = "eager") -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            name = type(self.elbo).__name__
            warnings.warn(f"{name} is not compiled, its steps are {treatment}: {reason}.", stacklevel=5)

    def replay_only(self, reason: str) -> None:
        """From now on, as Inductor failed."""
        self.backend = "replay"
        self._warn(f"Inductor failed: {reason}", "replayed")

    def ready(self, num_steps: int, args: Tuple, kwargs: Dict[str, Any]) -> Optional["Ready"]:
        """
        :return: a graph that may make the next steps, without any that is eager, if there is one.
        """
        if self.reason or not is_plain_call():
            return None
        try:
            key, tensors = self._describe(args, kwargs)
        except NotCapturable:
            return None
        graphs = self._graphs.get(key, [])
        learns = any(graph.learning.is_due(num_steps) for graph in graphs)
        for graph in graphs:
            if graph.learning.learns == learns and graph.why_invalid() is None:
                if graph.has_new(tensors):
                    return None
                ready = Ready(graph, tensors, graphs, self._phase())
                return ready if self.goes_on(ready, num_steps) else None
        return None

    def goes_on(self, ready: "Ready", num_steps: int) -> bool:
        """
        Whether what was ready may make the next steps, too, if nothing but steps of it has run
        in between.
        """
        graph = ready.graph
        if graph.calls + num_steps >= graph.next_check or graph.is_due:
            return False
        learns = any(other.learning.is_due(num_steps) for other in ready.graphs)
        if learns != graph.learning.learns or (learns and num_steps > 1):
            return False
        return bool(self._phase(num_steps) == ready.phase == self._phase())

    def _phase(self, num_steps: int = 1) -> Any:
        """What the next steps are to be alike in; None if one of them is to be eager, or if they may not be alike."""
        phase = self.elbo._phase(num_steps) if hasattr(self.elbo, "_phase") else ()
        if phase is None or num_steps > 1 and any(guide.adaptation == "fixed" for guide in self._rejecting):
            return None
        return (phase, *[guide._guess_acceptance() for guide in self._rejecting])

    def _describe(self, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[Tuple, List[torch.Tensor]]:
        key, tensors = describe((args, kwargs))
        key += (
            self._phase(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_autocast_enabled(),
        )
        return key, tensors

    def _find(self, args: Tuple, kwargs: Dict[str, Any]) -> Optional[Gradient]:
        if self._phase() is None:
            return None
        key, tensors = self._describe(args, kwargs)
        graphs = self._graphs.get(key, [])
        learns = any(graph.learning.is_due(1) for graph in graphs)
        why = None
        for graph in graphs:
            if graph.learning.learns != learns:
                continue
            why = graph.why_invalid()
            if why is None:
                return self._run(graph, args, kwargs, tensors)
        # An eager step makes parameters, and finds out the nesting of plates.
        if key not in self._pending:
            self._count_new(key)
        if self._pending.setdefault(key, 1):
            self._waiting = key
            return None
        del self._pending[key]
        if sum(graph.learning.learns == learns for graph in self.graphs) >= MAX_GRAPHS:
            others = (other for other in reversed(self._graphs) if other != key)
            what = f"{why} keeps changing. {ADVICE}" if why else what_changes(next(others), key)
            raise NotCapturable(f"{what}. There are {MAX_GRAPHS} graphs already")
        try:
            graph = make_graph(self.elbo, self.model, self.guide, self._reach(), (args, kwargs), tensors, learns)
        except NotCapturable as e:
            self._attempts += 1
            if not e.is_rare or self._attempts == MAX_ATTEMPTS:
                raise
            self._pending[key] = 4**self._attempts
            return None
        self._attempts = 0
        found, is_good = self._check(graph, args, kwargs, tensors)
        if is_good:
            self._graphs.setdefault(key, []).append(graph)
        return found

    def _count_new(self, key: Tuple) -> None:
        """Refuses arguments that are always new."""
        if len(self._pending) >= MAX_NEW:
            before, self._calls = self._calls, sum(graph.calls for graph in self.graphs)
            if self._calls < before + MAX_NEW:
                raise NotCapturable(what_changes(next(reversed(self._pending)), key))
            self._pending.clear()

    def _run(self, graph: Graph, args: Tuple, kwargs: Dict[str, Any], tensors: Sequence[Any]) -> Optional[Gradient]:
        if graph.is_due or graph.has_new(tensors):
            graph.calls += 1
            return self._check(graph, args, kwargs, tensors)[0]
        graph.learning.take_scales()
        generators = get_torch_generators()
        changed = [(x, x.clone()) for x in graph.captured.changed]
        step: Optional[Step] = None
        try:
            step = graph(tensors)
            loss = step.loss.item()
            held = step.held is None or bool(step.held)
        except Exception:
            step, loss, held = None, 0.0, True
        if step is None or loss != loss or not held:
            if not held:
                self._count_miss(graph)
            # The eager loss says where, or does without what was taken for granted.
            set_torch_generators(generators)
            with torch.no_grad():
                for x, value in changed:
                    x.copy_(value)
            if step is None:  # unless the eager step raises, too, it is the graph
                graph.calls += 1
                return self._check(graph, args, kwargs, tensors)[0]
            return None
        graph.count_steps(1, step.learned)
        graph.announce()
        return Gradient(loss, graph.captured.parameters, step.grads)

    def _count_miss(self, graph: Graph) -> None:
        """Drops a graph that was made for values which come up no more."""
        graph.misses += 1
        places = graph.captured.places
        if not places or graph.misses < MAX_MISSES or graph.misses <= graph.calls // MAX_MISSES:
            return
        for graphs in self._graphs.values():
            graphs[:] = [other for other in graphs if other is not graph]
        self._unstable += 1
        if self._unstable >= MAX_UNSTABLE:
            self._give_up(
                f"{'; '.join(dict.fromkeys(places))}. A graph is made for one value, and others keep "
                "coming up. Expected tensor operations only, such as torch.where"
            )

    def _reach(self) -> Reachable:
        return Reachable({"the model": self.model, "the guide": self.guide}, self.elbo)

    def _step_eagerly(self, args: Tuple, kwargs: Dict, buffers: Sequence[torch.Tensor] = ()) -> EagerStep:
        step = partial(self.elbo.loss_and_grads, self.model, self.guide, *args, **kwargs)
        return EagerStep(step, self._reach().modules, buffers)

    def _check(self, graph: Graph, args: Tuple, kwargs: Dict, tensors: Sequence[Any]) -> Tuple[Gradient, bool]:
        """Makes an eager step, and compares the graph with it."""
        graph.learning.take_scales()
        call = args, kwargs
        given = list(parts(call))
        eager = self._step_eagerly(args, kwargs, [*graph.reach.buffers(), *graph.captured.changed])
        left = list(parts(call))
        graph.note_parameters(eager.named)
        changed = f"the parameter {eager.new[-1]}" if eager.new else graph.why_invalid()
        if eager.draws_python:
            self._give_up(
                "model or guide draw random numbers by Python's random or by NumPy, "
                f"which a graph does not. {ADVICE}"
            )
        elif len(left) != len(given) or any(map(operator.is_not, left, given)):
            self._give_up(
                "model or guide replace an item of a list or dict that is an argument, which a graph does not. "
                f"{KEEP}"
            )
        elif changed is not None:
            # A guide that is set up at its first run is done with that.
            self._unstable += 1
            if self._unstable >= MAX_UNSTABLE:
                self._give_up(f"{changed} changes at each run. {ADVICE}")
        elif not self._compare(graph, tensors, eager):
            graph.next_check = max(graph.next_check, graph.calls + 1)
        else:
            if self.backend == "inductor" and not graph.is_compiled:
                try:
                    if graph.compile(tensors, self.background):
                        self._compare(graph, tensors, eager)
                except InductorError as e:
                    self.replay_only(str(e))
            graph.note_values(tensors)
            # The second time with other parameters and draws, and after that less and less often.
            later = 10 * graph.calls + 10 if graph.calls > 1 else 9 * graph.calls + 1
            graph.next_check = min(later, graph.calls + self.check_every)
        return eager.gradient, changed is None and not self.reason

    def _compare(self, graph: Graph, tensors: Sequence[Any], eager: EagerStep) -> bool:
        """Whether the graph did what the eager loss did."""
        try:
            found = eager.compare(graph, tensors)
        except Exception as e:
            if graph.captured.places:  # as what it takes for granted was not so
                self._count_miss(graph)
                return False
            self._give_up(
                f"an operation of its graph fails where it is repeated: {' '.join(str(e).split())[:300]}. "
                "The eager steps are right; use the loss without compile() to have no warning"
            )
            return False
        if found is None:
            self._count_miss(graph)
            return False  # such a step is eager
        problem, of_program = found
        if of_program:
            graph.replay()
            self.replay_only(f"its program and the eager loss differ: {of_program}")
        if problem:
            self._give_up(
                f"its graph and the eager loss differ for the same random numbers: {problem}. "
                "Something that is no argument differs from step to step, or code that is not Python reads the "
                f"value of a tensor, other than by its operations. {ADVICE}"
            )
        return not problem
