# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

from pyro_rb.infer.dreg_elbo import DReG_ELBO
from pyro_rb.infer.r2g2_elbo import R2G2_ELBO
from pyro_rb.infer.rao_blackwell_elbo import RaoBlackwell_ELBO
from pyro_rb.infer.rvrs_guide import RVRSGuide
from pyro_rb.infer.rvrs_sampler import RejectionSamplingError
from pyro_rb.infer.stl_elbo import STLTrace_ELBO
from pyro_rb.infer.topk_elbo import RaoBlackwellTopK_ELBO

__all__ = [
    "DReG_ELBO",
    "R2G2_ELBO",
    "RaoBlackwell_ELBO",
    "RaoBlackwellTopK_ELBO",
    "RejectionSamplingError",
    "RVRSGuide",
    "STLTrace_ELBO",
]
