# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Proposals of a guide, weighed by a model, many at a time.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_rb.infer.rvrs_checks import check_reasons
from pyro_rb.infer.rvrs_signature import Structure, StructureChanged, is_in, sign
from pyro_rb.ops.rejection import clean_log_weights
from pyro_rb.poutine import ProposalMessenger, TapMessenger

Values = Dict[str, torch.Tensor]


class Rescale:
    """Holds what gradients by latents are multiplied by, once it is known."""

    factor: Optional[torch.Tensor] = None


class _Rescaled(torch.autograd.Function):
    """The identity. Multiplies its gradient by a factor that is set later."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rescale: Rescale, like: Callable) -> Any:
        ctx.rescale, ctx.like = rescale, like
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        factor = ctx.like(ctx.rescale.factor, grad)
        # A rejected proposal may be where the density has no gradient.
        return torch.where(factor == 0, torch.zeros_like(grad), grad * factor), None, None


class LogJoint(NamedTuple):
    """The model at some values of the latents."""

    #: ``[M, *batch]``, with a graph.
    log_p: torch.Tensor
    rescale: Rescale


class Proposals(NamedTuple):
    """M proposals. ``batch`` is empty, or the items of the local plate."""

    #: ``[M, *batch]``, detached, -inf where not finite.
    log_weight: torch.Tensor
    #: Number of log weights that are not finite.
    num_invalid: int
    #: ``[M, *batch]``, with a graph if gradients are enabled.
    log_q: torch.Tensor
    #: Of the latents of the guide, each ``[M, *plates, *event]``.
    values: Values
    #: None if gradients are disabled.
    tap: Optional[TapMessenger]
    joint: LogJoint


class Proposer:
    """
    Draws proposals in one call of an RVRSGuide: with one subsample, and one draw of the
    global latents.

    :param guide: the proposal.
    :param structure: of model and guide.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: Tuple,
        kwargs: Dict,
        structure: Structure,
    ) -> None:
        self.model = model
        self.guide = guide
        self.args = args
        self.kwargs = kwargs
        self.structure = structure
        self.subsamples: Values = {}
        #: Draws of the guide outside of the local plate, and their event dims.
        self.globals: Dict[str, Tuple[torch.Tensor, int]] = {}

    @property
    def plate(self) -> Optional[CondIndepStackFrame]:
        """The local plate, if any."""
        return self.structure.frame

    @property
    def latents(self) -> List[str]:
        """Names of the latents of the model that are accepted or rejected."""
        sites, plate = self.structure.sites.items(), self.structure.plate
        return [n for n, s in sites if plate is None or is_in(plate, s.frames)]

    def draw_globals(self) -> None:
        """Runs the guide, of which all but the local latents is visible from outside."""
        with ProposalMessenger(
            subsamples=self.subsamples, plate=self.structure.plate, expose=True
        ) as run:
            self.guide(*self.args, **self.kwargs)
        self.globals = {
            name: (site.value, site.fn.event_dim)
            for name, site in run.latents.items()
            if site.log_prob is None
        }
        self._check(self.guide, run)

    def log_ratio_of_globals(self) -> torch.Tensor:
        """Log density of the model less that of the guide, outside of the local plate."""
        values = {name: value for name, (value, _) in self.globals.items()}
        total: Any = 0.0
        for fn, factor in ((self.guide, -1), (self.model, 1)):
            with ProposalMessenger(values=values, subsamples=self.subsamples) as run:
                fn(*self.args, **self.kwargs)
            for name, site in run.sites.items():
                values.setdefault(name, site.value)
                if all(frame.name != self.structure.plate for frame in site.frames):
                    assert site.log_prob is not None
                    total = total + factor * site.log_prob.sum()
        return total

    def like(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """
        Gives ``x`` of shape ``[M, *batch]`` the dims of ``value``, for broadcasting.
        """
        shape = [1] * value.dim()
        shape[0] = len(x)
        if self.structure.plate_dim is not None:
            shape[self.structure.plate_dim - self.structure.dim] = x.shape[1]
        return x.reshape(shape)

    def sum_to_batch(self, x: torch.Tensor) -> torch.Tensor:
        """Sums ``[M, *plates, *event]`` to ``[*batch]``."""
        if self.structure.plate_dim is None:
            return x.sum()
        keep = self.structure.plate_dim - self.structure.dim
        return x.sum([i for i in range(x.dim()) if i != keep])

    def propose(
        self, size: int, with_grad: bool, redraws: Optional[Values] = None, is_checked: bool = True
    ) -> Proposals:
        """
        :param size: M.
        :param with_grad: whether the log joint is to have a graph. The guide has one
            if gradients are enabled.
        :param redraws: draws of the guide that are to be made once more.
        :param is_checked: whether distributions are to validate, if that is on. It takes
            a quarter of the time of a large plate.
        """
        if not is_checked:
            with pyro.validation_enabled(False):
                return self.propose(size, with_grad, redraws)
        run, tap = self.draw(size, redraws)
        log_q = self.log_prob_sum(run)
        values = {n: s.value for n, s in run.latents.items() if s.log_prob is not None}
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            joint = self.evaluate(size, values)
        if torch.is_grad_enabled():
            log_weight = (joint.log_p - log_q).detach()
        else:
            log_weight = joint.log_p.sub_(log_q)
        log_weight, num_invalid = clean_log_weights(log_weight)
        return Proposals(log_weight, num_invalid, log_q, values, tap, joint)

    def draw(
        self, size: int, redraws: Optional[Values] = None
    ) -> Tuple[ProposalMessenger, Optional[TapMessenger]]:
        """Runs the guide."""
        tap = TapMessenger() if torch.is_grad_enabled() else None
        run = self.run(self.guide, size, {}, tap, redraws)
        if tap is not None:
            check_reasons(tap, run)
        return run, tap

    def evaluate(self, size: int, values: Values) -> LogJoint:
        """The model at values of its latents, each ``[M, *plates, *event]``."""
        rescale = Rescale()
        if torch.is_grad_enabled():
            values = {
                name: (
                    _Rescaled.apply(value, rescale, self.like)
                    if value.requires_grad
                    else value
                )
                for name, value in values.items()
            }
        if self.structure.is_looped:
            return LogJoint(self._evaluate_alone(values), rescale)
        return LogJoint(self.log_prob_sum(self.run(self.model, size, values)), rescale)

    def _evaluate_alone(self, values: Values) -> torch.Tensor:
        """The model for one proposal at a time, in a loop or by ``torch.vmap``."""
        sites = self.structure.sites
        rows = {name: strip(sites[name], values[name]) for name in self.latents}

        def log_p(row: Values) -> torch.Tensor:
            return self.log_prob_sum(self.run_alone(self.model, row)).squeeze(0)

        if self.structure.is_mapped:
            with pyro.validation_enabled(False):  # which asks for numbers
                return torch.vmap(log_p)(rows)
        columns = zip(*rows.values())
        return torch.stack([log_p(dict(zip(rows, column))) for column in columns])

    def run_alone(self, fn: Callable, values: Values) -> ProposalMessenger:
        """Runs the code as it is, without a dim of proposals."""
        values = {**values, **{name: value for name, (value, _) in self.globals.items()}}
        with ProposalMessenger(
            values=values, subsamples=self.subsamples, plate=self.structure.plate
        ) as run:
            fn(*self.args, **self.kwargs)
        self._check(fn, run)
        return run

    def run(
        self,
        fn: Callable,
        size: int,
        values: Values,
        tap: Optional[TapMessenger] = None,
        redraws: Optional[Values] = None,
    ) -> ProposalMessenger:
        values = {**values, **self._expanded_globals(size)}
        dim, plate = self.structure.dim, self.structure.plate
        with ProposalMessenger(
            dim, size, values, self.subsamples, tap, plate, redraws=redraws
        ) as run:
            fn(*self.args, **self.kwargs)
        self._check(fn, run)
        return run

    def _check(self, fn: Callable, run: ProposalMessenger) -> None:
        structure = self.structure
        is_guide = fn is self.guide
        known = structure.guide_signature if is_guide else structure.model_signature
        found = sign(run)
        if found != known:
            name, *_ = next(iter({*found} ^ {*known}), ("", None))
            raise StructureChanged(f"{'guide' if is_guide else 'model'}, at site '{name}'")

    def _expanded_globals(self, size: int) -> Values:
        """One draw for all proposals, in the shape that a draw for each would have."""
        expanded = {}
        for name, (value, event_dim) in self.globals.items():
            ones = (1,) * (event_dim - self.structure.dim - 1 - value.dim())
            shape = (size,) + ones + value.shape
            expanded[name] = value.expand(shape)
        return expanded

    def log_prob_sum(self, run: ProposalMessenger) -> torch.Tensor:
        return run.log_prob_sum(self.structure.plate_dim)


def strip(site: Any, value: torch.Tensor) -> torch.Tensor:
    """
    Takes away the dims of size one that the dim of proposals asked for.

    :param site: of which ``frames`` and ``event_dim`` are used.
    :param value: of draws at this site, ``[S, *ones, *plates, *event]``.
    :return: ``[S, *plates, *event]``.
    """
    dims = [-frame.dim for frame in site.frames if frame.dim is not None]
    rank = max(dims, default=0) + site.event_dim
    return value.reshape(value.shape[:1] + value.shape[value.dim() - rank :])
