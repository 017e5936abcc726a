# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
What an RVRSGuide remembers of a model and guide, and how it notices that they changed.
"""

from typing import Any, Dict, Mapping, NamedTuple, Optional, Sized, Tuple

from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_rb.poutine import ProposalMessenger

Frames = Tuple[CondIndepStackFrame, ...]


def is_in(plate: str, frames: Frames) -> bool:
    return any(frame.name == plate for frame in frames)


class StructureChanged(Exception):
    """Model or guide is not what it was when it was looked at."""


class Latent(NamedTuple):
    """A latent site of the model."""

    frames: Frames
    event_dim: int
    #: Of one draw.
    shape: Tuple[int, ...]


class Structure(NamedTuple):
    """A model and a guide, with the sizes of their plates."""

    #: Dim of the proposals, left of all plates of model and guide.
    dim: int
    #: What runs of the code look like.
    guide_signature: Tuple = ()
    model_signature: Tuple = ()
    #: The plate of the local latents, if any.
    frame: Optional[CondIndepStackFrame] = None
    #: Whether the code itself chose the items of that plate.
    is_chosen: bool = False
    #: Whether the guide samples anything outside of that plate.
    has_globals: bool = False
    #: Whether the model is to be run for one proposal at a time, and if so, whether
    #: by torch.vmap.
    is_looped: bool = False
    is_mapped: bool = False
    #: Latents of the model.
    sites: Mapping[str, Latent] = {}
    #: Elements of values and log densities, of model and guide, for one proposal.
    num_elements: int = 1
    #: Whether these are so few that a gradient of all proposals is cheaper than a second
    #: evaluation of those that were accepted.
    is_small: bool = True
    #: Draws of the guide, if they can be made once more from their values.
    redraws: Tuple[str, ...] = ()
    #: Shapes of the arguments, and a number for what a threshold depends on.
    arguments: Tuple = ()
    key: int = 0

    @property
    def plate(self) -> Optional[str]:
        """Name of the local plate."""
        return None if self.frame is None else self.frame.name

    @property
    def plate_dim(self) -> Optional[int]:
        return None if self.frame is None else self.frame.dim

    @property
    def num_items(self) -> int:
        """Of the local plate, in a call."""
        return 1 if self.frame is None else self.frame.size

    @property
    def full_size(self) -> int:
        """Of the local plate."""
        frame = self.frame
        return self.num_items if frame is None else frame.full_size or frame.size

    @property
    def is_subsampled(self) -> bool:
        return self.full_size != self.num_items


def sign(run: ProposalMessenger, without: Optional[str] = None) -> Tuple:
    """
    Names, plates and sizes of the sites of a run: the same for many proposals at a time,
    and for one.

    :param without: name of a plate of which the size is left out.
    """
    signature = []
    for name, site in run.sites.items():
        frames = [
            (f.name, f.dim, int(f.size), f.full_size and int(f.full_size))
            for f in site.frames
            if f.name != without
        ]
        batch = tuple(getattr(site.fn, "batch_shape", ()))
        if run.dim is not None:
            batch = batch[max(0, len(batch) + run.dim + 1) :]
        while batch[:1] == (1,):
            batch = batch[1:]
        event = tuple(getattr(site.fn, "event_shape", ()))
        is_inside = len(frames) < len(site.frames)
        signature.append((name, site.is_observed, *frames, () if is_inside else batch, event))
    return tuple(signature)


def shapes(args: Tuple, kwargs: Dict[str, Any]) -> Tuple:
    """
    Shapes of tensors, and lengths of other containers, among arguments.

    >>> import torch
    >>> shapes((torch.zeros(3, 2), 0.5), {"names": ["a", "b"]})
    ((3, 2), None, 2)
    """
    return tuple(map(_shape, (*args, *kwargs.values())))


def _shape(x: Any) -> Any:
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple):
        return tuple(shape)
    return len(x) if isinstance(x, Sized) else None
