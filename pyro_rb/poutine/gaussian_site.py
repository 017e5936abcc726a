# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Literal,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch

from pyro_rb.ops.gaussian import GaussianDraw

#: Some elements of a value: none, all, or those of a boolean tensor of its shape.
Elements = Union[None, Literal[True], torch.Tensor]


def _unseen(fn: Callable) -> Callable:
    """Lets no function mode see a decision about elements: it is none of the user's code."""

    @functools.wraps(fn)
    def unseen(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return fn(*args)

    return unseen


def join(a: Elements, b: Elements) -> Elements:
    """
    >>> join(None, torch.tensor([True, False]))
    tensor([ True, False])
    """
    if a is True or b is True:
        return True
    if a is None or b is None:
        return b if a is None else a
    return a | b


@_unseen
def overlap(a: Elements, b: Elements) -> Elements:
    """
    >>> overlap(True, None) is None
    True
    """
    if a is None or b is None:
        return None
    if a is True or b is True:
        return b if a is True else a
    both = a & b
    return both if both.any() else None


@_unseen
def without(a: Elements, b: Elements) -> Elements:
    """
    >>> without(True, torch.tensor([True, False]))
    tensor([False,  True])
    """
    if b is None or a is None:
        return a
    if b is True:
        return None
    rest = ~b if a is True else a & ~b
    return rest if rest.any() else None


class Plain(NamedTuple):
    """Elements that are never to be projected, and why."""

    elements: Elements
    reason: str


class Step(NamedTuple):
    """One call of a function that makes a view, with its first argument left out."""

    func: Callable
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    item: Optional[int]  # which one, of several results

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = self.func(x, *self.args, **self.kwargs)
        return found if self.item is None else found[self.item]


class GaussianSite:
    """
    A Gaussian site of the guide, during one run of guide and model.

    Elements go together at sites that are not diagonal. ``plain`` lists those that
    may not be projected. Of the others each may be used once: ``used`` are those
    that were, and ``projected`` those whose noise was projected at that use.

    :param str name: of the site.
    :param GaussianDraw draw: its value, and the noise behind it.
    :param Plain plain: elements that are never to be projected.
    """

    def __init__(
        self, name: str, draw: GaussianDraw, plain: Plain = Plain(None, "")
    ) -> None:
        self.name = name
        self.draw = draw
        self.plain, self.plain_reason = plain
        if isinstance(self.plain, torch.Tensor):
            self.plain = self.plain.to(draw.noise.device)
        self.used: Elements = None
        self.projected: Elements = None
        #: Elements that were used again after they were projected, and how.
        self.violated: Elements = None
        self.treatments: Dict[str, str] = {}
        self.reasons: List[str] = []
        self._index: Optional[torch.Tensor] = None
        #: What is known of the noise behind views, see :meth:`condition`.
        self._known: List[Tuple[View, Elements, Optional[torch.Tensor], Any]] = []

    @property
    def key(self) -> Tuple:
        """By which the site is known in other runs."""
        return self.name, self.draw.shape

    @property
    def index(self) -> torch.Tensor:
        """The number of each element, in the shape of the value."""
        if self._index is None:
            shape = self.draw.shape
            device = self.draw.noise.device
            self._index = torch.arange(shape.numel(), device=device).reshape(shape)
        return self._index

    def use(self, elements: Elements, reason: str) -> None:
        """Notes a use of elements that does not project."""
        if self.used is True and self.projected is None:
            return  # all is said
        again = overlap(elements, self.projected)
        if again is not None:
            self.violate(again, reason)
        elif reason not in self.reasons:
            self.reasons.append(reason)
        self.used = join(self.used, elements)

    def violate(self, elements: Elements, reason: str) -> None:
        """Notes that the run is void, since elements were projected that may not be."""
        self.violated = join(self.violated, elements)
        if reason not in self.reasons:
            self.reasons.append(reason)

    def project(self, elements: Elements, treatment: str, reason: str) -> None:
        """Notes a use that projects those of the elements that may be."""
        free = without(elements, join(self.used, self.plain))
        self.projected = join(self.projected, free)
        self.used = join(self.used, elements)
        self.treatments[reason] = treatment

    def condition(
        self, view: "View", free: Elements, mean: Any = None, square: Any = None
    ) -> None:
        """
        Notes what is known of the noise that a view shows, given the result of its use.

        :param free: of which elements, in the shape of the view.
        :param mean: the conditional mean, in the same shape; None if not known.
        :param square: the mean of its square over all noise; None if not known.
        """
        self._known.append((view, free, mean, square))

    @property
    def has_moments(self) -> bool:
        """Whether :meth:`moments` are known anywhere."""
        return self.draw.is_diagonal and any(mean is not None for _, _, mean, _ in self._known)

    def moments(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        The conditional mean of the noise, and by how much that of its square is above one,
        given the results of all projected uses. Both have mean zero over all noise, and are
        zero where nothing is known.
        """
        mean, excess = self.draw.noise.clone(), self.draw.noise.square() - 1.0
        for view, free, star, square in self._known:
            star = torch.zeros_like(view.tensor) if star is None else star
            over = torch.zeros_like(star) if square is None else star.square() - square
            if free is True and view.tensor is self.draw.value:
                mean, excess = star, over
                continue
            index = view.replay(self.index)
            for total, part in ((mean, star), (excess, over)):
                if isinstance(free, torch.Tensor):
                    part = torch.where(free, part, view.replay(total))
                total.view(-1)[index] = part
        return mean, excess


class View:
    """
    A tensor that is the value of a site, or shows some of its elements.

    :param GaussianSite site: the site.
    :param torch.Tensor tensor: what the user's code has.
    :param View parent: the view that it is a view of.
    :param Step step: how it was made of it.
    :param bool is_whole: whether each element of the parent occurs in it once.
    """

    def __init__(
        self,
        site: GaussianSite,
        tensor: torch.Tensor,
        parent: Optional["View"] = None,
        step: Optional[Step] = None,
        is_whole: bool = True,
    ) -> None:
        self.site = site
        self.tensor = tensor
        self._parent = parent
        self._step = step
        self._version = _get_version(tensor)
        self._is_whole: bool = is_whole and (parent is None or parent._is_whole)
        self._found: Optional[Tuple[Elements, bool]] = None

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        """Makes the same view of another tensor with the shape of the site's value."""
        if self._parent is None or self._step is None:
            return x
        return self._step(self._parent.replay(x))

    @property
    def is_edited(self) -> bool:
        """Whether it was changed in place since it was made."""
        is_own = _get_version(self.tensor) != self._version
        return is_own or (self._parent is not None and self._parent.is_edited)

    @property
    def elements(self) -> Elements:
        """Of the site."""
        return self._find()[0]

    @property
    def has_repeats(self) -> bool:
        """Whether it shows an element more than once."""
        return self._find()[1]

    @_unseen
    def _find(self) -> Tuple[Elements, bool]:
        if self._found is None:
            found: Tuple[Elements, bool] = (True, False)
            if not self._is_whole:
                index = self.replay(self.site.index).reshape(-1)
                mask = torch.zeros(self.site.draw.shape, dtype=torch.bool, device=index.device)
                mask.view(-1)[index] = True
                has_repeats = bool(mask.sum() < index.numel())
                is_joint = not self.site.draw.is_diagonal
                found = (True if is_joint else mask, has_repeats)
            self._found = found
        return self._found

    @property
    @_unseen
    def free(self) -> Elements:
        """What may be projected, in the shape of the view."""
        site = self.site
        taken = join(site.used, site.plain)
        if taken is None:
            return True
        if overlap(self.elements, taken) is None:
            return True
        if taken is True or not site.draw.is_diagonal:
            return None
        free = ~self.replay(taken)
        return free if free.any() else None


def _get_version(tensor: torch.Tensor) -> Optional[int]:
    """None in :func:`torch.inference_mode`, where edits are not counted."""
    return None if tensor.is_inference() else tensor._version
