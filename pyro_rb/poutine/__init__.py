# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.poutine.draw_messenger import DrawMessenger, Strategy
from pyro_rb.poutine.frames_messenger import FramesMessenger
from pyro_rb.poutine.path_gradient import PathGradient, TapMessenger
from pyro_rb.poutine.projected_use import ProjectionOptions
from pyro_rb.poutine.projection_strategy import Projection
from pyro_rb.poutine.proposal_messenger import ProposalMessenger
from pyro_rb.poutine.provenance_messenger import ProvenanceMessenger
from pyro_rb.poutine.shared_subsample_messenger import SharedSubsampleMessenger
from pyro_rb.poutine.topk_model_messenger import TopKModelMessenger
from pyro_rb.poutine.topk_options import TopKOptions
from pyro_rb.poutine.topk_strategy import TopK

__all__ = [
    "DrawMessenger",
    "FramesMessenger",
    "PathGradient",
    "Projection",
    "ProposalMessenger",
    "ProvenanceMessenger",
    "ProjectionOptions",
    "SharedSubsampleMessenger",
    "Strategy",
    "TapMessenger",
    "TopK",
    "TopKModelMessenger",
    "TopKOptions",
]
