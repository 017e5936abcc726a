# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
A semi-supervised variational autoencoder: a discrete label and a continuous style make an
image, the label is known for some images, and the style depends on the label in the guide.
"""

from typing import Any, Dict, Optional, Tuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.infer.topk.models import gradient
from tests.support.cases import Case
from tests.support.common import assert_unbiased, assert_variance_ratio

pytestmark = pytest.mark.slow

NUM_LABELS, STYLE_SIZE, NUM_PIXELS, HIDDEN = 5, 2, 6, 4
PARTICLES = {"num_particles": 50, "vectorize_particles": True, "max_plate_nesting": 1}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(NUM_PIXELS, NUM_LABELS)
        self.encoder = self.network(NUM_PIXELS, 2 * STYLE_SIZE)
        self.decoder = self.network(STYLE_SIZE, NUM_PIXELS)
        for p in self.parameters():  # so that labels differ in probability
            nn.init.normal_(p, std=0.8)

    @staticmethod
    def network(size_in: int, size_out: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "label": nn.Embedding(NUM_LABELS, HIDDEN),
                "other": nn.Linear(size_in, HIDDEN),
                "out": nn.Linear(HIDDEN, size_out),
            }
        )

    @staticmethod
    def run(network: Any, label: Tensor, other: Tensor) -> Tensor:
        return network["out"](torch.tanh(network["label"](label) + network["other"](other)))

    def model(self, images: Tensor, labels: Optional[Tensor] = None) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            prior = dist.Categorical(torch.ones(NUM_LABELS))
            label = pyro.sample("label", prior, obs=labels)
            style = dist.Normal(torch.zeros(STYLE_SIZE), 1.0).to_event(1)
            style = pyro.sample("style", style)
            pixels = dist.Bernoulli(logits=self.run(self.decoder, label, style)).to_event(1)
            pyro.sample("pixels", pixels, obs=images)
            if labels is not None:
                seen = dist.Categorical(logits=self.classifier(images))
                pyro.sample("classified", seen, obs=labels)

    def guide(self, images: Tensor, labels: Optional[Tensor] = None) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            label = labels
            if label is None:
                label = pyro.sample("label", dist.Categorical(logits=self.classifier(images)))
            loc, log_scale = self.run(self.encoder, label, images).chunk(2, -1)
            pyro.sample("style", dist.Normal(loc, log_scale.exp()).to_event(1))


def make_images(num: int) -> Tuple[Tensor, Tensor]:
    """Noisy copies of a pattern for each label."""
    patterns = (torch.arange(NUM_PIXELS) - torch.arange(NUM_LABELS)[:, None]).abs() <= 1
    labels = torch.arange(num) % NUM_LABELS
    flips = torch.rand(num, NUM_PIXELS) < 0.05
    return (patterns[labels] ^ flips).to(torch.get_default_dtype()), labels


def make_case(with_labels: bool, exact: bool = False) -> Case:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = Vae()
    images, labels = make_images(4)
    guide = config_enumerate(vae.guide) if exact else vae.guide
    return Case(vae.model, guide, (images, labels) if with_labels else (images,))


def enumeration(**kwargs: Any) -> TraceEnum_ELBO:
    return TraceEnum_ELBO(strict_enumeration_warning=False, **kwargs)


def draw(elbo: Any, case: Case, num_samples: int, seed: int) -> Dict[str, Tensor]:
    pyro.set_rng_seed(seed)
    with pyro.validation_enabled(False):
        rows = [gradient(elbo, case) for _ in range(num_samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    "options",
    [{"k": 5}, {"k": 4}, {"k": 2, "num_samples": 3}, {"budget": 5}, {"k": 7, "baseline": "reinforce+"}],
    ids=str,
)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("particles", [{"max_plate_nesting": 1}, PARTICLES], ids=["one", "many"])
def test_all_values_are_enumeration(options, with_labels, particles):
    case = make_case(with_labels)
    samples = draw(RaoBlackwellTopK_ELBO(**options, **particles), case, 2, seed=3)
    case = make_case(with_labels, exact=True)
    expected = draw(enumeration(**particles), case, 2, seed=3)
    assert samples.keys() == expected.keys() and len(samples) == 12
    for name, value in expected.items():
        torch.testing.assert_close(samples[name], value, rtol=0, atol=1e-12)
    assert samples["vae$$$classifier.weight"].any()


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": None},
        {"baseline": "loo"},
        {"baseline": "reinforce+"},
        {"budget": 3},
        {"k": 0, "num_samples": 2},
    ],
    ids=str,
)
def test_unbiased(options):
    samples = draw(RaoBlackwellTopK_ELBO(**options, **PARTICLES), make_case(False), 40, seed=0)
    expected = draw(enumeration(**PARTICLES), make_case(False, exact=True), 40, seed=1)
    assert_unbiased(samples, independent=expected, projections=10, detect=1.0)


def test_less_variance_than_draws():
    """At two evaluations each; what is left comes mostly from the style."""
    losses = {
        "draws": Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        "topk": RaoBlackwellTopK_ELBO(max_plate_nesting=1),
    }
    names = ("vae$$$classifier.weight", "vae$$$classifier.bias")
    samples = {}
    for key, elbo in losses.items():
        drawn = draw(elbo, make_case(False), 300, seed=0)
        samples[key] = {name: drawn[name] for name in names}
    assert_variance_ratio(samples["topk"], samples["draws"], below=0.5)


def test_training_with_and_without_labels():
    """Ends where training with exact sums ends."""
    images, labels = make_images(100)
    ends = []
    for elbo in (enumeration(max_plate_nesting=1), RaoBlackwellTopK_ELBO(max_plate_nesting=1)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Vae()
        is_exact = type(elbo) is TraceEnum_ELBO
        guide = config_enumerate(vae.guide) if is_exact else vae.guide
        svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
        exact = enumeration(num_particles=20, vectorize_particles=True, max_plate_nesting=1)

        def loss() -> float:
            return exact.loss(vae.model, config_enumerate(vae.guide), images) / len(images)

        start = loss()
        for step in range(150):
            svi.step(images[:20], labels[:20])
            svi.step(images[20:])
        found = vae.classifier(images).argmax(-1)
        assert loss() < start - 1.0
        assert (found == labels)[20:].double().mean() > 0.8
        ends.append(loss())
    assert ends[1] == pytest.approx(ends[0], abs=0.15)
