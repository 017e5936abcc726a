# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Runs the comparison of ``docs/source/howto/compare.rst``: a regression on a discrete dose, which
is measured with an error. Takes about two minutes.

``result.json``::

    python docs/figures/compare_example.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Tuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_rb import compare

OUT = Path(__file__).resolve().parents[1] / "source" / "_static" / "compare"
NUM_VALUES = 12  # levels of the latent dose


def make_data() -> Tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dose = torch.randint(NUM_VALUES, (30,), generator=generator)
    noise = torch.randn(2, 30, generator=generator)
    return dose + 0.7 * noise[0], 0.8 * dose + 1.0 + noise[1]


def model(measured: Tensor, response: Tensor) -> None:
    """The dose is known only with an error; the response depends on it linearly."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    with pyro.plate("patients", len(measured)):
        dose = pyro.sample("dose", dist.Categorical(torch.ones(NUM_VALUES) / NUM_VALUES))
        pyro.sample("measured", dist.Normal(dose.float(), 0.7), obs=measured)
        pyro.sample("response", dist.Normal(base + slope * dose, 1.0), obs=response)


def guide(measured: Tensor, response: Tensor) -> None:
    for name in ("slope", "base"):
        loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
        scale = pyro.param(f"{name}_scale", torch.tensor(0.2), constraint=constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale))
    with pyro.plate("patients", len(measured)):
        logits = pyro.param("logits", torch.zeros(len(measured), NUM_VALUES))
        pyro.sample("dose", dist.Categorical(logits=logits))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sizes: Any = dict(num_samples=150, num_burn_in=60, train_steps=[0, 300, 1000])
    if args.smoke_test:
        sizes = dict(num_samples=5, num_burn_in=2, train_steps=[0, 2], steps=0)
    result = compare(
        model,
        guide,
        args=make_data(),
        optim=pyro.optim.Adam({"lr": 0.02}),
        title="Regression on a discrete dose that is measured with an error",
        **sizes,
    )
    for kind in ("efficiency", "training"):
        result.plot(str(args.out / f"{kind}.png"), kind)
    (args.out / "result.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    parser.add_argument("--smoke-test", action="store_true", help="a few draws, to a temporary place")
    parsed = parser.parse_args()
    if parsed.smoke_test:
        with tempfile.TemporaryDirectory() as folder:
            parsed.out = Path(folder)
            main(parsed)
    else:
        parsed.out.mkdir(parents=True, exist_ok=True)
        main(parsed)
