# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_rb.diagnostics import sample_gradients
from pyro_rb.diagnostics.run.losses import (
    ENUMERATED,
    REFERENCE,
    available_losses,
    loss_name,
    make_loss,
    make_losses,
    usage,
)
from pyro_rb.infer import R2G2_ELBO, DReG_ELBO, RaoBlackwellTopK_ELBO, STLTrace_ELBO


def test_available_losses_are_those_of_both_packages():
    found = available_losses()
    assert found["Trace_ELBO"] is Trace_ELBO
    assert found["STLTrace_ELBO"] is STLTrace_ELBO
    assert "ELBO" not in found and "SVI" not in found


def test_arguments_by_name_and_position():
    assert make_loss("STLTrace_ELBO").control_variate_scale == "adaptive"
    assert make_loss("STLTrace_ELBO:adaptive").control_variate_scale == "adaptive"
    assert make_loss("STLTrace_ELBO:1.0").control_variate_scale == 1.0
    assert make_loss("STLTrace_ELBO:0.5,num_particles=3").control_variate_scale == 0.5
    assert make_loss("STLTrace_ELBO:0.5,num_particles=3").num_particles == 3
    assert make_loss("Trace_ELBO:5").num_particles == 5
    # Options of our own are keywords; by name, the first of them needs none.
    local = make_loss("R2G2_ELBO:local,num_particles=3")
    assert (local.pre_activations, local.num_particles) == ("local", 3)
    # An integer is the number of particles, as in Pyro.
    assert make_loss("Trace_ELBO:8").num_particles == 8
    loss = make_loss("STLTrace_ELBO:8")
    assert (loss.num_particles, loss.control_variate_scale) == (8, "adaptive")
    loss = make_loss("RenyiELBO:alpha=0, num_particles=4, vectorize_particles=True")
    assert isinstance(loss, RenyiELBO)
    assert (loss.alpha, loss.num_particles, loss.vectorize_particles) == (0, 4, True)


def test_unknown_loss():
    with pytest.raises(ValueError, match="no loss 'STL_ELBO': did you mean STLTrace_ELBO.*There are"):
        make_loss("STL_ELBO")
    with pytest.raises(ValueError, match="no loss 'SVI': There are .*JitTraceEnum_ELBO, "):
        make_loss("SVI")


@pytest.mark.parametrize("name", ["Trace_ELBO:nonsense=1", "STLTrace_ELBO:eager"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"cannot make the loss '{name}': "):
        make_loss(name)


def test_names_of_instances():
    losses = make_losses(
        [
            Trace_ELBO(),
            Trace_ELBO(num_particles=5),
            STLTrace_ELBO(num_particles=2),
            STLTrace_ELBO(control_variate_scale=1.0),
        ]
    )
    assert list(losses) == [
        "Trace_ELBO",
        "Trace_ELBO:num_particles=5",
        "STLTrace_ELBO:num_particles=2",
        "STLTrace_ELBO:1.0",
    ]
    assert list(make_losses([DReG_ELBO(8, control_variate_scale=0.5)])) == [
        "DReG_ELBO:num_particles=8,control_variate_scale=0.5"
    ]


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2, retain_graph=True),
        STLTrace_ELBO(control_variate_scale="adaptive"),
        R2G2_ELBO(pre_activations="local"),
        R2G2_ELBO(num_steps=3),
        RaoBlackwellTopK_ELBO(budget=4),
        RaoBlackwellTopK_ELBO(k=2, baseline=None),
        DReG_ELBO(8, control_variate_scale="adaptive"),
        RenyiELBO(alpha=0.5, num_particles=3),
        make_loss("TraceEnum_ELBO+config_enumerate"),
    ],
    ids=loss_name,
)
def test_names_can_be_written(loss):
    again = make_loss(loss_name(loss))
    assert type(again) is type(loss) and loss_name(again) == loss_name(loss)
    hidden = ("_", "strict")
    assert {k: v for k, v in vars(again).items() if not k.startswith(hidden) and isinstance(v, (str, int, float))} == {
        k: v for k, v in vars(loss).items() if not k.startswith(hidden) and isinstance(v, (str, int, float))
    }


def test_one_loss_needs_no_list():
    assert list(make_losses("STLTrace_ELBO")) == ["STLTrace_ELBO"]
    assert list(make_losses(TraceMeanField_ELBO())) == ["TraceMeanField_ELBO"]


def test_dict_and_copies():
    mine = Trace_ELBO(num_particles=2)
    made = make_losses({"a": mine, "b": "STLTrace_ELBO:adaptive"})
    assert made["a"] is not mine and made["a"].num_particles == 2
    assert made["b"].control_variate_scale == "adaptive"


def test_same_name_twice():
    with pytest.raises(ValueError, match="two losses are called 'Trace_ELBO:num_particles=2'; give a dict"):
        make_losses([Trace_ELBO(num_particles=2), "Trace_ELBO:num_particles=2"])


def test_neither_name_nor_elbo():
    with pytest.raises(TypeError, match="expected the name of a loss or an instance.*got <class"):
        make_losses([Trace_ELBO])


def test_the_name_of_the_reference_is_taken():
    with pytest.raises(ValueError, match="the name 'Trace_ELBO' is kept for the reference"):
        make_losses({"Trace_ELBO": TraceMeanField_ELBO()})
    with pytest.raises(ValueError, match="the name 'Trace_ELBO' is kept for the reference"):
        make_losses({"Trace_ELBO": Trace_ELBO(num_particles=10)})


def test_enumeration_of_the_guide_by_name():
    loss = make_loss(f"{ENUMERATED}:max_plate_nesting=1")
    assert isinstance(loss, TraceEnum_ELBO) and loss.max_plate_nesting == 1

    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(k.float(), 1.0), obs=torch.tensor(0.4))

    def guide():
        pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.tensor([0.3, 0.0, 1.0]))))

    gradients = {
        name: sample_gradients(make_loss(name), model, guide, num_samples=4, seed=0)["logits"]
        for name in (ENUMERATED, REFERENCE)
    }
    logits = torch.tensor([0.3, 0.0, 1.0], requires_grad=True)
    q = logits.softmax(-1)
    log_p = torch.tensor([0.2, 0.5, 0.3]).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(0.4))
    (exact,) = torch.autograd.grad((q * (q.log() - log_p)).sum(), logits)
    torch.testing.assert_close(gradients[ENUMERATED], exact.expand(4, 3))
    assert gradients[REFERENCE].std(0).max() > 0.1


@pytest.mark.parametrize("name", ["STLTrace_ELBO:adaptive", "DReG_ELBO:num_particles=8,control_variate_scale=adaptive"])
def test_usage_makes_the_same_loss(name):
    imports, call = usage(name).split("; ")
    namespace = {"SVI": lambda model, guide, optim, loss: loss, "model": None, "guide": None, "optim": None}
    exec(imports, namespace)
    made = eval(call, namespace)
    assert type(made) is type(make_loss(name)) and vars(made).keys() == vars(make_loss(name)).keys()
    assert made.control_variate_scale == "adaptive" and made.num_particles == make_loss(name).num_particles


def test_usage_of_other_losses():
    assert "config_enumerate(guide), optim, loss=TraceEnum_ELBO())" in usage("TraceEnum_ELBO+config_enumerate")
    assert usage("R2G2_ELBO:local").endswith('loss=R2G2_ELBO(pre_activations="local"))')
    assert usage("MyOwn_ELBO") is None
