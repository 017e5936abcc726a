# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Arguments, report, local mode, and models unlike those of the other tests."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormal
from pyro.nn import PyroModule, PyroSample

from pyro_rb.infer import R2G2_ELBO
from tests.infer.r2g2.models import (
    fixed,
    net,
    reasons,
    regression,
    spent,
    treatments,
    weights,
)
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import assert_same, draw_gradients, evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pre_activations": "row"}, r"Invalid pre_activations: 'row'. Expected one of 'shared', 'local', 'auto'"),
        ({"pre_activations": None}, "Invalid pre_activations: None"),
        ({"solver": "lu"}, "Invalid solver: 'lu'. Expected one of 'auto', 'cholesky', 'cg', 'qr'"),
        ({"num_steps": 0}, "Invalid num_steps: 0. Expected None, or an integer that is at least 1"),
        ({"num_steps": True}, "Invalid num_steps: True"),
        ({"num_steps": 2.0}, "Invalid num_steps: 2.0"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        R2G2_ELBO(**arguments)


def test_positional_arguments_are_those_of_pyro():
    elbo = R2G2_ELBO(8, 2, None, True, False)
    for name, value in vars(Trace_ELBO(8, 2, None, True, False)).items():
        assert getattr(elbo, name) == value
    with pytest.raises(ValueError, match=r"num_particles: 'local'.*R2G2_ELBO\(pre_activations='local'\)"):
        R2G2_ELBO("local")


def test_report():
    elbo = R2G2_ELBO()
    with pytest.raises(RuntimeError, match="there was none"):
        elbo.report()
    case = net()
    elbo.loss(*((case.model, case.guide) + case.args))
    with pytest.raises(RuntimeError, match="there was none"):
        elbo.report()
    evaluate(elbo, case)
    assert treatments(elbo)["l0.weight_unconstrained"] == "projected"
    assert reasons(elbo)["l0.weight_unconstrained"] == "linear: 3 rows, fan-in 9, cholesky"
    assert treatments(elbo)["l0.weight"] == "as l0.weight_unconstrained"
    before = elbo.report()
    elbo.loss(*((case.model, case.guide) + case.args))
    assert elbo.report() == before


def test_report_of_parts():
    elbo = R2G2_ELBO()
    evaluate(elbo, weights(lambda x, w: F.linear(x, w[1:]).tanh() + w[0].exp().sum()))
    assert treatments(elbo) == {"w": "projected (75 %)"}
    assert reasons(elbo)["w"] == "linear: 3 rows, fan-in 6, cholesky; non-linear use (exp)"
    evaluate(elbo, weights(lambda x, w: F.linear(x, w), prior=lambda s: dist.Laplace(torch.zeros(s), 1.0)))
    assert reasons(elbo)["w"].endswith("log prior not analytic") is False
    evaluate(elbo, weights(lambda x, w: F.linear(x, w), prior=lambda s: dist.StudentT(torch.tensor(3.0)).expand(s)))
    assert reasons(elbo)["w"].endswith("log prior not analytic")
    evaluate(elbo, weights(lambda x, w: x.sum(-1)))
    assert (treatments(elbo), reasons(elbo)) == ({"w": "plain"}, {"w": "not used"})


def test_auto_leaves_what_does_not_pay():
    case = weights(lambda x, w: F.linear(x, w).tanh(), rows=4)
    elbo = R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(spent(case), case, seed=0))
    assert reasons(elbo)["w"] == "linear: 4 rows, fan-in 6: would not pay (solver='auto')"
    evaluate(R2G2_ELBO(solver="cg"), case)
    always = R2G2_ELBO(solver="cg")
    evaluate(always, case)
    assert treatments(always) == {"w": "projected"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_know_what_is_plain(clone):
    case = weights(lambda x, w: F.linear(x, w) + w[:2].exp().sum())
    elbo = R2G2_ELBO(num_steps=3)
    for _ in range(2):
        evaluate(elbo, case)
    copied = clone(elbo)
    assert copied._plain.keys() == elbo._plain.keys() and len(copied._plain) == 1
    evaluate(copied, case)
    assert treatments(copied)["w"].startswith("projected")
    evaluate(copied, case)
    assert treatments(copied)["w"] == "plain"


def test_number_of_runs():
    """Two in the first step, where a second use is found, one in the others."""
    runs = []

    def use(x, w):
        runs.append(1)
        return F.linear(x, w) + F.linear(x.tanh(), w)

    case, elbo = weights(use), R2G2_ELBO()
    runs.clear()
    evaluate(elbo, case)
    assert len(runs) == 2
    evaluate(elbo, case)
    assert len(runs) == 3


def test_error_of_the_model_is_raised():
    def use(x, w):
        f = F.linear(x, w) + F.linear(x, w)
        if w.requires_grad:
            raise KeyError("of the model")
        return f

    case = weights(use)
    with pytest.raises(KeyError, match="of the model"):
        R2G2_ELBO().loss_and_grads(case.model, case.guide)


def test_jit_trace_is_an_error():
    case = regression()
    loss = R2G2_ELBO()

    def traced(x):
        return loss.differentiable_loss(case.model, case.guide) + x

    with pytest.warns(), pytest.raises(NotImplementedError, match="torch.jit.trace.*JitTrace_ELBO"):
        torch.jit.trace(traced, (torch.zeros(()),))


def test_guide_messenger_is_plain():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(fixed(2, 6) @ z, 1.0).to_event(1), obs=torch.zeros(2))

    case, elbo = Case(model, AutoHierarchicalNormalMessenger(model)), R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(Trace_ELBO(), case, seed=0))
    assert reasons(elbo) == {"z": "its guide runs the model inside of itself"}


def test_score_function_is_as_asked_for():
    case = regression()
    inner = case.guide

    def guide():
        with poutine.reparam(config=lambda site: None):
            loc, scale = pyro.param("w.loc"), pyro.param("w.scale")
            pyro.sample("w", dist.Normal(loc, scale).has_rsample_(False).to_event(1))

    inner()
    case.guide, elbo = guide, R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(Trace_ELBO(), case, seed=0))
    assert reasons(elbo) == {"w": "not Gaussian"}


def test_a_masked_distribution():
    case, elbo = regression(), R2G2_ELBO()
    inner = case.guide

    def guide():
        loc, scale = pyro.param("w.loc"), pyro.param("w.scale")
        pyro.sample("w", dist.Normal(loc, scale).mask(False).to_event(1))

    inner()
    evaluate(elbo, Case(case.model, guide))
    assert reasons(elbo) == {"w": "a masked distribution; use poutine.mask in its place"}


@pytest.mark.parametrize("guide", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_correlated_guide_over_layers_is_plain(guide):
    case, elbo = net(guide), R2G2_ELBO()
    assert_same(evaluate(elbo, case, seed=0), evaluate(spent(case), case, seed=0))
    assert treatments(elbo)[f"_{guide}_latent"] == "plain"
    assert "used twice" in reasons(elbo)[f"_{guide}_latent"]


# -- Local mode -----------------------------------------------------------------


def test_local_is_finite_at_dead_units():
    """No input, no bias: no variance, and its root has an infinite slope."""
    case = weights(lambda x, w: F.linear(torch.zeros_like(x), w).tanh() + F.linear(x, w[:0]).sum())
    elbo = R2G2_ELBO(pre_activations="local")
    for p in evaluate(elbo, case)[1].values():
        assert p.isfinite().all()
    case = weights(lambda x, w: F.linear(F.linear(x, w[:2]).relu() * 0.0, w[2:, :2]))
    for p in evaluate(elbo, case)[1].values():
        assert p.isfinite().all()


def test_local_is_for_matrices_of_inputs_only():
    """The positions of one example share their weights."""
    case, elbo = weights(lambda x, w: F.linear(x[:, None], w).tanh()), R2G2_ELBO(pre_activations="local")
    assert_same(evaluate(elbo, case, seed=0), evaluate(R2G2_ELBO(), case, seed=0))
    assert treatments(elbo) == {"w": "projected"}


def test_local_leaves_correlated_sites_and_other_functions():
    for make in (lambda: regression("scale_tril"), lambda: weights(lambda x, w: (x @ w.mT).tanh())):
        pyro.clear_param_store()
        case = make()
        elbo = R2G2_ELBO(pre_activations="local")
        assert_same(evaluate(elbo, case, seed=0), evaluate(R2G2_ELBO(), case, seed=0))
        assert treatments(elbo) == {"w": "projected"}


# -- Other models ------------------------------------------------------------------


def check(model, num_samples=120, detect=0.4, guide=AutoNormal, expected=None, args=(), **options):
    case = Case(model, guide(model, init_scale=0.3), args)
    elbo = R2G2_ELBO(solver="cg", **options)
    ours = draw_gradients(elbo, case, num_samples, seed=0)
    plain = draw_gradients(spent(case, **options), case, num_samples, seed=0)
    assert_unbiased(ours, paired=plain, detect=detect)
    for site, treatment in (expected or {}).items():
        assert treatments(elbo)[site].startswith(treatment), elbo.report()


def observe(f, name="y"):
    pyro.sample(name, dist.Normal(f, 0.5).to_event(f.dim()), obs=0.5 * fixed(*f.shape, seed=3))


def module_with_random_weights(module):
    for name, p in list(module.named_parameters()):
        prior = dist.Normal(torch.zeros(p.shape), 1.0).to_event(p.dim())
        setattr(module, name, PyroSample(prior))
    return module


class Recurrent(PyroModule):
    def __init__(self):
        super().__init__()
        self.cell = module_with_random_weights(PyroModule[torch.nn.RNNCell](4, 3))

    def forward(self):
        h = torch.zeros(2, 3)
        for t in range(3):
            h = self.cell(fixed(3, 2, 4)[t], h)
        observe(h)


def test_recurrent_network():
    check(Recurrent(), 30, detect=None, expected={"cell.weight_ih_unconstrained": "plain"})


def test_attention_module():
    attention = PyroModule[torch.nn.MultiheadAttention](4, 2, bias=False, batch_first=True)
    attention.in_proj_weight = PyroSample(dist.Normal(torch.zeros(12, 4), 1.0).to_event(2))
    x = fixed(2, 3, 4)

    def model():
        observe(attention(x, x, x, need_weights=False)[0])

    check(model, 30, detect=None, expected={"in_proj_weight_unconstrained": "plain"})


def test_tied_weights_of_an_autoencoder():
    x = fixed(2, 6)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 6), 1.0).to_event(2))
        observe(torch.tanh(x @ w.mT) @ w)

    check(model, 10, detect=None, expected={"w_unconstrained": "plain"})


def test_closures_and_copies():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2))
        layer = lambda x: F.linear(x, w)  # noqa: E731
        observe(sum(map(layer, [fixed(2, 8)])).tanh())

    check(model, expected={"w_unconstrained": "projected"})


def test_hierarchy_of_scales():
    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("columns", 8):
            w = pyro.sample("w", dist.Normal(torch.zeros(()), tau))
        observe((fixed(2, 8) @ w).tanh())

    check(model, 60, detect=0.6, expected={"w_unconstrained": "projected", "tau_unconstrained": "plain"})


def test_nested_plates_with_subsampling():
    x = fixed(6, 8)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2))
        with poutine.scale(scale=0.5), pyro.plate("items", 6, subsample_size=3, dim=-1) as i:
            with poutine.mask(mask=torch.tensor([True, False, True])):
                f = F.linear(x[i], w).mT
                with pyro.plate("outputs", 3, dim=-2):
                    pyro.sample("y", dist.Normal(f.tanh(), 0.5), obs=0.5 * fixed(3, 6)[:, i])

    check(model, 60, detect=0.5, expected={"w_unconstrained": "projected"})


def test_latents_of_items():
    """Codes of a plate through a learned decoder that is wider than it is high."""
    decoder = (0.5 * fixed(3, 8)).requires_grad_()

    def model():
        pyro.param("decoder", decoder)
        with pyro.plate("items", 5, subsample_size=2):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            f = F.linear(z, pyro.param("decoder"))
            pyro.sample("y", dist.Normal(f.tanh(), 0.5).to_event(1), obs=torch.ones(2, 3))

    check(model, 60, detect=0.5, expected={"z_unconstrained": "projected"})


def test_convolutional_network():
    x = fixed(1, 2, 6, 6)

    def model():
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(3, 2, 4, 4), 0.5).to_event(4))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(3), 0.5).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(2, 3), 0.5).to_event(2))
        h = F.max_pool2d(F.conv2d(x, w1, b1, padding=1, stride=2).tanh(), 2)
        observe(F.linear(h.flatten(1), w2))

    check(model, 50, detect=0.5, expected={"w1_unconstrained": "projected", "w2_unconstrained": "projected"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svi_trains(dtype):
    torch.set_default_dtype(dtype)
    x, w = fixed(12, 5).to(dtype), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5])

    def model(rows):
        v = pyro.sample("v", dist.Normal(torch.zeros(5), 3.0).to_event(1))
        with pyro.plate("data", 12, subsample=rows):
            pyro.sample("y", dist.Normal(x[rows] @ v, 0.1), obs=(x @ w)[rows])

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}), R2G2_ELBO())
    for step in range(400):
        svi.step(torch.arange(12)[step % 6 :: 6])
    torch.testing.assert_close(guide.locs.v.detach(), w, atol=0.1, rtol=0)


def test_gradient_to_parameters_of_distributions_that_share_storage():
    """A scale that is one number for all weights."""

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2))
        observe(F.linear(fixed(2, 8), w).tanh())

    def guide():
        loc = pyro.param("loc", lambda: 0.3 * fixed(3, 8))
        scale = pyro.param("scale", torch.tensor(0.4), constraint=constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(2))

    case = Case(model, guide)
    ours = draw_gradients(R2G2_ELBO(), case, 40, seed=0)
    assert_unbiased(ours, paired=draw_gradients(spent(case), case, 40, seed=0), detect=0.4)
