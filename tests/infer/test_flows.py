# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from pyro.nn import AutoRegressiveNN

from pyro_rb import DReG_ELBO, RaoBlackwell_ELBO, RVRSGuide, STLTrace_ELBO
from pyro_rb.poutine.path_flow import PathFlow
from tests.support.common import assert_unbiased
from tests.support.flows import FLOWS, exact_log_prob, exact_scores, modules_of, stir

pytestmark = pytest.mark.slow

DIM = 4
FIXED = partial(STLTrace_ELBO, control_variate_scale=1.0)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def log_joint(z):
    return -(z.square().sum(-1) + (z.prod(-1) - 1.0).square() + (z[..., 0] * z[..., 1:].sum(-1)).sin())


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


def make_flow(name, dim=DIM):
    flow = FLOWS[name](dim)
    return stir(flow if isinstance(flow, list) else [flow])


def make(flow, base=None):
    """A model, a guide of one flow, and its parameters."""
    modules = modules_of(flow)
    fn = dist.TransformedDistribution(normal(DIM) if base is None else base, flow)

    def model():
        pyro.factor("x", log_joint(pyro.sample("z", fn.mask(False))))

    def guide():
        pyro.module("flow", modules)
        pyro.sample("z", fn)

    return model, guide, list(modules.parameters())


class Between:
    """Flows between other sites, of which one conditions on the other, in plates, scaled and masked."""

    def __init__(self, make_layers=T.conditional_affine_autoregressive):
        kwargs = {"hidden_dims": [8]}
        self.layers = [make_layers(3, 2, **kwargs), T.permute(3), make_layers(3, 2, **kwargs)]
        self.last = [T.affine_autoregressive(2), T.planar(2)]
        self.modules = stir(modules_of([*self.layers, *self.last]))
        self.loc = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        self.shift = torch.nn.Parameter(torch.tensor(0.1))
        self.parameters = [self.loc, self.shift, *self.modules.parameters()]

    def guide(self):
        pyro.module("flows", self.modules)
        context = pyro.sample("context", dist.Normal(self.loc, 0.7).to_event(1))
        conditional = dist.ConditionalTransformedDistribution(normal(3), self.layers)
        with pyro.plate("data", 5, dim=-1), poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(5) < 4):
            fn = conditional.condition(context)
            z = pyro.sample("z", fn)
        y = pyro.sample("y", dist.TransformedDistribution(normal(2), self.last))
        mean = z.sum((-1, -2)) + y.sum(-1) + self.shift
        pyro.sample("w", dist.Normal(mean, self.shift.exp()))

    def model(self):
        context = pyro.sample("context", normal(2).to_event(1))
        with pyro.plate("data", 5, dim=-1), poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(5) < 4):
            z = pyro.sample("z", normal(3).to_event(1))
            pyro.factor("f", (z[..., 0] * z[..., 1]).sin() + z[..., 2] * context.sum(-1, keepdim=True))
        y = pyro.sample("y", normal(2).to_event(1))
        w = pyro.sample("w", normal())
        pyro.factor("x", (w * y.prod(-1)).cos())


def gradient(loss, model, guide, parameters, seed=1):
    pyro.set_rng_seed(seed)
    for p in parameters:
        p.grad = None
    value = loss.loss_and_grads(model, guide)
    return value, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def assert_close(actual, expected, tolerance=1e-10):
    scale = max(g.abs().max() for g in expected) + 1.0
    assert max((a - b).abs().max() for a, b in zip(actual, expected)) < tolerance * scale


def through_inverse(monkeypatch, is_so):
    """What was done before: log densities at given values."""
    monkeypatch.setattr(PathFlow, "find", staticmethod((lambda fn: None) if is_so else find))


find = PathFlow.find


# -- against exact scores --------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 0.4])
@pytest.mark.parametrize("name", FLOWS)
def test_exact(name, c):
    model, guide, parameters = make(make_flow(name))
    value, plain = gradient(Trace_ELBO(), model, guide, parameters)
    pyro.set_rng_seed(1)
    scores = exact_scores(guide, parameters)
    loss = STLTrace_ELBO(control_variate_scale=c)
    found, actual = gradient(loss, model, guide, parameters)
    (row,) = loss.report()
    assert row.treatment.startswith("path gradient") and "solved by" in row.reason
    assert found == pytest.approx(value, rel=1e-12)
    assert_close(actual, [g - c * s for g, s in zip(plain, scores["z"])])
    assert max(s.abs().max() for s in scores["z"]) > 0.1


@pytest.mark.parametrize("name", ["affine autoregressive", "planar", "block", "with coupling"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: fn.expand([3]),
        lambda fn: fn.expand([2, 3]).to_event(1),
        lambda fn: fn.expand([3]).mask(torch.tensor([True, False, True])),
        lambda fn: fn.expand([3]).mask(torch.tensor([True, False, True])).to_event(1),
        lambda fn: fn.mask(True),
        lambda fn: dist.TransformedDistribution(fn, [T.AffineTransform(0.5, 2.0, cache_size=1)]).to_event(0),
        lambda fn: dist.TransformedDistribution(fn.expand([3]), [T.Permute(torch.tensor([2, 0, 1]), dim=-2)]),
    ],
    ids=["expanded", "to_event", "masked", "masked, to_event", "not masked", "nested", "event_dim 2"],
)
def test_wrapped(name, wrap):
    flow = make_flow(name)
    modules = modules_of(flow)
    parameters = list(modules.parameters())
    fn = wrap(dist.TransformedDistribution(normal(DIM), flow))

    def model():
        pyro.factor("x", log_joint(pyro.sample("z", fn.mask(False))).sum())

    def guide():
        pyro.module("flow", modules)
        with pyro.plate_stack("plates", fn.batch_shape):
            pyro.sample("z", fn)

    def plated():
        with pyro.plate_stack("plates", fn.batch_shape):
            z = pyro.sample("z", fn.mask(False))
            pyro.factor("x", log_joint(z).reshape(fn.batch_shape + (-1,)).sum(-1))

    _, plain = gradient(Trace_ELBO(), plated, guide, parameters)
    pyro.set_rng_seed(1)
    (score,) = exact_scores(guide, parameters).values()
    loss = FIXED()
    _, actual = gradient(loss, plated, guide, parameters)
    assert "solved by" in loss.report()[0].reason
    assert_close(actual, [g - s for g, s in zip(plain, score)])


@pytest.mark.parametrize(
    "kind",
    [
        T.conditional_affine_autoregressive,
        T.conditional_neural_autoregressive,
        T.conditional_planar,
        T.conditional_radial,
        T.conditional_spline_autoregressive,
    ],
)
@pytest.mark.parametrize("c", [1.0, 0.4])
def test_between_other_sites(kind, c):
    case = Between(kind)
    _, plain = gradient(Trace_ELBO(), case.model, case.guide, case.parameters)
    pyro.set_rng_seed(1)
    scores = exact_scores(case.guide, case.parameters)
    for loss in (STLTrace_ELBO, RaoBlackwell_ELBO):
        elbo = loss(control_variate_scale=c, max_plate_nesting=1)
        _, actual = gradient(elbo, case.model, case.guide, case.parameters)
        assert sum("solved by" in row.reason for row in elbo.report()) == 2
        assert_close(actual, [g - c * sum(s) for g, *s in zip(plain, *scores.values())])


@pytest.mark.parametrize("name", ["permuted", "planar", "block", "with coupling", "with elements"])
@pytest.mark.parametrize("kind", ["normal", "multivariate", "laplace"])
def test_base_with_parameters(name, kind):
    """The noise depends on parameters as well, and is a batch of its own."""
    flow = make_flow(name)
    loc = torch.nn.Parameter(torch.randn(2, DIM))
    scale = torch.nn.Parameter(torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM).tril(-1))
    modules = modules_of(flow)
    parameters = [loc, scale, *modules.parameters()]

    def make_fn():
        bases = {
            "normal": dist.Normal(loc, scale.diagonal()).to_event(1),
            "multivariate": dist.MultivariateNormal(loc, scale_tril=scale),
            "laplace": dist.Laplace(loc, scale.diagonal()).to_event(1),
        }
        return dist.TransformedDistribution(bases[kind], flow)

    def guide():
        pyro.module("flow", modules)
        pyro.param("loc", loc)
        with pyro.plate("data", 2):
            pyro.sample("z", make_fn())

    def model():
        with pyro.plate("data", 2):
            pyro.factor("x", log_joint(pyro.sample("z", make_fn().mask(False))))

    _, plain = gradient(Trace_ELBO(), model, guide, parameters)
    loss = FIXED()
    _, actual = gradient(loss, model, guide, parameters)
    if (kind, name) == ("laplace", "block"):
        # Its draws end at bounds that move, near which this density need not vanish.
        assert loss.report()[0].treatment == "as Trace_ELBO"
        return
    assert "solved by" in loss.report()[0].reason
    pyro.set_rng_seed(1)
    (score,) = exact_scores(guide, parameters).values()
    assert_close(actual, [g - s for g, s in zip(plain, score)])


# -- against the gradient through the inverse ------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"num_particles": 4, "vectorize_particles": True}])
@pytest.mark.parametrize("c", [1.0, 0.4, "adaptive"])
@pytest.mark.parametrize("elbo", [STLTrace_ELBO, RaoBlackwell_ELBO, DReG_ELBO])
def test_through_inverse(monkeypatch, elbo, c, options):
    guide = AutoIAFNormal(chain, hidden_dim=[9], num_transforms=2)
    guide()
    stir(guide.transform)
    if elbo is DReG_ELBO:
        options = {"num_particles": 2, **options}
    losses = [elbo(control_variate_scale=c, max_plate_nesting=1, **options) for _ in range(2)]
    for seed in range(8 if c == "adaptive" else 2):
        through_inverse(monkeypatch, False)
        value, actual = gradient(losses[0], chain, guide, list(guide.parameters()), seed)
        through_inverse(monkeypatch, True)
        expected_value, expected = gradient(losses[1], chain, guide, list(guide.parameters()), seed)
        assert value == pytest.approx(expected_value, rel=1e-12)
        assert_close(actual, expected)
    assert any("solved by" in row.reason for row in losses[0].report())
    for first, second in zip(losses[0].report(), losses[1].report()):
        assert first.treatment == second.treatment


def chain():
    z = pyro.sample("z", normal(3).to_event(1))
    with pyro.plate("data", 4):
        y = pyro.sample("y", dist.LogNormal(z[..., 0], 1.0))
        pyro.sample("x", dist.Normal(y * z[..., 1], z[..., 2].exp()), obs=torch.arange(4.0))


def test_next_to_a_discrete_site(monkeypatch):
    flow = make_flow("permuted", 3)
    modules = modules_of(flow)
    logits = torch.nn.Parameter(torch.tensor([0.3, -0.5, 0.1]))
    parameters = [logits, *modules.parameters()]
    fn = dist.TransformedDistribution(normal(3), flow)

    def model():
        z = pyro.sample("z", normal(3).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(z[..., k], 0.5), obs=torch.tensor(1.0))

    def guide():
        pyro.module("flow", modules)
        z = pyro.sample("z", fn)
        pyro.sample("k", dist.Categorical(logits=logits + z))

    for c in (1.0, 0.4):
        through_inverse(monkeypatch, False)
        loss = RaoBlackwell_ELBO(control_variate_scale=c, max_plate_nesting=0)
        _, actual = gradient(loss, model, guide, parameters)
        assert "solved by" in loss.report()[0].reason and loss.report()[1].treatment == "exact"
        through_inverse(monkeypatch, True)
        loss = RaoBlackwell_ELBO(control_variate_scale=c, max_plate_nesting=0)
        _, expected = gradient(loss, model, guide, parameters)
        assert_close(actual, expected)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("entrance", ["loss_and_grads", "differentiable_loss"])
def test_entrances_of_dreg_agree_without_inverse(vectorized, entrance):
    """With K = 1 it is sticking the landing; of K equal particles as well."""
    model, guide, parameters = make(make_flow("two of a kind"))
    expected = gradient(FIXED(), model, guide, parameters)[1]
    loss = DReG_ELBO(1, max_plate_nesting=0, vectorize_particles=vectorized)
    if entrance == "loss_and_grads":
        actual = gradient(loss, model, guide, parameters)[1]
    else:
        pyro.set_rng_seed(1)
        actual = torch.autograd.grad(loss.differentiable_loss(model, guide), parameters)
    assert_close(actual, expected)


# -- the optimum -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [FIXED, DReG_ELBO, partial(RaoBlackwell_ELBO, control_variate_scale=1.0)])
@pytest.mark.parametrize("name", ["permuted", "planar", "block", "neural"])
def test_zero_at_the_optimum(name, loss):
    flow = make_flow(name)
    frozen = dist.TransformedDistribution(normal(DIM), copy.deepcopy(flow))

    def model():
        z = pyro.sample("z", normal(DIM).to_event(1).mask(False))
        start = flow[0]._cached_x_y[0].detach()
        pyro.factor("x", exact_log_prob(frozen, start, z))

    _, guide, parameters = make(flow)
    _, noise = gradient(Trace_ELBO(), model, guide, parameters)
    assert max(g.abs().max() for g in noise) > 0.1
    elbo = loss()
    _, actual = gradient(elbo, model, guide, parameters)
    assert "solved by" in elbo.report()[0].reason
    assert_close(actual, [0.0 * g for g in actual], 1e-11)


# -- unbiased --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planar", "block", "block residual", "neural", "radial"])
@pytest.mark.parametrize("c", [1.0, "adaptive"])
def test_unbiased_without_inverse(name, c):
    model, guide, parameters = make(make_flow(name))
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 0}
    loss = STLTrace_ELBO(control_variate_scale=c, **options)
    check_unbiased(loss, Trace_ELBO(**options), model, guide, parameters)
    assert loss.report()[0].treatment.startswith("path gradient")


def check_unbiased(loss, reference, model, guide, parameters):
    def draw(elbo):
        rows = [gradient(elbo, model, guide, parameters, seed)[1] for seed in range(120)]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    assert_unbiased(draw(loss), paired=draw(reference), detect=0.3, projections=20)


def test_dreg_of_many_particles_without_inverse():
    flow = make_flow("two of a kind")
    modules = modules_of(flow)
    fn, plate = dist.TransformedDistribution(normal(DIM), flow), pyro.plate("items", 100, dim=-1)

    def model():
        with plate:
            pyro.factor("x", log_joint(pyro.sample("z", fn.mask(False))))

    def guide():
        pyro.module("flow", modules)
        with plate:
            pyro.sample("z", fn)

    options = {"num_particles": 3, "max_plate_nesting": 1, "vectorize_particles": True}
    loss = DReG_ELBO(**options)
    plain = DReG_ELBO(**options, control_variate_scale=0.0)
    check_unbiased(loss, plain, model, guide, list(modules.parameters()))
    assert "solved by" in loss.report()[0].reason


# -- where it does not apply -----------------------------------------------------------------


class Scaled(T.AffineTransform):
    """A layer of a user."""


def refused(flow, base=None):
    model, guide, parameters = make(flow, base)
    expected = gradient(Trace_ELBO(), model, guide, parameters)
    loss = FIXED()
    actual = gradient(loss, model, guide, parameters)
    assert actual[0] == pytest.approx(expected[0])
    assert_close(actual[1], expected[1], 1e-12)
    (row,) = loss.report()
    assert row.treatment == "as Trace_ELBO"
    return row.reason


def test_refusals():
    learned = torch.tensor(2.0, requires_grad=True)
    # The density of these jumps where a parameter moves the place.
    assert "LeakyReLUTransform is not known" in refused([T.block_autoregressive(DIM, activation="LeakyReLU")])
    assert "Scaled of tests is not known" in refused([T.planar(DIM), Scaled(0.0, learned, cache_size=1)])
    assert "be zero: learned Planar" in refused([T.planar(DIM)], dist.Cauchy(torch.zeros(DIM), 1.0).to_event(1))
    # Its draws end at bounds that move, near which the density need not vanish.
    base = dist.Laplace(torch.zeros(DIM), 1.0).to_event(1)
    assert "learned BlockAutoregressive" in refused([T.block_autoregressive(DIM)], base)
    # Its slope may vanish, where the score has no mean.
    assert "drawn" in refused([T.polynomial(DIM)])
    # Off by a number of nats, as the gradient shows.
    assert "not that of its Jacobian" in refused([T.sylvester(DIM)])
    # A power series of eight terms, with the determinant of the exponential: off by 12 nats at weights of about 2.
    assert "not that of its Jacobian" in refused([T.matrix_exponential(DIM)])
    assert "more than 128" in refused([T.radial(129)], normal(129).to_event(1))
    hooked = T.planar(DIM)
    hooked.register_forward_hook(lambda *_: None)
    assert "may differ from call to call" in refused([hooked])
    frozen = T.planar(DIM)
    frozen.requires_grad_(False)
    scaled = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
    assert find(dist.TransformedDistribution(scaled, [frozen])).draw().requires_grad is False


def test_large_jacobians_are_left_to_the_inverse(monkeypatch):
    monkeypatch.setattr("pyro_rb.ops.flow.MAX_DENSE", DIM - 1)
    model, guide, parameters = make(make_flow("spline autoregressive"))
    loss = FIXED()
    gradient(loss, model, guide, parameters)
    assert loss.report()[0] == ("z", "path gradient, c = 1", "reparameterized draw")


def test_a_handler_that_replaces_the_value():
    model, guide, parameters = make(make_flow("permuted"))

    class Shift(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            if msg["name"] == "z":
                msg["value"] = msg["value"] + 1.0

    loss = FIXED()
    with Shift():
        _, expected = gradient(Trace_ELBO(), model, guide, parameters)
        _, actual = gradient(loss, model, guide, parameters)
    assert_close(actual, expected)
    assert loss.report()[0].reason == "a handler has replaced its value"


def test_left_to_pyro():
    model, guide, parameters = make(make_flow("planar"))
    plain = poutine.infer_config(guide, config_fn=lambda site: {"rao_blackwell": False})
    loss = FIXED()
    _, expected = gradient(Trace_ELBO(), model, guide, parameters)
    assert_close(gradient(loss, model, plain, parameters)[1], expected)
    assert loss.report()[0].reason == "infer={'rao_blackwell': False}"


@pytest.mark.parametrize("name", ["planar", "affine autoregressive"])
def test_function_transforms(name):
    (layer,) = make_flow(name)
    model, _, _ = make([layer])

    def guide():
        pyro.sample("z", dist.TransformedDistribution(normal(DIM), [layer]))

    class Loss(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.layer, self.loss = layer, loss

        def forward(self):
            return self.loss.differentiable_loss(model, guide)

    def grads(loss):
        pyro.set_rng_seed(1)
        module = Loss(loss)
        named = {n: p.detach() for n, p in module.named_parameters()}
        found = torch.func.grad(lambda p: torch.func.functional_call(module, p, ()))(named)
        return [found[n] for n in named]

    # There is nothing to learn of a density at the draw only.
    reference = Trace_ELBO() if name == "planar" else FIXED()
    expected = grads(reference)
    if name != "planar":
        pyro.set_rng_seed(1)
        loss = reference.differentiable_loss(model, guide)
        expected = torch.autograd.grad(loss, list(layer.parameters()))
    assert_close(grads(FIXED()), expected)


# -- numbers, and what is left behind --------------------------------------------------------


@pytest.mark.parametrize("dim", [20, 80])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_strong_flow_in_single_precision(dim, batch):
    noise = torch.randn(batch + (dim,))
    gradients = []
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        pyro.set_rng_seed(0)
        layer = T.AffineAutoregressive(AutoRegressiveNN(dim, [2 * dim], permutation=torch.arange(dim)))
        start = torch.Generator().manual_seed(0)
        for p in layer.parameters():
            p.data = 0.25 * torch.randn(p.shape, generator=start, dtype=torch.float64, device="cpu").to(p)
        fn = dist.TransformedDistribution(normal(dim).expand(batch + (dim,)).to_event(1), [layer])
        path = find(fn)
        path._base = Fixed(noise.to(dtype))
        value = path.draw()
        path.pass_on(value.clone())
        path.solve()
        gradients.append(path.derivative.double())
    expected, actual = gradients
    assert expected.abs().max() > 3.0
    assert ((actual - expected).norm(dim=-1) < 1e-4 * expected.norm(dim=-1)).all()


class Fixed(dist.Normal):
    """Draws what it is given."""

    def __init__(self, noise):
        super().__init__(torch.zeros_like(noise), 1.0)
        self.noise = noise

    def rsample(self, sample_shape=()):
        return self.noise

    def log_prob(self, value):
        return super().log_prob(value).sum(-1)


def summed(flow, batch, dim):
    modules = modules_of(flow)
    fn = dist.TransformedDistribution(normal(dim).expand(batch + (dim,)).to_event(1), flow)

    def model():
        with pyro.plate_stack("plates", batch):
            pyro.factor("x", -pyro.sample("z", fn.mask(False)).square().sum(-1))

    def guide():
        pyro.module("flow", modules)
        with pyro.plate_stack("plates", batch):
            pyro.sample("z", fn)

    return model, guide, list(modules.parameters())


@pytest.mark.parametrize("name", FLOWS)
def test_caches_and_buffers_stay(name):
    flow = make_flow(name)
    modules = modules_of(flow)
    fn = dist.TransformedDistribution(normal(DIM), flow)
    path = find(fn)
    value = path.draw()
    before = [dict(vars(m)) for m in modules.modules()]
    path.pass_on(value.clone())
    path.solve()
    for module, state in zip(modules.modules(), before):
        assert all(vars(module)[key] is item for key, item in state.items())
    # The last draw is still known.
    torch.testing.assert_close(fn.log_prob(value), path.log_prob)


def test_steps_end_by_the_number_of_dims():
    flow = [stir(T.affine_autoregressive(6), 1.0)]
    loss = FIXED()
    gradient(loss, *summed(flow, (7,), 6))
    (row,) = loss.report()
    assert 2 < int(row.reason.split("solved by: ")[1].split(" step")[0]) <= 6
    assert "substitution" in through_report(AutoIAFNormal(chain, num_transforms=3)).reason


def through_report(guide):
    loss = FIXED(max_plate_nesting=1)
    loss.loss_and_grads(chain, guide)
    return loss.report()[0]


@pytest.mark.parametrize(
    "layer", [T.planar, T.block_autoregressive, T.spline_autoregressive, T.affine_autoregressive, T.spline_coupling]
)
def test_automatic_guides(layer):
    guide = AutoNormalizingFlow(chain, partial(T.iterated, 2, layer))
    row = through_report(guide)
    assert row.treatment == "path gradient, c = 1"
    assert ("solved by" in row.reason) == (layer is not T.spline_coupling)


def test_a_flow_that_is_not_solved():
    """With c = 0 so far, nothing is solved, and the gradient is that of Trace_ELBO."""
    model, guide, parameters = make(make_flow("planar"))
    loss = STLTrace_ELBO()
    _, actual = gradient(loss, model, guide, parameters)
    assert_close(actual, gradient(Trace_ELBO(), model, guide, parameters)[1], 1e-14)
    assert loss.report()[0].treatment == "path gradient, c = 0"


def invert_planar(self, y):
    bias, u, w = self._params() if callable(self._params) else self._params
    u = self.u_hat(u, w)
    along = (u * w).sum(-1, keepdim=True)
    goal = (w * y).sum(-1, keepdim=True)
    s = goal.detach()
    for i in range(100):  # Newton's method, of which the last step has derivatives
        h = torch.tanh(s + bias)
        s = s - (s + along * h - goal) / (1.0 + along * (1.0 - h.square())).detach()
        s = s if i == 99 else s.detach()
    x = y - u * torch.tanh(s + bias)
    self._call(x)  # remembers the determinant
    return x


@pytest.mark.parametrize("layer", [T.affine_autoregressive, T.planar])
def test_rejection_around_a_flow(monkeypatch, layer):
    monkeypatch.setattr(T.Planar, "_inverse", invert_planar)
    guide = AutoNormalizingFlow(chain, partial(T.iterated, 2, layer))
    guide()
    stir(guide.transform)
    parameters, results = list(guide.parameters()), []
    for is_old in (False, True):
        through_inverse(monkeypatch, is_old)
        if is_old:
            monkeypatch.setattr("pyro_rb.ops.score_identity._WITH_MEMORY", set())
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        rejection = RVRSGuide(chain, guide, Z_target=0.3, num_samples=4)
        rejection()
        results.append([gradient(Trace_ELBO(), chain, rejection, parameters, seed)[1] for seed in range(3)])
    for actual, expected in zip(*results):
        assert max(g.abs().max() for g in expected) > 0.1
        assert_close(actual, expected, 1e-9)
    assert rejection.sample_posterior(5)["y"].shape == (5, 4)


def test_a_singular_jacobian():
    """A draw where the flow is flat leaves the other steps of the default as they are."""
    flow = [T.block_autoregressive(DIM)]
    with torch.no_grad():
        flow[0].layers[0].bias += 50.0
    model, guide, parameters = make(flow)
    loss = STLTrace_ELBO()
    for seed in range(6):
        expected = gradient(Trace_ELBO(), model, guide, parameters, seed)
        actual = gradient(loss, model, guide, parameters, seed)
        assert_close(actual[1], expected[1])
    assert "a Jacobian" in loss.report()[0].reason


def test_one_object_twice():
    """A layer that comes twice, and a flow that is sampled twice."""
    layer = stir(T.affine_autoregressive(DIM))
    flow = [layer, T.permute(DIM), layer]
    modules = modules_of(flow)
    fn = dist.TransformedDistribution(normal(DIM), flow)

    def model():
        z, y = (pyro.sample(name, fn.mask(False)) for name in "zy")
        pyro.factor("x", log_joint(z * y))

    def guide():
        pyro.module("flow", modules)
        pyro.sample("z", fn)
        pyro.sample("y", fn)

    loss, parameters = FIXED(), list(layer.parameters())
    _, actual = gradient(loss, model, guide, parameters)
    with pytest.MonkeyPatch.context() as patch:
        through_inverse(patch, True)
        _, expected = gradient(FIXED(), model, guide, parameters)
    assert_close(actual, expected)


def test_edited_in_place():
    model, guide, parameters = make(make_flow("planar"))

    def edited():
        pyro.module("flow", torch.nn.ModuleList())
        guide()
        return None

    def editing_model():
        z = pyro.sample("z", normal(DIM).to_event(1))
        z.add_(1.0)
        pyro.factor("x", log_joint(z))

    with pytest.raises(RuntimeError, match="'z' was changed in place"):
        gradient(FIXED(), editing_model, edited, parameters)
