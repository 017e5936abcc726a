# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_rb.poutine import FramesMessenger, ProposalMessenger, TapMessenger


def model(subsample_size=None):
    loc = pyro.param("loc", torch.tensor(0.3))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    with pyro.plate("items", 6, subsample_size=subsample_size):
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=torch.tensor(0.5))
    pyro.deterministic("d", z)
    return z, w


def test_shapes_and_sums():
    with ProposalMessenger(dim=-2, size=5) as run:
        z, w = model()
    assert z.shape == (5, 1) and w.shape == (5, 6)
    expected = dist.Normal(0.3, 1.0).log_prob(z).squeeze(-1)
    expected = expected + (dist.Normal(z, 1.0).log_prob(w) + dist.Normal(w, 1.0).log_prob(torch.tensor(0.5))).sum(-1)
    torch.testing.assert_close(run.log_prob_sum(), expected)
    assert set(run.latents) == {"z", "w"} and set(run.sites) == {"z", "w", "x"}
    assert [f.name for f in run.sites["w"].frames] == ["items"]


def test_values_are_used():
    values = {"z": torch.randn(3, 1), "w": torch.randn(3, 6)}
    with ProposalMessenger(-2, 3, values) as run:
        z, w = model()
    assert z is values["z"] and w is values["w"]
    for i in range(3):
        alone = {"z": values["z"][i, 0], "w": values["w"][i]}
        with ProposalMessenger(values=alone) as one:
            model()
        torch.testing.assert_close(one.log_prob_sum()[0], run.log_prob_sum()[i])


def test_only_params_pass():
    """Neither sites outwards, nor plates, masks and scales inwards."""
    with poutine.trace() as outer, poutine.scale(scale=3.0), poutine.mask(mask=False):
        with pyro.plate("particles", 7, dim=-2), ProposalMessenger(-2, 5) as run:
            z, _ = model()
            assert poutine.get_mask() is None
    assert z.shape == (5, 1) and run.log_prob_sum().abs().min() > 0
    assert run.sites["z"].scale == 1.0
    assert set(outer.trace.nodes) == {"particles", "loc"}


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_local_plate(subsample_size):
    """By item, without the scale of the subsample; one subsample for all runs."""
    subsamples = {}
    with ProposalMessenger(-2, 4, subsamples=subsamples, plate="items") as run:
        z, w = model(subsample_size)
    expected = dist.Normal(z, 1.0).log_prob(w) + dist.Normal(w, 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(run.log_prob_sum(keep_dim=-1), expected)
    assert run.sites["z"].log_prob is None
    with ProposalMessenger(-2, 4, subsamples=subsamples):
        with poutine.trace() as trace:
            model(subsample_size)
    assert torch.equal(trace.trace.nodes["items"]["value"], subsamples["items"])


def test_exposes_what_is_outside_of_the_plate():
    with poutine.trace() as outer:
        with ProposalMessenger(plate="items", expose=True):
            model(2)
    assert set(outer.trace.nodes) == {"loc", "z", "d"}


def test_tap():
    tap = TapMessenger()
    pyro.param("loc", torch.tensor(0.3))
    with ProposalMessenger(-2, 5, tap=tap) as run:
        z, _ = model()
    assert set(tap.path.values) == {"z", "w"} and run.sites["z"].value is z is tap.path.values["z"]


def test_plate_too_far_left():
    with pytest.raises(ValueError, match="Found plate 'items' at dim -1 around site 'w'"):
        with ProposalMessenger(-1, 6):
            model()


def test_batch_without_plate():
    with pytest.raises(ValueError, match=r"log_prob of shape \(5, 3, 4\) at site 'u'"):
        with ProposalMessenger(-2, 3):
            pyro.sample("u", dist.Normal(torch.zeros(5, 1, 4), 1.0))


def test_names_the_site_of_an_error():
    with pytest.raises(ValueError, match="Error at site 'b'"):
        with ProposalMessenger(-1, 2):
            pyro.sample("b", dist.Beta(1.0, 1.0), obs=torch.tensor(2.0))


def test_frames():
    with ProposalMessenger(-2, 2) as run:
        model()
    frames = {name: site.frames for name, site in run.sites.items()}
    with poutine.trace() as trace, FramesMessenger(frames):
        pyro.sample("z", dist.Delta(torch.tensor(0.0)))
        pyro.sample("w", dist.Delta(torch.zeros(6)))
    stacks = [trace.trace.nodes[n]["cond_indep_stack"] for n in "zw"]
    assert stacks[0] == () and [f.name for f in stacks[1]] == ["items"]
    assert set(trace.trace.nodes) == {"z", "w"}
