"""What a training step costs: adapters found by tracing beside adapters written in by hand.

A small transformer is trained for one Adam step in five ways, each as unrolled layers, as
one scan over stacked layers, and as that scan with rematerialization. Every number is set
against the same model with LoRA written into it by hand:

    python tests/benchmarks/step_cost.py [--json FILE]

FLOPs and temporary bytes are XLA's own, of the compiled step. XLA counts the body of a
scan once, whatever its length, so these compare ways of training, not loops. Tracing plus
lowering is timed for the loss and its gradients, without the optimizer, which would hide
the difference. It is processor time, which other work on the machine disturbs least, and
beside it stands what nothing disturbs: the number of function calls that Python made.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import gc
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rl

LOOPS = ("unrolled", "scanned", "scanned+remat")
HAND = "by hand"
ALPHA = 16.0


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of the model and of a batch; weights of different use differ in shape."""

    layers: int = 24
    width: int = 256
    heads: int = 4
    head_dim: int = 48
    hidden: int = 704
    classes: int = 320
    batch: int = 4
    length: int = 128
    rank: int = 16
    dtype: str = "float32"

    @property
    def scale(self) -> float:
        """alpha / sqrt(rank), as the adapters have it."""
        return rl.scale(ALPHA, self.rank)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes of one layer's matrices."""
        width, inner, hidden = self.width, self.heads * self.head_dim, self.hidden
        into = dict.fromkeys(("q", "k", "v"), (width, inner))
        mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {**into, "o": (inner, width), **mlp}


# The model, with a hole where a matrix is used.


def plain(size: Size, w: Any, factors: Any, x: Any) -> Any:
    """The product of a model that knows no LoRA."""
    return x @ w


def by_hand(size: Size, w: Any, factors: Any, x: Any) -> Any:
    """LoRA as a careful user writes it: thin products only, the scale on the thinnest array."""
    a, b = factors["a"].astype(x.dtype), factors["b"].astype(x.dtype)
    thin = (size.scale * (x @ a).astype(jnp.float32)).astype(x.dtype)
    return x @ w + thin @ b


def merged(size: Size, w: Any, factors: Any, x: Any) -> Any:
    """LoRA as many scripts write it: the sum is formed in every step."""
    return x @ (w + size.scale * (factors["a"] @ factors["b"])).astype(w.dtype)


def block(size: Size, linear: Callable[..., Any], layer: Any, factors: Any, x: Any) -> Any:
    """Pre-norm attention and a gated MLP, [batch, length, width] -> the same."""

    def dense(name: str, h: Any) -> Any:
        return linear(size, layer[name], factors and factors[name], h)

    def heads(h: Any) -> Any:
        return h.reshape(*h.shape[:-1], size.heads, size.head_dim)

    h = normalize(x) * layer["norm_1"]
    q, k, v = (heads(dense(name, h)) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * size.head_dim**-0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
    x = x + dense("o", mixed.reshape(*x.shape[:-1], -1))
    h = normalize(x) * layer["norm_2"]
    return x + dense("down", jax.nn.silu(dense("gate", h)) * dense("up", h))


def normalize(x: Any) -> Any:
    """Root mean square normalization, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def forward(size: Size, loop: str, linear: Callable[..., Any], base: Any, lora: Any, x: Any) -> Any:
    """The logits of a model; `lora` is None for a `linear` that needs none."""

    def body(x: Any, layer: Any) -> tuple[Any, None]:
        return block(size, linear, *layer, x), None

    layers, factors = base["layers"], lora and lora["layers"]
    if loop == "unrolled":
        for name, layer in layers.items():
            x, _ = body(x, (layer, factors and factors[name]))
    else:
        x, _ = jax.lax.scan(jax.checkpoint(body) if "remat" in loop else body, x, (layers, factors))
    return normalize(x) @ base["head"]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """The mean loss of a batch."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The ways to train it.


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
      loss: ``loss(trained, base, x, labels)``.
      grad: makes ``(loss, gradients)`` of it.
      trained: what is differentiated and updated.
      fixed: the other arguments of the loss.
      frozen: nothing is updated.
    """

    loss: Callable[..., Any]
    trained: Any
    fixed: tuple[Any, ...]
    grad: Callable[..., Any] = jax.value_and_grad
    frozen: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Example arguments of the step: what is trained, Adam's state, all else."""
        return self.trained, None if self.frozen else adam(self.trained), *self.fixed

    def lower(self) -> Any:
        """Traces and lowers a training step."""
        return jax.jit(update(self.grad(self.loss), self.frozen)).lower(*self.arguments)

    def lower_gradients(self) -> Any:
        """Traces and lowers the loss and its gradients; JAX has no trace of them to reuse."""
        return jax.jit(self.grad(self.loss)).lower(self.trained, *self.fixed)


def ways(size: Size, loop: str, *, concrete: bool = False) -> dict[str, Way]:
    """All ways to train one model, on abstract arguments unless `concrete`."""
    base, x, labels = model(size, loop, concrete=concrete)
    config = rl.LoraConfig(rank=size.rank, alpha=ALPHA)

    def original(base: Any, x: Any) -> Any:
        return forward(size, loop, plain, base, None, x)

    params, apply, _ = rl.adapt(original, base, x, config=config, key=jax.random.key(1))
    lora = params.lora

    def loss(linear: Callable[..., Any]) -> Callable[..., Any]:
        def function(lora: Any, base: Any, x: Any, labels: Any) -> Any:
            return cross_entropy(forward(size, loop, linear, base, lora, x), labels)

        return function

    def adapted(params: rl.LoraParams, x: Any, labels: Any) -> Any:
        return cross_entropy(apply(params, x), labels)

    def full(base: Any, x: Any, labels: Any) -> Any:
        return cross_entropy(original(base, x), labels)

    def frozen(x: Any, base: Any, labels: Any) -> Any:
        return full(base, x, labels)

    return {
        "adapted": Way(adapted, lora, (base, x, labels), adapters_only),
        HAND: Way(loss(by_hand), lora, (base, x, labels)),
        "merged in the step": Way(loss(merged), lora, (base, x, labels)),
        "full fine-tuning": Way(full, base, (x, labels)),
        "no training (loss, dx)": Way(frozen, x, (base, labels), frozen=True),
    }


def adapters_only(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`rl.value_and_grad`, with the adapters and the base as two arguments."""
    grad = rl.value_and_grad(loss)
    return lambda lora, base, *data: grad(rl.LoraParams(base, lora), *data)


TX = optax.adam(1e-3)


def adam(trained: Any) -> Any:
    """Adam's state, abstract for an abstract tree."""
    abstract = isinstance(jax.tree.leaves(trained)[0], jax.ShapeDtypeStruct)
    return (jax.eval_shape if abstract else lambda f, *args: f(*args))(TX.init, trained)


def update(grad: Callable[..., Any], frozen: bool) -> Callable[..., Any]:
    """A training step from ``grad(trained, *fixed) -> (loss, gradients)``."""

    def step(trained: Any, state: Any, *fixed: Any) -> Any:
        loss, grads = grad(trained, *fixed)
        if frozen:
            return grads, loss
        updates, state = TX.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


def model(size: Size, loop: str, *, concrete: bool) -> tuple[Any, Any, Any]:
    """Base parameters, activations and labels: structs, or random arrays."""

    def make(key: jax.Array) -> tuple[Any, Any, Any]:
        keys = iter(jax.random.split(key, size.layers + 3))
        layers = {f"{k:02d}": layer(next(keys)) for k in range(size.layers)}
        if loop != "unrolled":
            layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.values())
        head = matrix(next(keys), (size.width, size.classes))
        x = jax.random.normal(next(keys), (size.batch, size.length, size.width), size.dtype)
        labels = jax.random.randint(next(keys), x.shape[:2], 0, size.classes)
        return {"layers": layers, "head": head}, x, labels

    def layer(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(size.matrices))
        made = zip(size.matrices.items(), keys, strict=True)
        norms = {name: jnp.ones(size.width, size.dtype) for name in ("norm_1", "norm_2")}
        return {name: matrix(key, shape) for (name, shape), key in made} | norms

    def matrix(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jax.random.normal(key, shape, size.dtype) * shape[0] ** -0.5

    return (jax.jit if concrete else abstractly)(make)(jax.random.key(0))


def abstractly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The shapes and dtypes of a function's results."""
    return lambda *args: jax.eval_shape(function, *args)


# Costs.


def compiled_cost(compiled: Any) -> dict[str, float]:
    """FLOPs and temporary bytes of a compiled step, as XLA counts them."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return {
        "flops": float(analysis["flops"]),
        "temp_bytes": float(compiled.memory_analysis().temp_size_in_bytes),
    }


def count_calls(call: Callable[[], Any]) -> float:
    """How many functions Python calls, the second time round."""
    call()
    profile = cProfile.Profile()
    profile.runcall(call)
    return float(pstats.Stats(profile).total_calls)


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times every call once per round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            with quiet():
                start = clock()
                call()
                seconds = clock() - start
            times[name] += [seconds] if k else []
    return times


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside, and none left over from before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ready(way: Way, compiled: Any) -> Callable[[], Any]:
    """One training step, ready to be timed."""
    arguments = way.arguments
    return lambda: jax.block_until_ready(compiled(*arguments))


def measure(size: Size, loop: str, *, compiled_layers: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way to train; ``x_...`` is the ratio to the hand-written model.

    Times are those of the fastest round; their ratios are medians over the rounds of the
    ratio within a round.
    """
    traced = {name: way.lower_gradients for name, way in ways(size, loop).items()}
    seconds = {"trace_s": interleaved(traced, rounds, time.process_time)}
    calls = {name: count_calls(call) for name, call in traced.items()}
    every = ways(dataclasses.replace(size, layers=compiled_layers), loop, concrete=True)
    compiled = {name: way.lower().compile() for name, way in every.items()}
    steps = {name: ready(way, compiled[name]) for name, way in every.items()}
    seconds["step_s"] = interleaved(steps, rounds, time.perf_counter)
    costs = {n: {**compiled_cost(compiled[n]), "trace_calls": calls[n]} for n in every}
    rows = []
    for name in every:
        row = {"loop": loop, "way": name, **costs[name]}
        row |= {f"x_{cost}": costs[name][cost] / costs[HAND][cost] for cost in costs[name]}
        row |= {cost: min(times[name]) for cost, times in seconds.items()}
        row |= {f"x_{cost}": paired_ratio(times, name) for cost, times in seconds.items()}
        rows.append(row)
    return rows


def paired_ratio(times: dict[str, list[float]], name: str) -> float:
    """The median over rounds of a way's time over the hand-written model's."""
    pairs = zip(times[name], times[HAND], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


# The report.

COLUMNS = (
    ("flops", "GFLOP", 1e-9, 3),
    ("temp_bytes", "temp MB", 1e-6, 1),
    ("trace_calls", "trace kcalls", 1e-3, 0),
    ("trace_s", "trace+lower ms", 1e3, 0),
    ("step_s", "step ms", 1e3, 0),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; after each number its ratio to the hand-written model."""
    head = ["layers", "way"]
    for _, title, _, _ in COLUMNS:
        head += [title, "x"]
    lines = [head, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(align(line, widths) for line in lines)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    line = [row["loop"], row["way"]]
    for cost, _, unit, digits in COLUMNS:
        line += [f"{row[cost] * unit:.{digits}f}", f"{row[f'x_{cost}']:.3f}"]
    return line


def align(line: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
    return "  ".join([*names, *numbers])


def main() -> None:
    """Measures, prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every timing")
    parser.add_argument("--compiled-layers", type=int, default=4, help="layers of what is run")
    for field in dataclasses.fields(Size):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    file = options.pop("json")
    how = {name: options.pop(name) for name in ("rounds", "compiled_layers")}
    size = Size(**options)
    rows = [row for loop in LOOPS for row in measure(size, loop, **how)]
    stack = {"jax": jax.__version__, "python": platform.python_version()}
    about = {**stack, "backend": jax.default_backend(), **dataclasses.asdict(size), **how}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(table(rows))
    print(f"x: ratio to LoRA {HAND}. FLOPs and bytes count the body of a scan once.")
    print(f"Tracing: {size.layers} layers, the loss and its gradients. ", end="")
    print(f"All else: a training step of {how['compiled_layers']} layers.")
    if file:
        file.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
