# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import re
from contextlib import contextmanager
from typing import Iterator, Optional

from pyro_rb.poutine import TopK

_SHAPES = re.compile("shape|size|dim|broadcast|ind(ex|ices)|scalar|ambiguous|alloc", re.I)


@contextmanager
def hint(topk: Optional[TopK]) -> Iterator[None]:
    """Names the sites that were enumerated in errors that they may have caused."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        names = [site.name for site in topk.enumerated] if topk is not None else []
        is_known = type(e) in (IndexError, RuntimeError, TypeError, ValueError)
        text = str(e).split("Trace Shapes:")[0]
        if not (is_known and names and _SHAPES.search(text)) or "{'topk'" in text:
            raise
        raise type(e)(
            f"{e}\nThe values of the guide sites {names} have one more dim on the left, "
            "for the values that are looked at. If the model or guide cannot do with "
            "it, index by pyro.ops.indexing.Vindex, avoid .item() and if, or set "
            "infer={'topk': 0} at the site."
        ) from e
