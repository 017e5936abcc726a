# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a run of model and guide moves, and how to put it back."""

import operator
from collections import OrderedDict
from typing import Any, List, Sequence, Tuple

import torch

from pyro_rb.compiled.reach import Slot, read_class, read_item
from pyro_rb.infer.generators import get_generators, set_generators


class Contents:
    """
    What lists, dicts, attributes and variables hold now. What else objects keep, such as the place of an iterator, is
    not known.

    :param slots: those that a run may change.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        reads: List[Tuple[Slot, Any]] = [(slot, slot.read) for slot in slots]
        self._slots = [(slot, read.func, *read.args) for slot, read in reads if read.func is not len]
        #: Those that were empty.
        self._empty = {id(slot) for slot, func, x, *key in self._slots if func is read_item and key[0] not in x}
        whole = [read.args[0] for _, read in reads if read.func is len]
        self._whole: List[Tuple[Any, List]] = [(x, _list(x)) for x in whole if isinstance(x, (list, dict))]

    def put_back(self) -> None:
        """Makes all hold what they held. What has not changed is not written to."""
        for x, items in self._whole:
            now = _list(x)
            if len(now) == len(items) and not any(map(operator.is_not, now, items)):
                continue
            # Not by methods of subclasses, as Counter.update() adds up.
            cls: Any = next(c for c in (OrderedDict, dict, list) if isinstance(x, c))
            cls.clear(x)
            if cls is list:
                cls.extend(x, items)
            else:
                for key, value in zip(items[::2], items[1::2]):
                    cls.__setitem__(x, key, value)
        for slot, func, holder, *key in self._slots:
            if not slot.has_changed():
                continue
            if func is frozenset:
                set.clear(holder)
                set.update(holder, slot.value)
            elif func in (getattr, read_class):
                setattr(holder, key[0], slot.value)
            elif id(slot) in self._empty:
                holder.pop(key[0], None)
            elif key:
                holder[key[0]] = slot.value
            else:  # of a closure
                holder.cell_contents = slot.value


def _list(x: Any) -> List[Any]:
    return [part for item in x.items() for part in item] if isinstance(x, dict) else list(x)


class State:
    """
    Random number generators and buffers as they are now.

    :param buffers: tensors that a run may change in place.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = list(buffers)
        self._values = [b.detach().clone() for b in buffers]
        self._generators = get_generators()

    def restore(self) -> None:
        """Puts everything back. A tensor that has not changed is not written to."""
        set_generators(self._generators)
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._values):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    def random_python(self) -> Any:
        """Of Python and NumPy."""
        state = self._generators[0]
        numpy = state["numpy"]
        return state["random"], numpy[1].tobytes(), *numpy[2:]

    def compare(self) -> str:
        """What is not as it was; empty if nothing is."""
        other = State(self._buffers)
        for a, b in zip(self._values, other._values):
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True):
                return "a buffer was changed in another way"
        (state, cuda), (other_state, other_cuda) = self._generators, other._generators
        mine = [state["torch"], *(cuda or [])]
        theirs = [other_state["torch"], *(other_cuda or [])]
        if not all(map(torch.equal, mine, theirs)):
            return "another number of random numbers was drawn"
        return ""
