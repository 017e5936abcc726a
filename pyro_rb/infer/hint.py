# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import re
from contextlib import contextmanager
from typing import Callable, Iterator

_SHAPES = re.compile(
    "shape|size|dim|broadcast|ind(ex|ices)|scalar|ambiguous|unpack|length|alloc", re.I
)

#: A value that a table does not have. Another shape would not help.
_VALUES = re.compile("out of bounds(?!.*with size 1$)|out of range in self")
_ERRORS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


@contextmanager
def hint_at_shapes(find_hint: Callable[[], str]) -> Iterator[None]:
    """
    Adds a hint to errors that look as if a tensor had a shape that was not expected.

    :param find_hint: called at such an error; gives a remedy, or an empty string.

    >>> import torch
    >>> with hint_at_shapes(lambda: "Did you try its transpose?"):
    ...     torch.zeros(2, 3) @ torch.zeros(2)
    Traceback (most recent call last):
    RuntimeError: size mismatch, got input (2), mat (2x3), vec (2)
    Did you try its transpose?
    """
    try:
        yield
    except _ERRORS as e:
        is_known = type(e) in _ERRORS
        text = str(e).split("Trace Shapes:")[0].strip()
        # Most assertions in models are about shapes, and do not say so.
        is_by_shape = isinstance(e, AssertionError) or (
            _SHAPES.search(text) and not _VALUES.search(text)
        )
        hint = find_hint() if is_known and is_by_shape else ""
        if not hint:
            raise
        raise type(e)(f"{e}\n{hint}") from e
