# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The step of an optimizer as tensor operations, on the state that Pyro's optimizers keep."""

from typing import Any, List, Sequence, Tuple

import torch
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.optim import is_scheduler

_ADAMS = (torch.optim.Adam, torch.optim.AdamW, ClippedAdam)
#: Options that have no update here.
_OFF = ("amsgrad", "maximize", "differentiable", "capturable")


class Update:
    """
    The optimizers of some parameters, one for each, as Pyro has them.

    :param optim: a :class:`~pyro.optim.optim.PyroOptim` that has made a step of each.
    :param parameters: unconstrained.
    :raises NotImplementedError: naming the optimizer or option that there is no update for.
    """

    def __init__(self, optim: Any, parameters: Sequence[torch.Tensor]) -> None:
        self._optim = optim
        self._parameters = list(parameters)
        self._objects = [optim.optim_objs[p] for p in parameters]
        self._optimizers = [o.optimizer if is_scheduler(o) else o for o in self._objects]
        self._groups = [optimizer.param_groups[0] for optimizer in self._optimizers]
        self._states = [o.state[p] for o, p in zip(self._optimizers, parameters)]
        for p, optimizer, group in zip(parameters, self._optimizers, self._groups):
            name = type(optimizer).__name__
            if type(optimizer) not in _ADAMS:
                raise NotImplementedError(name)
            used = [option for option in _OFF if group.get(option)]
            if used or optim.grad_clip.get(p) is not None:
                raise NotImplementedError(f"{name} with {', '.join(used) or 'clip_args'}")
            if p.is_complex() or not optimizer.state[p]:
                raise NotImplementedError(f"{name} without state, or of a complex parameter")
        self._options = self._read_options()
        self._betas = torch.tensor([g["betas"] for g in self._groups], dtype=torch.float64).T
        #: Learning rate and number of steps so far, by parameter: [2, parameters].
        self._numbers = torch.zeros(2, len(parameters), dtype=torch.float64)

    def _read_options(self) -> List[Tuple]:
        names = ("betas", "eps", "weight_decay", "clip_norm", "centered_variance", *_OFF)
        return [tuple(map(group.get, names)) for group in self._groups]

    def is_valid(self) -> bool:
        """Whether the optimizers, their options and states are those that it was made for."""
        objects = self._optim.optim_objs
        same = [objects.get(p) is o for p, o in zip(self._parameters, self._objects)]
        kept = zip(self._optimizers, self._parameters, self._states)
        return (
            all(same)
            and all(o.state.get(p) is s for o, p, s in kept)
            and self._options == self._read_options()
        )

    @property
    def tensors(self) -> List[torch.Tensor]:
        """What the graph reads and changes in place, other than the parameters."""
        moments = [s[name] for s in self._states for name in ("exp_avg", "exp_avg_sq")]
        return [*moments, self._numbers]

    def prepare(self) -> None:
        """Tells the graph learning rates and numbers of steps, before it is run."""
        rates = [float(group["lr"]) for group in self._groups]
        steps = [float(state["step"]) for state in self._states]
        self._numbers.copy_(torch.tensor([rates, steps], dtype=torch.float64))

    def finish(self, num_steps: int) -> None:
        """Tells the optimizers what the graph has done."""
        for group, state in zip(self._groups, self._states):
            state["step"] += num_steps
            if "lrd" in group:
                group["lr"] *= group["lrd"] ** num_steps

    def apply(
        self,
        parameters: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        is_good: torch.Tensor,
        num_before: int,
    ) -> None:
        """
        Makes a step, in place, if it ``is_good``.

        :param tensors: in the place of :attr:`tensors`.
        :param int num_before: the steps before it in the graph.
        """
        *moments, numbers = tensors
        lr, steps = numbers.unbind()
        steps = steps + (num_before + 1)
        if any("lrd" in group for group in self._groups):
            decay = torch.tensor([g.get("lrd", 1.0) for g in self._groups], dtype=torch.float64)
            lr = lr * decay ** (num_before + 1)
        first, second = (1.0 - beta**steps for beta in self._betas)
        size, root = lr / first, second.sqrt()
        for i, (p, g) in enumerate(zip(parameters, grads)):
            m, v = moments[2 * i : 2 * i + 2]
            kind, group = type(self._optimizers[i]), self._groups[i]
            (beta1, beta2), eps, decay_rate = group["betas"], group["eps"], group["weight_decay"]
            if kind is ClippedAdam:
                g = g.clamp(-group["clip_norm"], group["clip_norm"])
            is_decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay")
            value = p
            if decay_rate and is_decoupled:
                value = p * (1.0 - lr[i] * decay_rate).to(p)
            elif decay_rate:
                g = g + decay_rate * p
            new_m = m.lerp(g, 1.0 - beta1) if kind is not ClippedAdam else m * beta1 + (1.0 - beta1) * g
            centered = g - new_m if group.get("centered_variance") else g
            new_v = (v * beta2).addcmul(centered, centered, value=1.0 - beta2)
            if kind is ClippedAdam:
                change = (size[i] * root[i]).to(p) * (new_m / (new_v.sqrt() + eps))
            else:
                change = size[i].to(p) * (new_m / (new_v.sqrt() / root[i].to(p) + eps))
            for old, new in ((p, value - change), (m, new_m), (v, new_v)):
                old.copy_(torch.where(is_good, new, old))
