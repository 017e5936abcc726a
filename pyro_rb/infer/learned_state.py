# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any, Dict, Mapping


class LearnedStateMixin:
    """
    Base class that saves and loads what a loss has learned so far, like the state of an
    optimizer. A pickled loss has this state as well. Subclasses name it before Pyro's class.

    Example::

        >>> from pyro_rb import STLTrace_ELBO
        >>> elbo = STLTrace_ELBO(max_plate_nesting=1)
        >>> state = elbo.state_dict()
        >>> other = STLTrace_ELBO()
        >>> other.load_state_dict(state)
        >>> other.max_plate_nesting
        1
    """

    max_plate_nesting: Any

    def state_dict(self) -> Dict[str, Any]:
        """
        :return: what was learned, as tensors, numbers, strings, lists and dicts, for
            :func:`torch.save` or a checkpoint. It does not contain arguments of the constructor.
        """
        # Pyro guesses the nesting of plates at the first step, and draws random numbers.
        return {"max_plate_nesting": self.max_plate_nesting, **self._get_learned()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """
        Continues where another loss of the same class stopped. If parameters, optimizer and the
        state of random number generators are loaded too, the next steps are those that the other
        loss would have made.

        :param dict state_dict: from :meth:`state_dict`.
        :raises ValueError: if ``state_dict`` is not from a loss of this class.
        """
        learned = dict(state_dict)
        expected = set(self.state_dict())
        if set(learned) != expected:
            raise ValueError(
                f"Invalid state of {type(self).__name__}: found the keys {sorted(learned)}, "
                f"expected {sorted(expected)}. Load what state_dict() of a loss of the same "
                "class returned."
            )
        self.max_plate_nesting = learned.pop("max_plate_nesting")
        self._set_learned(learned)

    def _get_learned(self) -> Dict[str, Any]:
        return {}

    def _set_learned(self, learned: Dict[str, Any]) -> None:
        pass
