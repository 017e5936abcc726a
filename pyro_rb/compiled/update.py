# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The step of an optimizer as tensor operations, on the state that Pyro's optimizers keep."""

import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.optim import is_scheduler

from pyro_rb.compiled.torch_private import foreach

_ADAMS = (torch.optim.Adam, torch.optim.AdamW, ClippedAdam)
#: Options that have no update here.
_OFF = ("amsgrad", "maximize", "differentiable", "capturable")
#: Options that are constants of the graph, but for betas that a scheduler moves.
_OPTIONS = ("betas", "eps", "weight_decay", "clip_norm", "centered_variance", *_OFF)


class _Member(NamedTuple):
    """A parameter, and what Pyro keeps of its optimizer."""

    parameter: torch.Tensor
    object: Any
    optimizer: Any
    group: Dict[str, Any]
    state: Dict[str, Any]
    #: Whether a scheduler moves the betas with the learning rate.
    moves_betas: bool
    names: List[str]
    read: Callable[[Dict[str, Any]], Tuple]
    #: What it read, by those names.
    options: Tuple

    @classmethod
    def make(cls, optim: Any, p: torch.Tensor) -> "_Member":
        obj = optim.optim_objs[p]
        optimizer = obj.optimizer if is_scheduler(obj) else obj
        group, state, name = optimizer.param_groups[0], optimizer.state[p], type(optimizer).__name__
        if type(optimizer) not in _ADAMS:
            raise NotImplementedError(f"{name}. Expected Adam, AdamW or ClippedAdam")
        used = [option for option in _OFF if group.get(option)]
        if used or optim.grad_clip.get(p) is not None:
            raise NotImplementedError(f"{name} with {', '.join(used) or 'clip_args'}. Expected {name} without")
        if p.is_complex() or not state:
            raise NotImplementedError(f"{name} without state, or of a complex parameter. Expected a real one")
        moves_betas = getattr(obj, "cycle_momentum", False)
        names = [x for x in _OPTIONS if x in group and not (moves_betas and x == "betas")]
        read: Any = operator.itemgetter(*names)
        return cls(p, obj, optimizer, group, state, moves_betas, names, read, read(group))


def _share(states: Sequence[Dict[str, Any]]) -> List[torch.Tensor]:
    """
    Makes views of one tensor of all numbers of steps that are tensors of one kind, so that one
    operation counts them.
    """
    kinds: Dict[Any, List[Dict[str, Any]]] = {}
    for state in states:
        if isinstance(state["step"], torch.Tensor):
            kinds.setdefault((state["step"].dtype, state["step"].device), []).append(state)
    shared = []
    for members in kinds.values():
        steps = [state["step"] for state in members]
        whole = steps[0]._base
        is_shared = whole is not None and len(whole) == len(steps)
        if not is_shared or any(x._base is not whole for x in steps):
            whole = torch.stack(steps)
            for i, state in enumerate(members):
                state["step"] = whole[i]
        shared.append(whole)
    return shared


class Update:
    """
    The optimizers of some parameters, one for each, as Pyro has them.

    :param optim: a :class:`~pyro.optim.optim.PyroOptim` that has made a step of each.
    :param parameters: unconstrained.
    :raises NotImplementedError: naming the optimizer or option that there is no update for.
    """

    def __init__(self, optim: Any, parameters: Sequence[torch.Tensor]) -> None:
        self._optim = optim
        self._members = [_Member.make(optim, p) for p in parameters]
        self._groups = [member.group for member in self._members]
        self._states = [member.state for member in self._members]
        kind: Dict[str, Any] = {"dtype": torch.float64, "device": parameters[0].device}
        #: Learning rate and number of steps so far, by parameter, whether all steps of the
        #: graph were good, and betas: [5, parameters].
        self._numbers = torch.ones(5, len(parameters), **kind)
        #: What they were made of, as far as the graph has gone on since.
        self._known: Any = None
        #: The numbers of steps that are tensors, held as they are told apart by id, and what they are views of.
        self._steps: List[torch.Tensor] = []
        self._counts: List[torch.Tensor] = []

    def why_invalid(self, optim: Any) -> str:
        """What is no more as it was made for: the optimizers, their options or states. Empty if all is."""
        if optim is not self._optim:
            return "the optimizer"
        objects = optim.optim_objs
        for m in self._members:
            if objects.get(m.parameter) is not m.object:
                return "the optimizer of a parameter"
            if m.read(m.group) != m.options:
                pairs = zip(m.names, m.read(m.group), m.options)
                return f"{next(name for name, a, b in pairs if a != b)} of {type(m.optimizer).__name__}"
            if m.optimizer.state.get(m.parameter) is not m.state:
                return f"the state of {type(m.optimizer).__name__}"
        return ""

    @property
    def tensors(self) -> List[torch.Tensor]:
        """What the graph reads and changes in place, other than the parameters."""
        moments = [s[name] for s in self._states for name in ("exp_avg", "exp_avg_sq")]
        return [*moments, self._numbers]

    @property
    def largest_rate(self) -> float:
        """Of the learning rates."""
        return max(float(group["lr"]) for group in self._groups)

    def prepare(self) -> None:
        """Tells the graph learning rates, betas and numbers of steps, before it is run."""
        if self._known is not None and self._known == self._read():
            return
        rates = [float(group["lr"]) for group in self._groups]
        steps = [float(state["step"]) for state in self._states]
        ones = [1.0] * len(rates)
        betas = zip(*[map(float, group["betas"]) for group in self._groups])
        self._numbers.copy_(self._numbers.new_tensor([rates, steps, ones, *betas]))
        self._counts = _share(self._states)
        self._steps = [s["step"] for s in self._states if isinstance(s["step"], torch.Tensor)]

    def finish(self, num_steps: int) -> None:
        """Tells the optimizers what the graph has done."""
        for counts in self._counts:
            counts.add_(num_steps)
        for group, state in zip(self._groups, self._states):
            if isinstance(state["step"], int):
                state["step"] += num_steps
            if "lrd" in group:
                for _ in range(num_steps):
                    group["lr"] *= group["lrd"]
        self._known = self._read()

    def forget(self) -> None:
        """Is told that the graph was not run to its end."""
        self._known = None

    def _read(self) -> Any:
        """What :meth:`prepare` tells, in a form that is compared without a look at tensors."""
        rates = [group["lr"] for group in self._groups]
        if any(isinstance(rate, torch.Tensor) for rate in rates):
            return None
        steps = [state["step"] for state in self._states]
        kept = [x if isinstance(x, int) else id(x) for x in steps]
        betas = [m.group["betas"] for m in self._members if m.moves_betas]
        return rates, kept, [x._version for x in self._counts], betas

    def apply(
        self,
        parameters: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        is_good: Optional[torch.Tensor] = None,
    ) -> Optional[torch.Tensor]:
        """
        Makes a step in place.

        :param tensors: in the place of :attr:`tensors`.
        :param is_good: a condition; where it is false, or was at a step before, nothing is
            changed. Defaults to None, for a step that is good, and the only one.
        :return: whether it was made.
        """
        *moments, numbers = tensors
        lr, steps, were_good, *betas = numbers.unbind()
        steps = steps + 1
        if any("lrd" in group for group in self._groups):
            lr = lr * lr.new_tensor([g.get("lrd", 1.0) for g in self._groups])
        if is_good is not None:
            is_good = is_good & (were_good[0] == 1.0)
            were_good = were_good * is_good
        numbers.copy_(torch.stack([lr, steps, were_good, *betas]))
        first, second = (1.0 - beta**steps for beta in betas)
        weights = [1.0 - betas[0], betas[1], 1.0 - betas[1]]
        kinds: Dict[Any, List[int]] = {}
        for i, p in enumerate(parameters):
            kind = type(self._members[i].optimizer), self._members[i].options, p.dtype, p.device
            kinds.setdefault(kind, []).append(i)
        for members in kinds.values():
            old = [
                [xs[i] for i in members] for xs in (parameters, moments[::2], moments[1::2])
            ]
            moved = weights if self._members[members[0]].moves_betas else []
            all_rates = [x.to(old[0][0]).unbind() for x in (lr, lr / first, second.sqrt(), *moved)]
            rates = [[rate[i] for i in members] for rate in all_rates]
            new = self._compute(members[0], [grads[i] for i in members], *old, *rates)
            for olds, news in zip(old, new):
                if is_good is not None:
                    news = [torch.where(is_good, x, y) for x, y in zip(news, olds)]
                foreach("copy_")(olds, news)
        return is_good

    def _compute(
        self, member: int, g: Any, p: Any, m: Any, v: Any, lr: Any, size: Any, root: Any, *weights: Any
    ) -> Tuple[Any, Any, Any]:
        """
        New parameters and moments, of parameters that have the options of a member. All are
        lists.

        :param size: learning rates over the corrections of the first moments.
        :param root: roots of the corrections of the second moments.
        :param weights: of the gradients in the first moments, and of the old and the new in the
            second; none if betas are constants.
        """
        group, kind = self._groups[member], type(self._members[member].optimizer)
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        is_clipped = kind is ClippedAdam
        if is_clipped:
            g = foreach("clamp_min")(g, -group["clip_norm"])
            g = foreach("clamp_max")(g, group["clip_norm"])
        if decay and (kind is torch.optim.AdamW or group.get("decoupled_weight_decay")):
            p = foreach("sub")(p, foreach("mul")(foreach("mul")(p, decay), lr))
        elif decay:
            g = foreach("add")(g, p, alpha=decay)
        new, kept, new_squares = weights or (1.0 - beta1, beta2, 1.0 - beta2)
        m = foreach("lerp")(m, g, new)
        centered = foreach("sub")(g, m) if group.get("centered_variance") else g
        v = foreach("mul")(v, kept)
        if weights:
            v = foreach("addcmul")(v, foreach("mul")(centered, new_squares), centered)
        else:
            v = foreach("addcmul")(v, centered, centered, new_squares)
        scale = foreach("sqrt")(v)
        if is_clipped:  # has eps before the correction
            size = foreach("mul")(size, root)
        else:
            scale = foreach("div")(scale, root)
        scale = foreach("add")(scale, eps)
        change = foreach("mul")(foreach("div")(m, scale), size)
        return foreach("sub")(p, change), m, v
