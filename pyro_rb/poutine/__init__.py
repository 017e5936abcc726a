# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.poutine.tap_messenger import TapMessenger
from pyro_rb.poutine.topk_messenger import TopKMessenger, TopKModelMessenger
from pyro_rb.poutine.topk_options import TopKOptions

__all__ = ["TapMessenger", "TopKMessenger", "TopKModelMessenger", "TopKOptions"]
