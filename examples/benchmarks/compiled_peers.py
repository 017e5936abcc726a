# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Microseconds of a step of SVI: Pyro, compiled by pyro_rb, and NumPyro.

Three small models, each with an AutoNormal guide and Adam. All kinds of steps of a model take turns, block by block,
in one process. The table gives the process CPU time of a step, and how many times faster it is than a step of Pyro's
SVI with Trace_ELBO, both as medians over blocks. It also gives the seconds of wall-clock time until steps were that
fast; they are fewer where PyTorch has kept what it compiled. All run on one thread. Without NumPyro, which is in the
extra "benchmarks", its rows are left out::

    python examples/benchmarks/compiled_peers.py --out compiled_peers
"""

import os

# Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import inspect  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from importlib.metadata import version  # noqa: E402

import numpy as np  # noqa: E402
import pyro  # noqa: E402
from common import quartiles, schools  # noqa: E402
from compiled import hierarchical, logistic  # noqa: E402
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402
from tqdm import tqdm  # noqa: E402

import pyro_rb  # noqa: E402
from pyro_rb import CompiledSVI, RaoBlackwell_ELBO, STLTrace_ELBO  # noqa: E402
from support.command_line import make_parser, restart, run, set_up  # noqa: E402
from support.results import make_panels, report  # noqa: E402

BASE = "Pyro, Trace_ELBO"
LR = 0.001
#: Steps before a block is timed: adaptive losses learn at each of the first 50.
WARM_UP = 70
#: By name: the class, the loss, and the backend if there is one.
KINDS = {
    BASE: (SVI, Trace_ELBO, None),
    "Pyro, JitTrace_ELBO": (SVI, lambda: JitTrace_ELBO(ignore_jit_warnings=True), None),
    "pyro_rb, STLTrace_ELBO": (SVI, STLTrace_ELBO, None),
    "pyro_rb, STLTrace_ELBO, replay": (CompiledSVI, STLTrace_ELBO, "replay"),
    "pyro_rb, Trace_ELBO, Inductor": (CompiledSVI, Trace_ELBO, "inductor"),
    "pyro_rb, STLTrace_ELBO, Inductor": (CompiledSVI, STLTrace_ELBO, "inductor"),
    "pyro_rb, RaoBlackwell_ELBO, Inductor": (CompiledSVI, RaoBlackwell_ELBO, "inductor"),
}


def cases():
    """Yields names, models of Pyro, and those of NumPyro."""
    yield "eight schools", schools(), numpyro_schools
    yield "logistic, 17 weights", logistic(), numpyro_logistic
    yield "hierarchical, 5 sites", hierarchical(), numpyro_hierarchical


def data_of(model):
    """The tensors that a model takes from where it was made, as arrays."""
    if hasattr(model, "args"):
        return [np.asarray(x) for x in model.args]
    return {name: np.asarray(x) for name, x in inspect.getclosurevars(model).nonlocals.items()}


def numpyro_schools(model):
    import numpyro
    import numpyro.distributions as dist

    effects, errors = data_of(model)

    def schools():
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(25.0))
        with numpyro.plate("schools", len(effects)):
            eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
            numpyro.sample("effect", dist.Normal(mu + tau * eta, errors), obs=effects)

    return schools


def numpyro_logistic(model):
    import numpyro
    import numpyro.distributions as dist

    x, y = (data_of(model)[name] for name in "xy")

    def logistic():
        w = numpyro.sample("w", dist.Normal(np.zeros(x.shape[1], "float32"), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return logistic


def numpyro_hierarchical(model):
    import numpyro
    import numpyro.distributions as dist

    x, groups, y = (data_of(model)[name] for name in ("x", "groups", "y"))

    def hierarchical():
        mu = numpyro.sample("mu", dist.Normal(np.zeros(2, "float32"), 2.0).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(np.ones(2, "float32")).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        with numpyro.plate("groups", 10):
            a = numpyro.sample("a", dist.Normal(mu[0], tau[0]))
            b = numpyro.sample("b", dist.Normal(mu[1], tau[1]))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(a[groups] + b[groups] * x, sigma), obs=y)

    return hierarchical


class Steps:
    """Steps by Pyro's interface, with parameters of their own."""

    def __init__(self, model, svi_class, make_loss, backend, unroll=1):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": LR})
        options = {"unroll": unroll} if unroll > 1 else {}
        loss = make_loss() if backend is None else pyro_rb.compile(make_loss(), backend)
        self.svi = svi_class(model, AutoNormal(model), optim, loss, **options)
        #: Such ones make a tenth of the steps in a block.
        self.is_slow = svi_class is SVI
        self.store = pyro.get_param_store().get_state()

    def __call__(self, num_steps):
        pyro.get_param_store().set_state(self.store)
        if self.is_slow:
            for _ in range(num_steps):
                self.svi.step()
        else:
            self.svi.run(num_steps, progress_bar=False)
        self.store = pyro.get_param_store().get_state()


class NumPyroSteps:
    """
    Steps by NumPyro's.

    :param int in_loop: steps in a compiled loop, as ``svi.run`` makes them; 1 for a call a step.
    """

    is_slow = False

    def __init__(self, model, in_loop):
        import jax
        from numpyro.infer import SVI, Trace_ELBO
        from numpyro.infer.autoguide import AutoNormal
        from numpyro.optim import Adam

        svi = SVI(model, AutoNormal(model), Adam(LR), Trace_ELBO())
        self.state, self.in_loop, self.wait = svi.init(jax.random.PRNGKey(0)), in_loop, jax.block_until_ready
        self.update = jax.jit(lambda state: svi.update(state))
        if in_loop > 1:
            self.update = jax.jit(
                lambda state: jax.lax.scan(lambda s, _: svi.update(s), state, None, length=in_loop)
            )

    def __call__(self, num_steps):
        for _ in range(-(-num_steps // self.in_loop)):
            self.state, losses = self.update(self.state)
        self.wait((self.state, losses))


def kinds_of(model, to_numpyro, args):
    """By name, a function without arguments that makes :class:`Steps`."""
    found = {name: lambda kind=kind: Steps(model, *kind) for name, kind in KINDS.items()}
    unroll = args.unroll
    if args.smoke_test:
        found = dict(list(found.items())[:4])
    elif unroll > 1:
        name = f"pyro_rb, Trace_ELBO, Inductor, {unroll} steps a graph"
        found[name] = lambda: Steps(model, CompiledSVI, Trace_ELBO, "inductor", unroll)
    if has_numpyro():
        found["NumPyro, a jitted step"] = lambda: NumPyroSteps(to_numpyro(model), 1)
        found["NumPyro, a jitted loop"] = lambda: NumPyroSteps(to_numpyro(model), args.block_size)
    return found


def has_numpyro():
    try:
        import numpyro  # noqa: F401
    except ImportError:
        return False
    return True


def measure(kinds, args):
    steps, ready = {}, {}
    for name, make in tqdm(kinds.items(), leave=False, disable=args.smoke_test):
        restart(args.seed)
        start = time.perf_counter()
        steps[name] = make()
        steps[name](2 if args.smoke_test else WARM_UP)
        ready[name] = round(time.perf_counter() - start, 1)
    times = {name: [] for name in steps}
    for _ in range(args.num_blocks):
        for name, block in steps.items():
            size = max(1, args.block_size // (10 if block.is_slow else 1))
            start = time.process_time()
            block(size)
            times[name].append((time.process_time() - start) / size)
    base = np.array(times[BASE])
    return {
        name: {
            "us": quartiles(1e6 * np.array(x), 1),
            "times faster": quartiles(base / np.array(x), 2),
            "ready after, s": ready[name],
        }
        for name, x in times.items()
    }


def draw(results):
    """Bars, one panel for each model."""
    colors = {"Pyro": "#7d7d7d", "NumPyro": "#e07b1a"}
    fig, axes = make_panels(1, len(results), size=(4.2, 3.6), sharey=True)
    for ax, (model, found) in zip(axes, results.items()):
        names = list(found)[::-1]
        values = [found[name]["us"][0] for name in names]
        ax.barh(names, values, color=[colors.get(name.partition(",")[0], "#3d8fd6") for name in names])
        for name, value in zip(names, values):
            ax.annotate(number(value), (value, name), (3, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set(xscale="log", xlabel="microseconds a step", title=model, xlim=(min(values) / 3, 4 * max(values)))
        ax.grid(False, axis="y")
    return fig


def main(args):
    set_up(args)
    if args.smoke_test:
        args.num_blocks, args.block_size = 1, 2
    if not has_numpyro():
        text = 'NumPyro is not installed, its rows are left out. It is in the extra "benchmarks".'
        print(text, file=sys.stderr)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|pyro")  # JitTrace_ELBO
    results = {}
    for name, model, to_numpyro in cases():
        if args.model not in name:
            continue
        results[name] = measure(kinds_of(model, to_numpyro, args), args)
        if args.smoke_test:
            break
    rows = [
        {"": kind, **{key: cell for model, found in results.items() for key, cell in cells(model, found[kind])}}
        for kind in next(iter(results.values()))
    ]
    peers = {name: version(name) for name in ("jax", "numpyro") if has_numpyro()}
    report(args, rows, lambda: draw(results), results=results, versions=peers)


def cells(model, found):
    us, times = found["us"][0], found["times faster"][0]
    yield f"{model}: µs", number(us)
    yield f"{model}: times faster", number(times)


def number(value):
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    parser = make_parser(__doc__, device=False)
    parser.set_defaults(device="cpu")
    parser.add_argument("--num-blocks", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--block-size", type=int, default=500, help="steps in a block; a tenth of them for SVI")
    parser.add_argument("--model", default="", help="run only models with this in the name")
    parser.add_argument("--unroll", type=int, default=4, help="steps in one graph")
    run(main, parser)
