# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_rb.ops import normal
from pyro_rb.poutine.path_gradient import TapMessenger

#: Name of the dim of the proposals in ``cond_indep_stack``.
PROPOSALS = "_rvrs_proposals"


class Site(NamedTuple):
    """A sample site as it was seen by :class:`ProposalMessenger`."""

    fn: Any
    #: ``[M, *batch, *event]``.
    value: Any
    #: ``[M, *batch]``, scaled and masked; the scale of the local plate is left out.
    log_prob: Optional[torch.Tensor]
    #: Plates, without the dim of the proposals.
    frames: Tuple[CondIndepStackFrame, ...]
    scale: Any
    is_observed: bool
    is_auxiliary: bool
    #: Name of what drew it, if that does not know the density.
    no_density: Optional[str]

    @property
    def event_dim(self) -> int:
        return int(self.fn.event_dim)


class ProposalMessenger(Messenger):
    """
    Runs a model or a guide once for M proposals, out of sight: no sample site, plate or mask passes
    through the handler in either direction. Param statements do.

    The proposals are along a dim of their own, as the particles of
    ``vectorize_particles=True`` are. That dim is not taken from Pyro's allocator, so it may be the
    very dim of a plate of particles around the handler.

    :param dim: the dim of the proposals, left of all plates, a negative int. None runs the code once as it is.
    :param int size: the number of proposals, M.
    :param values: values by name, to be used at these latent sites.
    :param subsamples: indices of subsampling plates by name. Those that are missing are drawn, and added.
    :param tap: what latent sites are drawn by, so that they have path gradients where they can.
    :param redraws: draws of normal distributions by name. At these latent sites they are made once more, with
        a graph, from the same noise.
    :param str plate: if given, log densities are taken only of the sites inside of this plate, without the
        scale that comes from its subsampling.
    :param bool expose: Whether to let sites outside of ``plate`` pass.
    :raises ValueError: at a site in a plate at ``dim`` or left of it.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))
        >>> with ProposalMessenger(dim=-2, size=5) as run:
        ...     model()
        >>> run.log_prob_sum().shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: Optional[int] = None,
        size: int = 1,
        values: Optional[Mapping[str, torch.Tensor]] = None,
        subsamples: Optional[Dict[str, torch.Tensor]] = None,
        tap: Optional[TapMessenger] = None,
        plate: Optional[str] = None,
        expose: bool = False,
        redraws: Optional[Mapping[str, torch.Tensor]] = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.size = size
        self.values = {} if values is None else values
        self.subsamples = {} if subsamples is None else subsamples
        self.tap = tap
        self.plate = plate
        self.expose = expose
        self.redraws = {} if redraws is None else redraws
        self.sites: Dict[str, Site] = {}
        #: Names of the plates whose subsample the code itself chose.
        self.has_chosen: Set[str] = set()
        #: The distribution of the site at hand, before it was made one of all proposals.
        self._narrow: Any = None
        self._log_prob: Optional[torch.Tensor] = None
        #: Log densities that are known to no one else.
        self._fresh: List[torch.Tensor] = []
        self._stack: Tuple[CondIndepStackFrame, ...] = ()
        if dim is not None:
            self._stack = (CondIndepStackFrame(PROPOSALS, dim, size, 0),)

    def _process_message(self, msg: Any) -> None:
        if msg["type"] in ("sample", "inspect"):
            msg["stop"] = msg["stop"] or not self._is_exposed(msg)
            if not site_is_subsample(msg):
                msg["cond_indep_stack"] = self._stack + msg["cond_indep_stack"]
        super()._process_message(msg)

    def _is_exposed(self, msg: Any) -> bool:
        return (
            self.expose
            and not site_is_subsample(msg)
            and all(frame.name != self.plate for frame in msg["cond_indep_stack"])
        )

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None:
                msg["value"] = self.subsamples.get(msg["name"])
            else:
                self.has_chosen.add(msg["name"])
            return
        self._narrow, self._log_prob = msg["fn"], None
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        if self._stack:
            for frame in msg["cond_indep_stack"][1:]:
                if frame.dim is not None and frame.dim <= self.dim:
                    raise ValueError(
                        f"Found plate '{frame.name}' at dim {frame.dim} around site "
                        f"'{msg['name']}'. Expected it right of the proposals, which are "
                        f"along dim {self.dim}."
                    )
            BroadcastMessenger._pyro_sample(msg)
        is_free_normal = msg["value"] is None and normal.is_normal(self._narrow)
        if is_free_normal and msg["name"] in self.redraws:
            msg["value"] = normal.redraw(msg["fn"], self.redraws[msg["name"]])
            if self.tap is not None:
                self.tap.draw(msg)
            return
        if self.tap is not None:
            self.tap._pyro_sample(msg)
        if msg["value"] is None and is_free_normal:
            if self._stack and not (msg["args"] or torch.is_grad_enabled()):
                msg["value"], self._log_prob = normal.draw(self._narrow, msg["fn"].shape())

    def _pyro_post_sample(self, msg: Any) -> None:
        name, infer = msg["name"], msg["infer"]
        if site_is_subsample(msg):
            self.subsamples[name] = msg["value"]
            return
        if infer.get("_do_not_trace") or infer.get("_deterministic"):
            return
        if self.tap is not None:
            self.tap._pyro_post_sample(msg)
        frames = msg["cond_indep_stack"][len(self._stack) :]
        scale, log_prob = msg["scale"], None
        local = [frame for frame in frames if frame.name == self.plate]
        if local:
            scale = scale * local[0].size / (local[0].full_size or local[0].size)
        if local or self.plate is None:
            try:
                log_prob = self._find_log_prob(msg)
            except ValueError as e:
                raise ValueError(f"Error at site '{name}', of its log_prob:\n{e}") from e
            log_prob = scale_and_mask(log_prob, scale, msg["mask"])
            if self._stack and log_prob.shape[: log_prob.dim() + self.dim + 1] != (self.size,):
                raise ValueError(
                    f"Found log_prob of shape {tuple(log_prob.shape)} at site '{name}'. "
                    f"Expected {self.size} proposals along dim {self.dim}, and plates to "
                    "the right of it. Put each batch dim of the site in a pyro.plate, or "
                    "make it part of the event by .to_event()."
                )
        self.sites[name] = Site(
            msg["fn"],
            msg["value"],
            log_prob,
            frames,
            scale,
            msg["is_observed"],
            bool(infer.get("is_auxiliary")),
            infer.get("_no_density"),
        )

    def _find_log_prob(self, msg: Any) -> torch.Tensor:
        fn, value, narrow = msg["fn"], msg["value"], self._narrow
        flow = None if self.tap is None else self.tap.path.flow_of(value)
        if flow is not None:
            return flow.log_prob
        if self._log_prob is not None:
            self._fresh.append(self._log_prob)
            return self._log_prob
        if self._stack and isinstance(fn, TorchDistributionMixin) and not msg["args"]:
            if type(fn) is Delta and not (msg["is_observed"] or msg["name"] in self.values):
                return fn.log_density  # of its own value
            # What depends on parameters alone is computed once for all proposals.
            is_normal = normal.is_normal(narrow)
            log_prob = normal.log_prob(narrow, value) if is_normal else narrow.log_prob(value)
            shapes = narrow.batch_shape, value.shape[: value.dim() - len(fn.event_shape)]
            if log_prob.shape == torch.broadcast_shapes(*shapes):
                shape = torch.broadcast_shapes(log_prob.shape, fn.batch_shape)
                if log_prob.shape != shape:
                    return log_prob.expand(shape)
                if is_normal:
                    self._fresh.append(log_prob)
                return log_prob
        return fn.log_prob(value, *msg["args"], **msg["kwargs"])

    @property
    def latents(self) -> Dict[str, Site]:
        return {name: site for name, site in self.sites.items() if not site.is_observed}

    def log_prob_sum(self, keep_dim: Optional[int] = None) -> torch.Tensor:
        """
        The sum of the log densities. Without gradients, it may share the memory of one of its terms.

        :param keep_dim: the dim of the local plate, a negative int.
        :return: log densities ``[M]``, or ``[M, N]`` with those of the items of the local
            plate along the second dim.
        """
        terms: List[torch.Tensor] = []
        for site in self.sites.values():
            if site.log_prob is None:
                continue
            x = site.log_prob if self._stack else site.log_prob.unsqueeze(0)
            if keep_dim is None:
                terms.append(x.reshape(len(x), -1).sum(-1))
            else:
                others = [i for i in range(1, x.dim()) if i != x.dim() + keep_dim]
                terms.append(x.sum(others) if others else x)
        if not terms:
            return torch.zeros(self.size)
        if torch.is_grad_enabled():
            return sum(terms[1:], terms[0])
        # New memory takes more time than sums do.
        fresh = [i for i, x in enumerate(terms) if any(x is y for y in self._fresh)]
        total = terms.pop(fresh[0]) if fresh else terms.pop().clone()
        for x in terms:
            total += x
        return total
