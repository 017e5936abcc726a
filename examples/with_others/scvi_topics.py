# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
scvi-tools: topics of genes by amortized latent Dirichlet allocation.

scvi-tools trains its Pyro models with Lightning, and takes a loss in ``plan_kwargs``: only that changes. The counts
of the cells are simulated::

    python examples/with_others/scvi_topics.py --loss TraceMeanField_ELBO STLTrace_ELBO RaoBlackwell_ELBO
"""

import logging
import warnings

import anndata
import numpy as np
import scvi
import torch
from common import run

from pyro_rb.diagnostics.run.losses import make_loss


def simulate(num_cells=300, num_genes=80, num_topics=5):
    rng = np.random.default_rng(0)
    topics = rng.dirichlet(np.full(num_genes, 0.1), num_topics)
    shares = rng.dirichlet(np.full(num_topics, 0.3), num_cells)
    return anndata.AnnData(rng.poisson(500.0 * shares @ topics).astype(np.float32))


def make_topics():
    cells = simulate()
    scvi.model.AmortizedLDA.setup_anndata(cells)
    return scvi.model.AmortizedLDA(cells, n_topics=5, n_hidden=32)


def make():
    """Model, guide, and the arguments of both: all cells at once."""
    module = make_topics().module
    counts = torch.tensor(simulate().X)
    return module.model, module.guide, (counts, counts.sum(1, keepdim=True), len(counts))


def train(name, args):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = args.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: on workers, logs and precision
        lda = make_topics()
        lda.train(
            max_steps=args.num_steps,
            batch_size=100,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            plan_kwargs={"loss_fn": make_loss(name), "optim_kwargs": {"lr": args.lr}},
        )
        return -lda.get_elbo()


if __name__ == "__main__":
    run(__doc__, train, num_steps=600, lr=0.01, losses=("TraceMeanField_ELBO", "STLTrace_ELBO"))
