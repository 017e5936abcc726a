# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.poutine.frames_messenger import FramesMessenger
from pyro_rb.poutine.projected_use import ProjectionOptions
from pyro_rb.poutine.proposal_messenger import ProposalMessenger
from pyro_rb.poutine.provenance_messenger import ProvenanceMessenger
from pyro_rb.poutine.r2g2_messenger import R2G2Messenger
from pyro_rb.poutine.shared_subsample_messenger import SharedSubsampleMessenger
from pyro_rb.poutine.tap_messenger import TapMessenger
from pyro_rb.poutine.topk_messenger import TopKMessenger
from pyro_rb.poutine.topk_model_messenger import TopKModelMessenger
from pyro_rb.poutine.topk_options import TopKOptions

__all__ = [
    "FramesMessenger",
    "ProposalMessenger",
    "ProvenanceMessenger",
    "ProjectionOptions",
    "R2G2Messenger",
    "SharedSubsampleMessenger",
    "TapMessenger",
    "TopKMessenger",
    "TopKModelMessenger",
    "TopKOptions",
]
