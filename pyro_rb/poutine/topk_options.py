# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, NamedTuple, Optional


class TopKOptions(NamedTuple):
    """
    How evaluations are spent at a site.

    :param int k: the number of categories to sum.
    :param int num_samples: the number of draws from the other categories.
    :param int budget: the number of evaluations, in place of the other two; or None.
    :param int sum_up_to: if a site has at most this many values, all are summed, whatever the other options say.
    """

    k: int = 1
    num_samples: int = 1
    budget: Optional[int] = None
    sum_up_to: int = 0

    @property
    def num_slots(self) -> int:
        return self.k + self.num_samples if self.budget is None else self.budget

    @classmethod
    def make(
        cls,
        k: Any = None,
        num_samples: Any = None,
        budget: Any = None,
        sum_up_to: Any = None,
        default: Optional["TopKOptions"] = None,
        where: str = "",
    ) -> "TopKOptions":
        """
        Checks options and fills in those that are None.

        :param default: the options to fill in from, if none of those given says how many values are
            looked at. Defaults to ``k=1, num_samples=1``.
        :param where: goes into error messages, such as ``" at guide site 'z'"``.
        :raises ValueError: naming the argument, if one is not an int of the required
            size, or if ``budget`` comes together with another.

        >>> TopKOptions.make(k=3)
        TopKOptions(k=3, num_samples=1, budget=None, sum_up_to=0)
        """
        default = default or cls()
        given = {
            "k": (k, 0),
            "num_samples": (num_samples, 1),
            "budget": (budget, 1),
            "sum_up_to": (sum_up_to, 0),
        }
        for name, (value, least) in given.items():
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_int and value >= least):
                raise ValueError(
                    f"Invalid {name}{where}: {value!r}. Expected an int >= {least}."
                )
        if budget is not None:
            if k is not None or num_samples is not None:
                raise ValueError(
                    f"Found budget={budget} together with k={k} and num_samples="
                    f"{num_samples}{where}. Expected a budget, which is shared out for "
                    "you, or the other two."
                )
        if budget is None and k is None and num_samples is None:
            return default if sum_up_to is None else default._replace(sum_up_to=sum_up_to)
        return cls(
            default.k if k is None else k,
            default.num_samples if num_samples is None else num_samples,
            budget,
            sum_up_to or 0,
        )
