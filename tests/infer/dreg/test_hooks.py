# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What a user sees of the backward pass."""

from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_rb.infer import DReG_ELBO
from tests.support.elbo_contract import ENTRANCES


class Counted(torch.autograd.Function):
    """The identity. Counts its backward passes by name."""

    calls: Counter = Counter()

    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.calls[ctx.name] += 1
        return grad, None


class Net(torch.nn.Module):
    def __init__(self, num_inputs, num_outputs, name):
        super().__init__()
        self.linear, self.name = torch.nn.Linear(num_inputs, num_outputs), name

    def forward(self, x):
        return Counted.apply(self.linear(x), self.name)


class Vae:
    """Optionally with two levels, or with features that model and guide share."""

    def __init__(self, levels=1, shared=False):
        Counted.calls.clear()
        self.levels, self.shared, self.data = levels, shared, torch.randn(5, 2)
        # Hooks of modules warn where no input has a gradient.
        self.inputs = self.data.clone().requires_grad_()
        sizes = {"encoder": (2, 2), "decoder": (1, 2), "bridge": (1, 1), "features": (2, 2)}
        self.nets = {name: Net(*size, name) for name, size in sizes.items()}
        self.on_leaf, self.on_module, self.after = {}, {}, Counter()
        for name, net in self.nets.items():
            grads = self.on_module.setdefault(name, [])
            net.register_full_backward_hook(lambda _, __, out, grads=grads: grads.append(out[0]))
            for key, p in net.named_parameters():
                grads = self.on_leaf.setdefault(f"{name}.{key}", [])
                p.register_hook(grads.append)
                if hasattr(p, "register_post_accumulate_grad_hook"):  # not before PyTorch 2.1
                    p.register_post_accumulate_grad_hook(
                        lambda p, key=f"{name}.{key}": self.after.update([key])
                    )

    def model(self):
        pyro.module("decoder", self.nets["decoder"])
        shift = self.nets["features"](self.inputs) if self.shared else 0.0
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            if self.levels == 2:
                z = z + pyro.sample("y", dist.Normal(z, 0.5).to_event(1))
            loc = self.nets["decoder"](z) + shift
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=self.data)

    def guide(self):
        pyro.module("encoder", self.nets["encoder"])
        with pyro.plate("data", 5):
            x = self.nets["features"](self.inputs) if self.shared else self.inputs
            loc, log_scale = self.nets["encoder"](x).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            if self.levels == 2:
                pyro.sample("y", dist.Normal(self.nets["bridge"](z), 1.0).to_event(1))

    def differentiate(self, elbo, entrance="loss_and_grads"):
        pyro.set_rng_seed(0)
        loss = getattr(elbo, entrance)(self.model, self.guide)
        if entrance == "differentiable_loss":
            loss.backward()


@pytest.mark.parametrize("retain_graph", [None, True])
@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("options", [{}, {"levels": 2}, {"shared": True}], ids=str)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_hooks_of_parameters_see_the_gradient_once(entrance, options, vectorize, c, retain_graph):
    particles = {"num_particles": 3, "max_plate_nesting": 1, "vectorize_particles": vectorize}
    vae, renyi = Vae(**options), Vae(**options)
    vae.differentiate(
        DReG_ELBO(**particles, control_variate_scale=c, retain_graph=retain_graph), entrance
    )
    renyi.differentiate(RenyiELBO(**particles))
    assert vae.after == renyi.after
    for name, grads in vae.on_leaf.items():
        assert len(grads) == len(renyi.on_leaf[name]) <= 1
        net, key = name.split(".", 1)
        for grad in grads:
            torch.testing.assert_close(grad, vae.nets[net].get_parameter(key).grad)
            assert grad.abs().sum() > 0


@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("options", [{}, {"shared": True}], ids=str)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_guide_is_passed_once(entrance, options, vectorize, c):
    """Backward of custom functions, and hooks of modules, which get no None."""
    particles = {"num_particles": 3, "max_plate_nesting": 1, "vectorize_particles": vectorize}
    vae = Vae(**options)
    vae.differentiate(DReG_ELBO(**particles, control_variate_scale=c), entrance)
    runs = 1 if vectorize else 3
    assert Counted.calls["encoder"] == len(vae.on_module["encoder"]) == runs
    if options:  # by model and guide
        assert Counted.calls["features"] == len(vae.on_module["features"]) == 2 * runs
    for grads in vae.on_module.values():
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("levels", [1, 2])
def test_loss_and_grads_passes_the_model_once(levels):
    vae = Vae(levels)
    vae.differentiate(DReG_ELBO(3, 1, vectorize_particles=True))
    assert Counted.calls["decoder"] == len(vae.on_module["decoder"]) == 1
    # The bridge is between two draws: once for the draw that it is made of, once for itself.
    assert Counted.calls["bridge"] == 2 * (levels - 1)


@pytest.mark.parametrize("vectorize", [False, True])
def test_retained_graph(vectorize):
    """Of a tensor that was computed before the step, in the guide and in the model."""
    for in_guide in (False, True):
        raw = torch.tensor(0.4, requires_grad=True)
        outside = 2.0 * raw.exp()

        def model():
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            scale = 1.0 if in_guide else outside
            pyro.sample("x", dist.Normal(z, scale), obs=torch.tensor(1.3))

        def guide():
            loc = outside if in_guide else 0.0
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + loc, 1.0))

        for entrance in ENTRANCES:
            elbo = DReG_ELBO(3, 0, vectorize_particles=vectorize, retain_graph=True)
            for _ in range(2):
                loss = getattr(elbo, entrance)(model, guide)
                if entrance == "differentiable_loss":
                    loss.backward(retain_graph=True)
        assert raw.grad != 0


def test_draws_are_left_as_they_were():
    """A draw has no ``.grad`` afterwards, and hooks of its user get gradients."""
    draws, grads = [], []

    def guide():
        draws.append(pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0)))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        z.register_hook(grads.append)
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.3))
        draws.append(z)

    DReG_ELBO(2).loss_and_grads(model, guide)
    assert grads and all(grad is not None for grad in grads)
    assert all(z.grad is None for z in draws if z.retains_grad)
