# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What losses with path gradients share."""

import copy
import math
import numbers
import textwrap
from typing import (
    AbstractSet,
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

import torch

from pyro_rb.infer.learned_state import LearnedStateMixin
from pyro_rb.infer.parameters import CallParameters
from pyro_rb.infer.report import Report, Summary
from pyro_rb.infer.util import is_replayed
from pyro_rb.ops.control_variate import AdaptiveScale, Moments
from pyro_rb.ops.graph import Node, first_leaf, share_leaves
from pyro_rb.ops.quiet_grad import quiet_grad

Groups = List[Tuple[List[str], List[torch.Tensor]]]


def check_scale(scale: Any) -> Union[float, str]:
    """
    :raises ValueError: unless ``scale`` is a finite number or ``"adaptive"``.
    """
    is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if is_number and math.isfinite(scale):
        return float(scale)
    if isinstance(scale, str) and scale == "adaptive":
        return scale
    raise ValueError(
        f"Invalid control_variate_scale: {scale!r}. Expected a finite float, such as "
        "1.0 (sticking the landing) or 0.0 (Trace_ELBO), or the string 'adaptive'."
    )


def check_num_particles(num_particles: Any, name: str, option: str) -> None:
    """
    :param str name: of the loss.
    :param str option: what a user may have meant by a first argument that is no number.
    :raises ValueError: unless it is a positive integer.
    """
    is_int = isinstance(num_particles, numbers.Integral) and not isinstance(num_particles, bool)
    if not is_int or num_particles < 1:
        raise ValueError(
            f"Invalid num_particles: {num_particles!r}. Expected a positive int, as the first "
            f"argument is Pyro's. If it is meant as an option of this loss, write "
            f"{name}({option}={num_particles!r})."
        )


class Recorder(Protocol):
    """Takes the place of what is learned, while the operations of a step are captured."""

    #: Whether it is a step of which is learned.
    learns: bool

    def give(self, moments: Moments) -> torch.Tensor:
        """The scale that was learned, as a tensor."""

    def note(
        self,
        parameters: Sequence[torch.Tensor],
        path: Sequence[torch.Tensor],
        score: Sequence[torch.Tensor],
    ) -> None:
        """What is learned of."""


class PathGradientMixin(LearnedStateMixin):
    """
    Base class, to be named before the one of Pyro: taps the draws of the guide, has scales
    for their scores, and a report.
    """

    #: Says in the report how a site is treated that is left to Pyro.
    otherwise: str
    control_variate_scale: Union[float, str]
    #: While the operations of a step are captured.
    _recorder: Optional[Recorder] = None

    def _init_scales(self, control_variate_scale: Any) -> None:
        self.control_variate_scale = check_scale(control_variate_scale)
        self._adaptive = AdaptiveScale()
        self._parameters: Optional[CallParameters] = None
        #: Of the last particle, for each site with a path gradient.
        self._scales: Dict[str, Any] = {}
        self._latest: Optional[Summary] = None
        self._why_not_learned = ""

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_parameters": None}

    def _settled(self, recorder: Recorder) -> "PathGradientMixin":
        """A copy whose steps do the same and find out nothing."""
        settled = copy.copy(self)
        settled._recorder = recorder
        return settled

    def _count_steps(self, num_steps: int) -> None:
        """Is told of steps that were made in another way."""

    def _phase(self, num_steps: int) -> Any:
        """What so many next steps are to be alike in; None if one of them has to be eager."""
        return ()

    def _get_learned(self) -> Dict[str, Any]:
        return {"control_variates": self._adaptive.state_dict()}

    def _set_learned(self, learned: Dict[str, Any]) -> None:
        self._adaptive.load_state_dict(learned["control_variates"])

    def _note_call(self, *call: Any) -> None:
        """Is told what a loss was called with, before the guide is wrapped by anything."""
        if self.control_variate_scale == "adaptive":
            self._parameters = CallParameters(*call)

    def report(self) -> Report:
        """
        :return: a row for each latent site of the guide: its name, the treatment, and
            the reason for it. Prints as a table. The rows are those of the last particle of the
            last step, or of an evaluation of the loss before the first step.
        :raises RuntimeError: before the first particle was run.
        """
        if self._latest is None:
            raise RuntimeError(
                "report() tells what was done at the last step, and there was none. "
                "Expected a step before it: call SVI.step() first."
            )
        return self._latest.report(self._why_not_learned)

    def _obstacle(self) -> str:
        """Why no draw is to be tapped; empty if they are."""
        if not torch.is_grad_enabled():
            return "no gradient"
        if self.control_variate_scale == 0.0:
            return "control_variate_scale is 0"
        if is_replayed():
            return "a replay around the loss may supply its value"
        if torch.jit.is_tracing():
            # The partial derivatives of one draw would be baked in as constants.
            raise NotImplementedError(
                f"{type(self).__name__} was called inside of torch.jit.trace, which does "
                "not record the derivatives that it takes. Expected a call outside; to "
                "compile a loss, use JitTrace_ELBO or control_variate_scale=0.0."
            )
        return ""

    def _find_scales(
        self,
        log_q: Mapping[str, Sequence[torch.Tensor]],
        stop: AbstractSet[Node] = frozenset(),
        may_learn: bool = True,
    ) -> Groups:
        """
        Sets the scale of each tapped site.

        :param log_q: the log density of each tapped site, one or several tensors.
        :param stop: graph nodes behind which a site's parameters are not its own.
        :param may_learn: whether this counts as a step.
        :return: names of sites that share a scale, with their parameters, if there is to be
            learned from this step, else nothing.
        """
        if isinstance(self.control_variate_scale, float):
            self._scales.update(dict.fromkeys(log_q, self.control_variate_scale))
            return []
        assert self._parameters is not None
        name_of = self._parameters.name
        stop = {*stop, *self._parameters.input_nodes()}
        found: Dict[Any, Any] = dict.fromkeys(stop)
        leaf_of = {name: first_leaf(terms[0], found) for name, terms in log_q.items()}
        moments = {
            name: self._adaptive.moments(leaf, name_of)
            for name, leaf in leaf_of.items()
            if leaf is not None
        }
        if self._recorder is not None:
            give = self._recorder.give
            self._scales.update((n, give(moments[n]) if n in moments else 0.0) for n in log_q)
            return share_leaves(log_q, stop) if self._recorder.learns and may_learn else []
        # Any one parameter will do: all of a site's had the same scale last. Without a
        # parameter there is no score.
        self._scales.update((n, moments[n].scale if n in moments else 0.0) for n in log_q)
        distinct = {id(m): m for m in moments.values()}.values()
        is_known = all([m.updates for m in distinct])
        if is_known and not (may_learn and any([m.is_due() for m in distinct])):
            return []
        groups = share_leaves(log_q, stop)
        variates = [self._adaptive.find(parameters, name_of) for _, parameters in groups]
        for (names, _), variate in zip(groups, variates):
            self._scales.update(dict.fromkeys(names, variate.scale))
        if not is_known and not (may_learn and any([v.is_due() for v in variates])):
            return []
        return groups

    def _learn(
        self,
        groups: Groups,
        surrogate: torch.Tensor,
        compute_scores: Callable[[Sequence[torch.Tensor]], Sequence[Optional[torch.Tensor]]],
        between: Sequence[torch.Tensor],
    ) -> None:
        """
        :param groups: from :meth:`_find_scales`.
        :param surrogate: its gradient is the path gradient plus ``1 - c`` times the score.
        :param compute_scores: gives the score, or what stands for it, by parameter.
        :param between: tensors whose hooks are not to fire.
        """
        assert self._parameters is not None
        everything = [p for _, parameters in groups for p in parameters]
        try:
            totals = quiet_grad([surrogate], everything, between=between)
            pairs = iter(zip(totals, compute_scores(everything)))
        except RuntimeError as e:
            # Code that was compiled, or checkpoints, may allow for one pass only, the user's.
            # Where the graph itself is at fault, that pass says so.
            if self._recorder is not None:
                raise
            self._adaptive.postpone(everything)
            self._why_not_learned = f"; c is not learned: {textwrap.shorten(str(e), 120)}"
            return
        self._why_not_learned = ""
        for names, parameters in groups:
            rest = 1.0 - self._scales[names[0]]
            parts = [_split(*next(pairs), rest) for _ in parameters]
            used = [p for p, pair in zip(parameters, parts) if pair]
            if used:
                path, score = zip(*filter(None, parts))
                if self._recorder is not None:
                    self._recorder.note(used, path, score)
                    continue
                self._adaptive.find(used, self._parameters.name).update(path, score)


def _split(
    total: Optional[torch.Tensor], score: Optional[torch.Tensor], rest: Any
) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Path gradient and score, where ``total`` is the former plus ``rest`` times the latter."""
    if total is None and score is None:
        return None
    if isinstance(rest, torch.Tensor):
        rest = rest.to(total if score is None else score)
    if score is None:
        score = torch.zeros_like(total)  # type: ignore[arg-type]
    if total is None:
        total = rest * score
    if total.is_sparse != score.is_sparse:
        total, score = total.to_dense(), score.to_dense()
    return total - rest * score, score
