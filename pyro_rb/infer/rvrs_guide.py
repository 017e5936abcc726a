# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import math
from contextlib import nullcontext
from typing import Any, Callable, Dict, Optional, Tuple

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates

from pyro_rb.infer.rvrs_options import check_count, check_options
from pyro_rb.infer.rvrs_posterior import PosteriorMixin
from pyro_rb.infer.rvrs_proposals import Proposer, strip
from pyro_rb.infer.rvrs_sampler import Accepted, redraw, take
from pyro_rb.infer.rvrs_surrogate import compute_surrogate
from pyro_rb.ops.rejection import log_normalizer
from pyro_rb.poutine import FramesMessenger


class RVRSGuide(PosteriorMixin, PyroModule):
    r"""
    A guide that is closer to the posterior than the guide that it wraps, by
    rejection sampling [1, 2]. :class:`~pyro.infer.SVI` with
    :class:`~pyro.infer.Trace_ELBO` trains it, by an exact pathwise gradient.

    Draws :math:`z` of the given guide :math:`q_\phi` are proposals. With
    :math:`\ell = \log p_\theta(x, z) - \log q_\phi(z)`, a proposal is accepted with probability

    .. math::

        a(z) = \epsilon + (1 - \epsilon) \, \sigma(\ell + T),

    so that accepted draws have the density :math:`r(z) = q(z) a(z) / Z` with
    :math:`Z = E_q[a]`. The smaller the threshold :math:`T`, the closer :math:`r` is to the
    posterior, and the more proposals are needed: :math:`1 / Z` for each accepted draw. The objective
    is the ELBO of :math:`r` (section 3 of [2]),

    .. math::

        E_r[f] + \log Z, \qquad f = \ell - \log a.

    The gradient is unbiased at fixed :math:`T`, from ``num_samples`` accepted draws per
    call. It needs one evaluation of the model's gradient, and does not need :math:`Z`. Each loss is
    an unbiased but noisy estimate of the objective (with a minus sign). To follow the training, use
    :meth:`~pyro_rb.infer.rvrs_posterior.PosteriorMixin.elbo`.

    **Requirements.** A model whose log density is a function of its latents. Model
    and guide must allow for a batch dim on the left, as for ``vectorize_particles=True``.
    The guide must have reparameterized draws, and a support that does not depend on a parameter:
    :class:`~pyro.infer.autoguide.AutoNormal`,
    :class:`~pyro.infer.autoguide.AutoDiagonalNormal`,
    :class:`~pyro.infer.autoguide.AutoMultivariateNormal`,
    :class:`~pyro.infer.autoguide.AutoLowRankMultivariateNormal`,
    :class:`~pyro.infer.autoguide.AutoIAFNormal` and other flows, an
    :class:`~pyro.infer.autoguide.AutoGuideList` of these, or a function. The first call
    checks all this, at the cost of about ten runs of model and guide. The loss must be
    ``Trace_ELBO``. Vectorized particles are accepted draws of one call.
    ``model`` must be the same object that is given to ``SVI``. A
    :func:`~pyro.poutine.scale` must be around both the guide and the model of ``SVI``.

    **Local latents.** The more latents are accepted or rejected together, the less is
    gained. Name the plate of local latents as ``local_plate``. They are then accepted
    item by item, each item with a threshold of its own, and the plate may be subsampled.
    Latents outside the plate come from the same guide and are not rejected. With ``local_size`` the
    thresholds are kept and adapted. Without it, each call finds those of its items from up to 32
    proposals that it discards. This works for data without an index and for unseen data.

    **When it is worse.** A step costs about ``num_samples / Z`` evaluations of the model.
    If a mean-field guide is good enough, take that. Fit the guide by plain SVI first, and
    wrap it then; its parameters keep their names. Where :math:`\ell` falls faster than quadratically
    in the tails of the guide, draws from there, which are accepted with probability
    :math:`\epsilon`, make gradients heavy-tailed. Take a smaller ``epsilon`` or a narrower
    guide. Where the model's density ends at a hard edge inside the guide's support,
    the gradient is biased; there is a warning when such proposals occur. Gradients are right to
    first order only. RenyiELBO and importance sampling need the density of each draw, and
    give nonsense with this guide.

    :param callable model: the model.
    :param callable guide: the proposal. Defaults to ``AutoDiagonalNormal(model)``.
    :param int num_samples: number of accepted draws per call, ``>= 2``. Defaults to 2.
    :param float T: the threshold to start from. None, the default, finds the one for
        ``Z_target`` from proposals that are discarded.
    :param float epsilon: least acceptance probability, between 0 and 1. Defaults to a thousandth of
        ``Z_target``. Larger values lower the ELBO.
    :param float Z_target: the desired mean acceptance, between ``epsilon`` and 1.
        Defaults to 0.33.
    :param str adaptation: With ``"Z_target"``, the default, the threshold follows the
        acceptance, in training mode and with gradients enabled. With ``"fixed"`` it stays.
    :param float T_lr: learning rate of the threshold. Defaults to 0.1.
    :param int max_steps: the largest number of proposals in a call, for each ``num_samples`` draws
        and each item of the local plate. Defaults to 100,000.
    :param str local_plate: name of the plate of the local latents. Defaults to None.
    :param int local_size: full size of that plate. Defaults to None.
    :ivar torch.Tensor T: the threshold, 0-dim or ``[local_size]``, NaN before it is
        known; without ``local_size``, the mean of the last thresholds. In ``state_dict``.
    :ivar torch.Tensor Z: running mean of the acceptance in training. In ``state_dict``.
    :ivar guide: the proposal.
    :raises ValueError: naming the argument that is out of range. At a call, naming the
        site, for a latent that the guide lacks, and for a plate that does not exist or is not
        of ``local_size``.
    :raises NotImplementedError: at a call, naming the site or the plate, for guide sites that
        are discrete, point estimates, or otherwise without a path gradient; for a subsampling
        plate that is not ``local_plate``; for a model or guide that gives another result for
        two proposals at a time; for ``local_plate`` within vectorized particles; for JIT losses.
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

    def __init__(
        self,
        model: Callable,
        guide: Optional[Callable] = None,
        *,
        num_samples: int = 2,
        T: Optional[float] = None,
        epsilon: Optional[float] = None,
        Z_target: float = 0.33,
        adaptation: str = "Z_target",
        T_lr: float = 0.1,
        max_steps: int = 100_000,
        local_plate: Optional[str] = None,
        local_size: Optional[int] = None,
    ) -> None:
        super().__init__()
        check_count("num_samples", num_samples, 2)
        check_count("max_steps", max_steps, 1)
        epsilon = check_options(T, epsilon, Z_target, adaptation, T_lr, local_plate, local_size)
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
        self._is_given = T is not None and adaptation == "fixed"
        first = torch.full(() if local_size is None else (local_size,), math.nan if T is None else T)
        self.register_buffer("T", first)
        self.register_buffer("T_step", torch.zeros_like(first))
        self.register_buffer("T_age", torch.zeros_like(first))
        self.register_buffer("Z", torch.tensor(math.nan))
        self._key = None
        self._others = {}
        self._structure = None
        self._structures = {}
        self.register_buffer("_num_proposed", torch.tensor(0), persistent=False)
        self._num_invalid = 0
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
        return {**self.__dict__, "_structure": None, "_structures": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """
        Makes the sites of the latents, and a factor, inside a loss.

        :return: the draw of each latent site, by name.
        """
        particles = self._find_particles()
        num_emitted = 1 if particles is None else particles.size
        num_samples = max(self.num_samples, num_emitted)

        def make(proposer: Proposer) -> Tuple[Proposer, Accepted, torch.Tensor]:
            accepted = self._accept(proposer, num_samples)
            surrogate = compute_surrogate(proposer, accepted, self.epsilon, num_emitted)
            log_z = log_normalizer(num_samples, accepted.num_proposed).to(surrogate.mean_f)
            bound = num_emitted * (surrogate.mean_f + log_z)
            factor = surrogate.log_p - bound
            if surrogate.gradient is not None:
                factor = factor - (surrogate.gradient - surrogate.gradient.detach())
            return proposer, accepted, factor

        proposer, accepted, factor = self._attempt(make, args, kwargs)
        values = self._emit(proposer, accepted, factor, particles)
        if self.training and torch.is_grad_enabled():
            self._adapt(proposer, accepted)
        return values

    def _accept(self, proposer: Proposer, num_samples: int) -> Accepted:
        structure = proposer.structure
        is_step = self.training and torch.is_grad_enabled()
        if structure.is_small or not (structure.redraws and torch.is_grad_enabled()):
            return self._sample(proposer, num_samples, structure.is_small, is_step)
        with torch.no_grad():
            accepted = self._sample(proposer, num_samples, False, is_step, structure.redraws)
        return redraw(proposer, accepted)

    def _find_particles(self) -> Any:
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "RVRSGuide was called inside of torch.jit.trace, which would freeze the "
                "number of proposals and the threshold. Expected Trace_ELBO in place of "
                "JitTrace_ELBO; pyro_rb.compile(Trace_ELBO()) takes less time."
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
                f"'{plates[0].name}'. Expected no vectorized particles or predictions: "
                "raise num_samples in place of num_particles, and set parallel=False."
            )
        return plates[0]

    def _emit(
        self, proposer: Proposer, accepted: Accepted, factor: torch.Tensor, particles: Any
    ) -> Dict[str, torch.Tensor]:
        """Makes the sites that the ELBO sees: the draws, and what is left of the bound."""
        sites = proposer.structure.sites
        draws = take(proposer, accepted, proposer.latents)
        frames = {name: sites[name].frames for name in draws}
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
            for name, value in draws.items():
                event_dim = sites[name].event_dim
                value = strip(sites[name], value.detach())
                if particles is None:
                    value = value[0]
                else:
                    dim = particles.dim - event_dim
                    value = _with_particles(value[: particles.size], dim)
                fn = Delta(value, event_dim=event_dim, validate_args=False)
                infer: Any = {"_no_density": "RVRSGuide"}
                values[name] = pyro.sample(name, fn, infer=infer)
            pyro.factor("_rvrs_factor", factor, has_rsample=True)
        for name, (value, _) in proposer.globals.items():
            if name in sites:
                values[name] = value
        return values


def _with_particles(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Moves particles from dim 0 to ``dim``, a negative int, left of all others."""
    shape = value.shape
    return value.reshape(shape[:1] + (1,) * (-dim - value.dim()) + shape[1:])
