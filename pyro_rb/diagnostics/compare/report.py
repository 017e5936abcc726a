# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found: :class:`Comparison` and its parts."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional

from pyro_rb.diagnostics.compare.compiled import CompiledTime, with_compiled
from pyro_rb.diagnostics.compare.guides import GuideComparison
from pyro_rb.diagnostics.compare.race import Race
from pyro_rb.diagnostics.compare.recommend import Recommendation, recommend


@dataclass
class LossResult:
    """
    One loss at one state of the parameters. Ratios are to the reference.

    :param str name: The loss.
    :param bool reference: Whether this is the reference.
    :param str error: Why the loss could not be measured, if so; all numbers are then None.
    :param float bias_z: The largest absolute z-score of the difference between the mean
        gradients of the loss and the reference, see
        :func:`~pyro_rb.diagnostics.stats.bias.judge`.
    :param str bias_at: The coordinate or parameter where it was found.
    :param float bias_size: The difference there, as a share of the root-mean-square norm of
        the reference's gradient.
    :param float bias_threshold: The z-score beyond which the loss is called biased.
    :param bool biased: Whether the loss is called biased.
    :param float detectable_bias: A bias of this size in any one coordinate would have been
        seen with probability 0.95; a share of the same norm. Infinite where the draws are
        too few to tell.
    :param float variance: Variance of one gradient, summed over coordinates.
    :param float variance_ratio: ``variance`` over that of the reference.
    :param float variance_ratio_error: Its standard error.
    :param dict variance_shares: The share of each parameter in ``variance``.
    :param float tail_share: The share in ``variance`` of the 1% largest gradients. None with
        fewer than 100 draws.
    :param float seconds: Median time of one gradient: CPU time if torch has one thread and
        nothing is on CUDA, because other processes do not disturb that; else wall-clock time.
    :param float time_ratio: Median over draws of the time over that of the reference.
    :param float time_ratio_error: Its standard error.
    :param float cost_ratio: ``variance_ratio * time_ratio``: the ratio of the times that
        both need to estimate the gradient equally well.
    :param float steps_ratio: The number of steps for the same progress over that of the reference,
        see :func:`~pyro_rb.diagnostics.stats.progress.steps_ratio`.
    :param float steps_ratio_error: Its standard error.
    :param list steps_ratio_blocks: What each block of draws adds to that error.
    :param float loss: Mean value of the loss.
    :param float loss_error: Its standard error.
    :param float loss_deviation: The standard deviation of one value of the loss.
    :param int num_samples: Number of gradients. Fewer than those of the reference if the loss was so far behind that it
        was measured no further.
    :param int bad_losses: How many values of the loss were not finite; they are left out of the
        mean. The gradients were finite.
    :param int memory: Peak of the bytes that one step allocates, see
        :func:`~pyro_rb.diagnostics.run.memory.peak_memory`. None where it cannot be measured.
    :param float memory_ratio: ``memory`` over that of the reference.
    """

    name: str
    reference: bool = False
    error: Optional[str] = None
    bias_z: Optional[float] = None
    bias_at: Optional[str] = None
    bias_size: Optional[float] = None
    bias_threshold: Optional[float] = None
    biased: Optional[bool] = None
    detectable_bias: Optional[float] = None
    variance: Optional[float] = None
    variance_ratio: Optional[float] = None
    variance_ratio_error: Optional[float] = None
    variance_shares: Dict[str, float] = field(default_factory=dict)
    tail_share: Optional[float] = None
    seconds: Optional[float] = None
    time_ratio: Optional[float] = None
    time_ratio_error: Optional[float] = None
    cost_ratio: Optional[float] = None
    steps_ratio: Optional[float] = None
    steps_ratio_error: Optional[float] = None
    steps_ratio_blocks: List[float] = field(default_factory=list)
    loss: Optional[float] = None
    loss_error: Optional[float] = None
    loss_deviation: Optional[float] = None
    num_samples: Optional[int] = None
    bad_losses: int = 0
    memory: Optional[int] = None
    memory_ratio: Optional[float] = None


@dataclass
class StateResult:
    """
    All losses at one state of the parameters.

    :param int step: Number of training steps before the measurement.
    :param list losses: A :class:`LossResult` for each loss, the reference first.
    :param int num_samples: Number of gradients of the reference.
    :param str stopped: Why sampling ended: ``"num_samples"`` or ``"rel_error"`` was reached,
        ``"max_seconds"`` were spent, the user ``"interrupted"`` it, or the reference ``"failed"``.
    :param float noise_share: The share of noise in the mean square of the reference's
        gradient, see :func:`~pyro_rb.diagnostics.stats.progress.noise_share`.
    """

    step: int
    losses: List[LossResult]
    num_samples: int = 0
    stopped: str = "num_samples"
    noise_share: float = 1.0

    def when(self) -> str:
        """The state in words."""
        return f"after {self.step} training steps" if self.step else "before training"


@dataclass
class TrainingWindow:
    """
    The loss of the reference over several training steps in a row.

    :param int step: The last of the steps.
    :param int num_steps: Their number.
    :param float mean: Mean of the loss.
    :param float deviation: Standard deviation of the loss; None for one step.
    """

    step: int
    num_steps: int
    mean: float
    deviation: Optional[float]


@dataclass
class Comparison:
    """
    The result of :func:`~pyro_rb.diagnostics.compare.compare.compare`. It prints as a table; notebooks add figures.

    :param str title: Heading.
    :param list states: A :class:`StateResult` for each state.
    :param dict parameters: The shape of each parameter, by name.
    :param dict settings: How it was measured; ``reference_gradient`` says what the mean
        gradients were compared to.
    :param list notes: Explanations, and the warnings that were raised while measuring, each once.
    :param dict left_out: Why losses that might have been tried were not, by name.
    :param list training: :class:`TrainingWindow` s, in order.
    :param bool interrupted: Whether the user ended the comparison early.
    :param str error: What ended the comparison early, if something failed.
    :param Race race: Training with the best losses, if it was asked for.
    :param GuideComparison guides: Training of other guides, if it was asked for.
    :param list compiled: A :class:`~pyro_rb.diagnostics.compare.compiled.CompiledTime` for each loss and backend
        that was tried.
    :param list own: Names of losses that are not made by these names, so that no line of code is given for them.

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_rb import compare
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.))
    >>> options = {"train_steps": [1], "num_samples": 40, "num_burn_in": 0, "progress": False}
    >>> result = compare(model, guide, "STLTrace_ELBO:1.0", **options)
    >>> result.recommendation.loss, result.states[0].losses[1].name
    ('STLTrace_ELBO:1.0', 'STLTrace_ELBO:1.0')
    >>> result.to_dict()["settings"]["reference"]
    'Trace_ELBO'
    """

    #: What prints and draws it. The floor above sets it, see ``pyro_rb.diagnostics.show``.
    view: ClassVar[Any] = None

    title: str
    states: List[StateResult]
    parameters: Dict[str, List[int]]
    settings: Dict[str, Any]
    notes: List[str]
    left_out: Dict[str, str] = field(default_factory=dict)
    training: List[TrainingWindow] = field(default_factory=list)
    interrupted: bool = False
    error: Optional[str] = None
    race: Optional[Race] = None
    guides: Optional[GuideComparison] = None
    compiled: List[CompiledTime] = field(default_factory=list)
    own: List[str] = field(default_factory=list)

    @property
    def recommendation(self) -> Recommendation:
        """Which loss to take, in one sentence, see :mod:`~pyro_rb.diagnostics.compare.recommend`."""
        ended = "Training failed." if self.error else "Training was interrupted." if self.interrupted else ""
        advice = recommend(self.states, ended)
        if self.compiled:
            advice = with_compiled(advice, self.compiled, self.settings["steps"])
        if advice.loss in self.own:
            advice.usage = None
        return advice

    def to_dict(self) -> Dict[str, Any]:
        """
        All results as dicts, lists, strings and numbers, ready for :func:`json.dumps`.
        Infinite and undefined numbers are None.
        """
        result = dataclasses.asdict(self)
        result["recommendation"] = dataclasses.asdict(self.recommendation)
        result = finite(result)
        assert isinstance(result, dict)
        return result

    def plot(self, path: Optional[str] = None, kind: str = "efficiency") -> Any:
        """
        Draws a figure.

        :param str path: Where to save the figure, by the file's extension. Default: nowhere.
        :param str kind: ``"efficiency"``: variance against time for a step, with lines on
            which their product is constant, one panel for each state. ``"parameters"``: the
            variance of each parameter's gradient. ``"training"``: variance, and variance times
            time, along training. ``"elbo"``: the loss of the reference along training, with its
            noise, and that of all losses at the states. ``"race"``: training with the best losses
            for equal time, their mean and range over seeds.
        :returns: A :class:`matplotlib.figure.Figure`.
        :raises ImportError: If matplotlib is missing: ``pip install "pyro_rb[plot]"``.
        :raises ValueError: If there is no such kind.
        """
        return self.view.plot([self], path, kind)

    def __str__(self) -> str:
        return self.view.text(self)

    def table(self) -> str:
        """The printed form without the legend."""
        return self.view.table(self)

    def to_html(self) -> str:
        """
        An HTML page that needs no other file: recommendation, tables, and figures if
        matplotlib is installed. It reads well on light and dark screens.
        """
        return self.view.page([self])

    def _repr_html_(self) -> str:
        return self.view.section(self)


class ComparisonInterrupted(KeyboardInterrupt):
    """
    Raised when the user presses Ctrl-C in :func:`~pyro_rb.diagnostics.compare.compare.compare`.

    :param Comparison partial: What was measured until then; None if nothing was.
    """

    def __init__(self, partial: Optional[Comparison]) -> None:
        super().__init__("the comparison was interrupted")
        self.partial = partial


def finite(value: Any) -> Any:
    """
    The same with None in place of numbers that are not finite, as JSON has none.

    **Example**

    >>> finite({"loss": math.inf, "draws": (1.0, 2.0)})
    {'loss': None, 'draws': [1.0, 2.0]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
