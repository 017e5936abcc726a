# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates

from pyro_rb.infer.rvrs_options import check_count, check_options
from pyro_rb.infer.rvrs_proposals import (
    Proposer,
    Structure,
    StructureChanged,
    strip,
)
from pyro_rb.infer.rvrs_sampler import (
    MAX_ROUND,
    Accepted,
    RejectionSamplingError,
    sample,
    solve_by_pilot,
)
from pyro_rb.infer.rvrs_structure import find_structure
from pyro_rb.infer.rvrs_surrogate import compute_surrogate
from pyro_rb.ops.rejection import (
    adapt_threshold,
    estimate_bound,
    log_normalizer,
)
from pyro_rb.poutine import FramesMessenger, ProposalMessenger

#: Draws from which medians and quantiles are taken.
NUM_QUANTILE_SAMPLES = 1000

#: Share of the latest call in the running mean of the acceptance.
_FORGET = 0.1


class RVRSGuide(PyroModule):
    r"""
    A guide that is closer to the posterior than the guide that it is made of, by
    rejection sampling [1, 2]. It is trained by :class:`~pyro.infer.SVI` with
    :class:`~pyro.infer.Trace_ELBO`, by the exact pathwise gradient.

    Draws :math:`z` of the given guide :math:`q_\phi` are proposals. With
    :math:`\ell = \log p_\theta(x, z) - \log q_\phi(z)`, one is accepted with probability

    .. math::

        a(z) = \epsilon + (1 - \epsilon) \, \sigma(\ell + T),

    so that accepted draws have the density :math:`r(z) = q(z) a(z) / Z` with
    :math:`Z = E_q[a]`. The smaller the threshold :math:`T`, the closer they are to the
    posterior, and the more proposals it takes, :math:`1 / Z` for each. The objective is the
    ELBO of :math:`r` (section 3 of [2]),

    .. math::

        E_r[f] + \log Z, \qquad f = \ell - \log a.

    The gradient is at fixed :math:`T`, and unbiased for ``num_samples`` accepted draws a
    call. It needs one evaluation of the model's gradient, none of :math:`Z`. Each loss is
    an unbiased, noisy estimate of the objective; watch :meth:`elbo`.

    **Requirements.** A model whose log density is a function of its latents, and model
    and guide that allow for a batch dim on the left, as for ``vectorize_particles=True``.
    A guide of reparameterised draws, with a support that does not depend on a parameter,
    and invertible transforms if any: :class:`~pyro.infer.autoguide.AutoNormal`,
    :class:`~pyro.infer.autoguide.AutoDiagonalNormal`,
    :class:`~pyro.infer.autoguide.AutoMultivariateNormal`,
    :class:`~pyro.infer.autoguide.AutoLowRankMultivariateNormal`,
    :class:`~pyro.infer.autoguide.AutoIAFNormal` (whose inverse is slow), an
    :class:`~pyro.infer.autoguide.AutoGuideList` of these, or a function. The first call
    checks all this, at the cost of about ten runs of model and guide. The loss must be
    ``Trace_ELBO``. Of particles, vectorised ones are accepted draws of one call.
    ``model`` must be the very model that is given to ``SVI``; a
    :func:`~pyro.poutine.scale` must be around both of the guide and the model of ``SVI``.

    **Local latents.** The more latents are accepted or rejected together, the less is
    gained. Name the plate of the local ones as ``local_plate``: they are then accepted
    item by item, each with a threshold of its own, and the plate may be subsampled.
    Latents outside of it come from the same guide, unrejected. With ``local_size`` the
    thresholds are kept and adapted. Without, each call finds those of its items from 32
    proposals that it discards, which works for data without an index and for unseen data.

    **When it is worse.** A step costs about ``num_samples / Z`` evaluations of the model:
    if a mean-field guide is good enough, take that. Fit the guide by plain SVI first, and
    wrap it then; its parameters keep their names. Where :math:`\ell` falls faster than a
    square in the tails of the guide, draws from there, accepted with the probability
    :math:`\epsilon`, make gradients heavy-tailed: take a smaller ``epsilon`` or a narrower
    guide. Where the model's density ends at a hard edge inside of the guide's support,
    the gradient is biased; there is a warning when such proposals occur. Gradients are
    first order only. RenyiELBO and importance sampling need a density of each draw, and
    give nonsense with this guide.

    :param callable model: the model.
    :param callable guide: the proposal. Defaults to ``AutoDiagonalNormal(model)``.
    :param int num_samples: accepted draws in a call, ``>= 2``. Defaults to 2.
    :param float T: the threshold to start from. None, the default, solves for
        ``Z_target`` on proposals that are discarded.
    :param float epsilon: least acceptance, between 0 and 1. Defaults to 0.01. Larger
        values lower the ELBO.
    :param float Z_target: the wanted mean acceptance, between ``epsilon`` and 1.
        Defaults to 0.33.
    :param str adaptation: ``"Z_target"``, the default: the threshold follows the
        acceptance, in training mode and with gradients enabled. ``"fixed"``: it stays.
    :param float T_lr: learning rate of the threshold. Defaults to 0.1.
    :param int max_steps: proposals in a call at most, for each ``num_samples`` draws, and
        each item of the local plate. Defaults to 10,000.
    :param str local_plate: name of the plate of the local latents. Defaults to None.
    :param int local_size: full size of that plate. Defaults to None.
    :ivar torch.Tensor T: the threshold, 0-dim or ``[local_size]``, NaN before it is
        known; without ``local_size`` the mean of the last ones. In ``state_dict``.
    :ivar torch.Tensor Z: running mean of the acceptance in training. In ``state_dict``.
    :ivar guide: the proposal.
    :raises ValueError: naming the argument that is out of range. At a call, naming the
        site, for a latent that the guide lacks, and for a plate that is not there or not
        of ``local_size``.
    :raises NotImplementedError: at a call, naming the site or the plate: guide sites that
        are discrete, point estimates, or otherwise without a path gradient; a subsampling
        plate that is not ``local_plate``; a model or guide that gives something else for
        two proposals at a time; ``local_plate`` within vectorised particles; JIT losses.
    :raises RejectionSamplingError: at a call, if ``max_steps`` proposals were too few.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(data):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("obs", dist.Exponential(rate), obs=data)
        >>> data = torch.tensor([0.3, 0.8, 2.1])
        >>> guide = RVRSGuide(model, AutoNormal(model, init_scale=0.5))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step(data)
        >>> guide.sample_posterior(5, data)["rate"].shape
        torch.Size([5])

    **References**

    [1] Aditya Grover, Ramki Gummadi, Miguel Lazaro-Gredilla, Dale Schuurmans, Stefano
    Ermon (2018), "Variational Rejection Sampling". https://arxiv.org/abs/1804.01712

    [2] Martin Jankowiak, Du Phan (2024), "Reparameterized Variational Rejection
    Sampling". https://arxiv.org/abs/2309.14612
    """

    T: torch.Tensor
    Z: torch.Tensor

    def __init__(
        self,
        model: Callable,
        guide: Optional[Callable] = None,
        *,
        num_samples: int = 2,
        T: Optional[float] = None,
        epsilon: float = 0.01,
        Z_target: float = 0.33,
        adaptation: str = "Z_target",
        T_lr: float = 0.1,
        max_steps: int = 10_000,
        local_plate: Optional[str] = None,
        local_size: Optional[int] = None,
    ) -> None:
        super().__init__()
        check_count("num_samples", num_samples, 2)
        check_count("max_steps", max_steps, 1)
        check_options(T, epsilon, Z_target, adaptation, T_lr, local_plate, local_size)
        # The model is no submodule: its parameters are not the guide's.
        object.__setattr__(self, "model", model)
        guide = AutoDiagonalNormal(model) if guide is None else guide
        if isinstance(guide, torch.nn.Module):
            # Assignment, or PyroModule's own add_module, would rename its parameters.
            torch.nn.Module.add_module(self, "guide", guide)
        else:
            object.__setattr__(self, "_guide_function", guide)
        self.num_samples = num_samples
        self.epsilon = epsilon
        self.Z_target = Z_target
        self.adaptation = adaptation
        self.T_lr = T_lr
        self.max_steps = max_steps
        self.local_plate = local_plate
        self.local_size = local_size
        # For all items of a plate; else each call of a plate without a size finds its own.
        self._has_one_threshold = T is not None
        shape = () if local_size is None else (local_size,)
        nan = torch.full(shape, math.nan)
        self.register_buffer("T", nan.clone() if T is None else torch.full(shape, float(T)))
        self.register_buffer("Z", torch.tensor(math.nan))
        self._structure: Optional[Structure] = None
        self._known: Dict[Tuple, Tuple] = {}
        self._num_proposed = self._num_invalid = 0
        self._has_warned = False

    @property
    def guide(self) -> Callable:
        """The proposal."""
        # PyroModule would rename a guide without a name on access.
        modules = self.__dict__.get("_modules", {})
        if "guide" in modules:
            return modules["guide"]
        if "_guide_function" in self.__dict__:
            return self.__dict__["_guide_function"]
        raise AttributeError("guide")

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_structure": None, "_known": {}}

    # -- Sampling -------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """
        Makes the sites of the latents, and a factor, inside of a loss.

        :return: the emitted draw of each latent site, by name.
        """
        try:
            return self._forward(args, kwargs)
        except StructureChanged:
            # Nothing was emitted yet.
            self._structure = None
            return self._forward(args, kwargs)

    def _forward(self, args: Tuple, kwargs: Dict) -> Dict[str, torch.Tensor]:
        particles = self._find_particles()
        num_emitted = 1 if particles is None else particles.size
        num_samples = max(self.num_samples, num_emitted)
        proposer = self._make_proposer(args, kwargs)
        accepted = self._sample(proposer, num_samples, proposer.structure.is_small)
        surrogate = compute_surrogate(proposer, accepted, self.epsilon, num_emitted)
        log_z = log_normalizer(num_samples, accepted.num_proposed).to(surrogate.mean_f)
        bound = num_emitted * (surrogate.mean_f + log_z)
        factor = surrogate.log_p - bound
        if surrogate.gradient is not None:
            factor = factor - (surrogate.gradient - surrogate.gradient.detach())
        values = self._emit(proposer, accepted, factor, particles)
        if self.training and torch.is_grad_enabled():
            self._adapt(proposer, accepted)
        return values

    def _find_particles(self) -> Any:
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "RVRSGuide was called inside of torch.jit.trace, which would freeze the "
                "number of proposals and the threshold. Expected a loss that is not "
                "compiled, Trace_ELBO in place of JitTrace_ELBO."
            )
        plates = [frame for frame in get_plates() if frame.dim is not None]
        if not plates:
            return None
        if len(plates) > 1:
            names = [frame.name for frame in plates]
            raise NotImplementedError(
                f"RVRSGuide was called inside of the plates {names}. Expected one at most, "
                "that of the particles; plates of the model belong inside of the model."
            )
        if self.local_plate is not None:
            raise NotImplementedError(
                f"RVRSGuide with local_plate={self.local_plate!r} was called inside of plate "
                f"'{plates[0].name}'. Expected no vectorised particles or predictions: "
                "raise num_samples in place of num_particles, and set parallel=False."
            )
        return plates[0]

    def _make_proposer(self, args: Tuple, kwargs: Dict) -> Proposer:
        if self._structure is None:
            self._structure = find_structure(
                self.model, self.guide, args, kwargs, self.local_plate, self._known
            )
        proposer = Proposer(
            self.model, self.guide, args, kwargs, self._structure, self._known
        )
        if self._structure.has_globals:
            proposer.draw_globals()
        return proposer

    def _sample(
        self,
        proposer: Proposer,
        num_samples: int,
        with_grad: bool = False,
    ) -> Accepted:
        guess = self.Z.item()
        accepted = sample(
            proposer,
            num_samples,
            lambda: self._find_threshold(proposer),
            self.epsilon,
            self.Z_target if math.isnan(guess) else guess,
            self.max_steps * math.ceil(num_samples / self.num_samples),
            proposer.structure.num_items,
            with_grad,
        )
        self._warn_of_invalid(accepted)
        return accepted

    def _find_threshold(self, proposer: Proposer) -> torch.Tensor:
        """``[*batch]``, for the items of this call."""
        if self.local_plate is not None and self.local_size is None:
            if self._has_one_threshold:
                return self.T
            return solve_by_pilot(proposer, self.Z_target, self.epsilon)
        index = self._find_items(proposer)
        T = self.T[index]
        is_unknown = T.isnan()
        if is_unknown.any():
            solved = solve_by_pilot(proposer, self.Z_target, self.epsilon)
            T = solved.to(T).where(is_unknown, T)
            self._set_threshold(index, T)
        return T

    def _find_items(self, proposer: Proposer) -> Any:
        """What ``T`` is to be indexed by."""
        if self.local_plate is None:
            return ()
        frame = proposer.plate
        assert frame is not None
        size = frame.full_size or frame.size
        if size != self.local_size:
            raise ValueError(
                f"Found local_size={self.local_size}, and plate '{frame.name}' of size "
                f"{size}. Expected the same: one threshold for each item of the plate. For "
                "items that come without their numbers, or were not trained on, leave "
                "local_size=None; thresholds are then found at each call."
            )
        return proposer.subsamples[frame.name]

    def _set_threshold(self, index: Any, T: torch.Tensor) -> None:
        # Out of place: a graph may hold the old one.
        new = self.T.detach().clone()
        new[index] = T.to(new)
        self.T = new

    def _adapt(self, proposer: Proposer, accepted: Accepted) -> None:
        T = accepted.T
        mean = accepted.acceptance.mean().to(self.Z)
        self.Z = mean if self.Z.isnan() else self.Z + _FORGET * (mean - self.Z)
        if self.local_plate is not None and self.local_size is None:
            self.T = T.mean().to(self.T)  # for information
        elif self.adaptation == "Z_target":
            new = adapt_threshold(
                accepted.all_log_weights,
                T,
                self.Z_target,
                self.epsilon,
                self.T_lr,
                accepted.acceptance,
            )
            self._set_threshold(self._find_items(proposer), new)

    def _warn_of_invalid(self, accepted: Accepted) -> None:
        self._num_invalid += accepted.num_invalid
        self._num_proposed += accepted.rounds[0].log_weight[0].numel() * sum(
            len(r.log_weight) for r in accepted.rounds
        )
        share = self._num_invalid / self._num_proposed
        if share > 0.01 and self._num_proposed >= 100 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._num_invalid} of {self._num_proposed} proposals had a log density "
                "that is -inf, +inf or NaN; they were rejected. Where the density of the "
                "model ends at a hard edge, the pathwise gradient of the guide is biased. "
                "Expected a latent site whose distribution has the support of the "
                "posterior, which automatic guides transform to the real line."
            )

    def _emit(
        self, proposer: Proposer, accepted: Accepted, factor: torch.Tensor, particles: Any
    ) -> Dict[str, torch.Tensor]:
        """Makes the sites that the ELBO sees: the draws, and what is left of the bound."""
        run = accepted.rounds[0].joint.run
        sites = {name: run.sites[name] for name in accepted.values}
        frames = {name: site.frames for name, site in sites.items()}
        if particles is not None:
            factor = (factor / particles.size).expand(
                (particles.size,) + (1,) * (-particles.dim - 1)
            )
        plate: Any = nullcontext()
        if proposer.plate is not None:
            name, size = proposer.plate.name, proposer.plate.size
            frames = {n: tuple(f for f in fs if f.name != name) for n, fs in frames.items()}
            dim = proposer.plate.dim
            assert dim is not None
            factor = factor.expand(size).reshape((size,) + (1,) * (-dim - 1))
            subsample = proposer.subsamples[name]
            full_size = proposer.plate.full_size or size
            plate = pyro.plate(name, full_size, subsample=subsample, dim=dim)
        values = {}
        with plate, FramesMessenger(frames):
            for name, value in accepted.values.items():
                event_dim = sites[name].fn.event_dim
                value = strip(sites[name], value.detach())
                if particles is None:
                    value = value[0]
                else:
                    dim = particles.dim - event_dim
                    value = _with_particles(value[: particles.size], dim)
                fn = Delta(value, event_dim=event_dim, validate_args=False)
                values[name] = pyro.sample(name, fn)
            pyro.factor("_rvrs_factor", factor, has_rsample=True)
        for name, (value, _) in proposer.globals.items():
            if name in run.sites:
                values[name] = value
        return values

    # -- What users ask of the guide ------------------------------------------

    @torch.no_grad()
    def sample_posterior(
        self, num_samples: int, *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        Draws of the guide: proposals that were accepted, independent of one another. With
        a local plate, each has a draw of the global latents, and a subsample, of its own
        if there are any.

        :param int num_samples: number of draws, ``>= 1``.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: a dict of tensors ``[num_samples, *site]``, by name of the latent site.
        :raises ValueError: if ``num_samples`` is no positive int.
        :raises RejectionSamplingError: if acceptance is too low.
        """
        check_count("num_samples", num_samples, 1)
        draws: List[Dict[str, torch.Tensor]] = []
        with ProposalMessenger():  # nothing is seen from outside
            while sum(len(next(iter(d.values()))) for d in draws) < num_samples:
                proposer = self._make_proposer(args, kwargs)
                size = 1 if self._is_mixed(proposer) else num_samples
                accepted = self._sample(proposer, size)
                sites = accepted.rounds[0].joint.run.sites
                draw = {
                    name: value.unsqueeze(0)
                    for name, (value, _) in proposer.globals.items()
                    if name in sites
                }
                for name, value in accepted.values.items():
                    draw[name] = strip(sites[name], value)
                draws.append(draw)
        return {name: torch.cat([d[name] for d in draws]) for name in draws[0]}

    def _is_mixed(self, proposer: Proposer) -> bool:
        """Whether draws of one call share a global latent or a subsample."""
        return proposer.structure.has_globals or proposer.structure.is_subsampled

    def median(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """
        :return: the median of each latent site, of 1,000 draws by :meth:`sample_posterior`.
        """
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(
        self, quantiles: Union[Sequence[float], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Dict[str, torch.Tensor]:
        """
        :param quantiles: between 0 and 1.
        :return: quantiles of each latent site, ``[len(quantiles), *site]``, of 1,000
            draws by :meth:`sample_posterior`.
        """
        draws = self.sample_posterior(NUM_QUANTILE_SAMPLES, *args, **kwargs)
        return {
            name: torch.quantile(x, torch.as_tensor(quantiles).to(x), dim=0)
            for name, x in draws.items()
        }

    @torch.no_grad()
    def elbo(self, num_samples: int, *args: Any, **kwargs: Any) -> Tuple[float, float]:
        """
        Evaluates the ELBO on fresh proposals, all of which are used, accepted or not: much
        more precise than the loss of a step. The bias is of the order of
        ``1 / num_samples``. The threshold stays as it is.

        :param int num_samples: number of proposals, ``>= 2``. With a local plate, for
            each item; if there are global latents or subsamples, they are shared out
            among draws of these, about 256 for each, and there must be 8 or more.
        :param args: arguments of the model; ``kwargs`` likewise.
        :return: the ELBO and its standard error.
        :raises ValueError: if ``num_samples`` is too small.
        :raises RejectionSamplingError: if no proposal has a finite log density.
        """
        check_count("num_samples", num_samples, 2)
        with ProposalMessenger():
            proposer = self._make_proposer(args, kwargs)
            if not self._is_mixed(proposer):
                return self._estimate(proposer, num_samples)
            check_count("num_samples", num_samples, 8)
            num_passes = max(4, num_samples // MAX_ROUND)
            values = []
            for _ in range(num_passes):
                value, _ = self._estimate(proposer, num_samples // num_passes)
                values.append(value)
                proposer = self._make_proposer(args, kwargs)
        x = torch.tensor(values, dtype=torch.float64)
        return x.mean().item(), (x.std() / num_passes**0.5).item()

    def _estimate(self, proposer: Proposer, num_samples: int) -> Tuple[float, float]:
        num_left = num_samples
        chunks = []
        while num_left:
            size = min(num_left, MAX_ROUND)
            chunks.append(proposer.propose(size, with_grad=False).log_weight.double())
            num_left -= size
        log_weight = torch.cat(chunks)
        if (log_weight == -math.inf).all(0).any():
            raise RejectionSamplingError(
                f"Found no finite log density among {num_samples} proposals. Expected some: "
                "raise num_samples, or fit the guide by plain SVI first."
            )
        T = self._find_threshold(proposer).double()
        bound = estimate_bound(log_weight, T, self.epsilon)
        value, error = bound.value.sum(), bound.standard_error.square().sum().sqrt()
        if proposer.plate is not None:
            scale = (proposer.plate.full_size or proposer.plate.size) / proposer.plate.size
            value, error = scale * value, scale * error
            if proposer.globals:
                value = value + proposer.log_ratio_of_globals()
        return value.item(), error.item()


def _with_particles(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Moves particles from dim 0 to ``dim``, a negative int, left of all others."""
    shape = value.shape
    return value.reshape(shape[:1] + (1,) * (-dim - value.dim()) + shape[1:])
