"""Random programs: the adapted function equals the merged model, forward and backward.

A program is built backwards. A product wants a view of some roles, such as ``bio``; moves that
lead to the view are drawn one by one, each undone on the shape, until the stored weight is
reached. `runs` only ever draws what the library promises to support, so a refusal there is a
failure; `wild` breaks the roles on purpose, and may be refused by `adapt`, but never later.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import rslora_jax as rl

TOKENS, WIDTH = 2, 6
KEY = jax.random.key(0)
VIEWS = ("io", "oi", "iio", "oii", "ioi", "ioo", "oio", "bio", "iob", "boi", "obi", "bioo", "biio")
# Compiling is most of the cost; none of this changes what is computed.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FIXED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": (Phase.generate, Phase.shrink),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
pytestmark = pytest.mark.filterwarnings("ignore:.* rank . is above .*, the largest rank")


@dataclasses.dataclass(frozen=True)
class Use:
    """One product of one weight: moves outside of the wrap, moves inside of it, the product."""

    weight: int
    outer: tuple = ()
    wraps: tuple = ()
    inner: tuple = ()
    roles: str = "io"
    form: str = "einsum"
    order: tuple = ()
    weight_first: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """Shapes and dtypes of the weights, and what is done with them in turn."""

    weights: tuple
    uses: tuple


# Running a program.

MOVES = {
    "transpose": lambda w, ins, order: jnp.transpose(w, order),
    "reshape": lambda w, ins, shape: jnp.reshape(w, shape),
    "slice": lambda w, ins, axis, *bounds: lax.slice_in_dim(w, *bounds, axis=axis),
    "split": lambda w, ins, axis, sizes, part: lax.split(w, sizes, axis)[part],
    "index": lambda w, ins, axis, k: w[(*[slice(None)] * axis, k)],
    "traced index": lambda w, ins, axis: lax.dynamic_index_in_dim(w, ins["k"], axis, False),
    "traced item": lambda w, ins, axis: w[(*[slice(None)] * axis, ins["k"])],
    "taken": lambda w, ins, axis: jnp.take(w, ins["k"], axis=axis),
    "traced slice": lambda w, ins, axis, n: lax.dynamic_slice_in_dim(w, ins["k"], n, axis),
    "squeeze": lambda w, ins, axis: jnp.squeeze(w, axis),
    "expand": lambda w, ins, axis: jnp.expand_dims(w, axis),
    "broadcast": lambda w, ins, n: jnp.broadcast_to(w, (n, *w.shape)),
    "grow": lambda w, ins, shape: jnp.broadcast_to(w, shape),
    "scale": lambda w, ins, number: w * number,
    "traced scale": lambda w, ins: ins["number"] * w,
    "divide": lambda w, ins: w / (2.0 + ins["number"]),
    "negate": lambda w, ins: -w,
    "flip": lambda w, ins, axis: jnp.flip(w, axis),
    "name": lambda w, ins: checkpoint_name(w, "weight"),
    "barrier": lambda w, ins: lax.optimization_barrier(w),
    "stop": lambda w, ins: lax.stop_gradient(w),
    "copy": lambda w, ins: jnp.copy(w),
    "cast": lambda w, ins: w.astype(jnp.float64),
    "jit": lambda w, ins, inner: jax.jit(lambda w: moved(w, ins, [inner]))(w),
    "remat": lambda w, ins, inner: jax.checkpoint(lambda w: moved(w, ins, [inner]))(w),
    # Moves without a low-rank form, for programs that may be refused.
    "columns": lambda w, ins: w * jnp.arange(1.0, 1.0 + w.shape[-1]),
    "shift": lambda w, ins: w + 0.1,
    "sine": lambda w, ins: jnp.sin(w),
    "sum": lambda w, ins: jnp.cumsum(w, axis=0),
    "join": lambda w, ins: jnp.concatenate([w, -w], axis=-1)[..., : w.shape[-1]],
    "pad": lambda w, ins: jnp.pad(w, [(1, 0)] * w.ndim)[tuple([slice(1, None)] * w.ndim)],
    "where": lambda w, ins: jnp.where(ins["flag"], w, 0.0),
    "norm": lambda w, ins: w / (1.0 + jnp.sum(w**2)),
}


def moved(w, ins, moves):
    for name, *args in moves:
        w = MOVES[name](w, ins, *args)
    return w


def repeated(h, count):
    """The features of `h`, repeated or cut to `count`."""
    return h[:, jnp.arange(count) % h.shape[1]]


def letters(roles):
    return "".join(chr(ord("a") + k) for k in range(len(roles)))


def einsum(x, w, use, x_names, w_names, out):
    names, operands = [x_names, w_names], [x, w]
    if use.weight_first:
        names, operands = names[::-1], operands[::-1]
    return jnp.einsum(f"{','.join(names)}->{out}", *operands)


def lookup(w, ins, use):
    axis = use.roles.index("i")
    return jnp.moveaxis(jnp.take(w, ins["rows"] % w.shape[axis], axis=axis), axis, 0)


def convolution(h, w, use):
    out_axis = use.roles.index("o")
    space, channel = [k for k in range(3) if k != out_axis]
    spec = "".join({out_axis: "O", space: "W", channel: "I"}[k] for k in range(3))
    x = repeated(h, w.shape[channel])[None]
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", spec, "NWC"))[0]


def product(h, w, ins, use):
    """[TOKENS, WIDTH] times a view of a weight, as [TOKENS, anything]."""
    names = letters(use.roles)
    size = dict(zip(names, w.shape, strict=True))
    role = dict(zip(names, use.roles, strict=True))
    ins_of = [n for n in use.order if role[n] != "o" and (role[n] == "i" or use.form != "experts")]
    outs = "".join(n for n in use.order if role[n] == "o" or (n in ins_of and role[n] == "b"))
    x = repeated(h, math.prod(size[n] for n in ins_of)).reshape(-1, *(size[n] for n in ins_of))
    x_names = "".join(ins_of)
    if use.form == "experts":
        w = jnp.take(w, ins["rows"] % w.shape[use.roles.index("b")], axis=use.roles.index("b"))
        w_names = names.replace(names[use.roles.index("b")], "t")
        return einsum(x, w, use, "t" + x_names, w_names, "t" + outs)
    if use.form == "rows":
        return jax.vmap(lambda row: einsum(row, w, use, x_names, names, outs))(x)
    if use.form == "stacked":
        batch = names[use.roles.index("b")]

        def one(x, w):
            strip = (s.replace(batch, "") for s in ("t" + x_names, names, "t" + outs))
            return einsum(x, w, use, *strip)

        places = (1 + x_names.index(batch), names.index(batch))
        return jax.vmap(one, in_axes=places, out_axes=1 + outs.index(batch))(x, w)
    if use.form == "dot_general":
        stacked = [n for n in use.order if role[n] == "b"]
        summed = [n for n in use.order if role[n] == "i"]
        sides = [("t" + x_names, x), (names, w)][:: -1 if use.weight_first else 1]
        numbers = tuple(
            tuple(tuple(side.index(n) for n in group) for side, _ in sides)
            for group in (summed, stacked)
        )
        out = lax.dot_general(sides[0][1], sides[1][1], numbers)
        place = len(stacked) + (use.roles.count("o") if use.weight_first else 0)
        return jnp.moveaxis(out, place, 0)
    if use.form == "conv":
        out_axis = use.roles.index("o")
        space, channel = [k for k in range(3) if k != out_axis]
        spec = "".join({out_axis: "O", space: "W", channel: "I"}[k] for k in range(3))
        x = repeated(h, w.shape[channel])[None]
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", spec, "NWC"))[
            0
        ]
    return einsum(x, w, use, "t" + x_names, names, "t" + outs)


def step(h, w, ins, use):
    w = moved(w, ins, use.inner)
    if use.form == "lookup":
        out = lookup(w, ins, use)
    else:
        out = convolution(h, w, use) if use.form == "conv" else product(h, w, ins, use)
    return h + jnp.sin(repeated(out.reshape(TOKENS, -1), WIDTH))


def cond_wrap(function):
    def run(h, w, ins):
        other = lambda h, w: jnp.cos(function(h, w, ins))  # noqa: E731
        return lax.cond(ins["flag"], lambda h, w: function(h, w, ins), other, h, w)

    return run


def loop_wrap(function):
    def run(h, w, ins):
        return lax.scan(lambda h, _: (function(h, w, ins), None), h, length=2)[0]

    return run


def layers_wrap(function):
    def run(h, w, ins):
        return lax.scan(lambda h, layer: (function(h, layer, ins), None), h, w)[0]

    return run


def half_wrap(function):
    """A branch that never reads the weight."""

    def run(h, w, ins):
        return lax.cond(ins["flag"], lambda h: function(h, w, ins), jnp.sin, h)

    return run


def custom_wrap(function):
    """A derivative rule of its own; nothing traced is closed over, which JAX would refuse."""

    @jax.custom_vjp
    def run(h, w, ins):
        return function(h, w, ins)

    def forward(h, w, ins):
        return jax.vjp(lambda h, w: function(h, w, ins), h, w)

    run.defvjp(forward, lambda pullback, g: (*pullback(g), None))
    return run


WRAPS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": cond_wrap,
    "half": half_wrap,
    "loop": loop_wrap,
    "layers": layers_wrap,
    "custom": custom_wrap,
}


def interpret(program):
    """The program as ``apply_fn(params, ins)``."""

    def apply_fn(params, ins):
        h = ins["x"]
        for use in program.uses:
            function = functools.partial(step, use=use)
            for wrap in use.wraps:
                function = WRAPS[wrap](function)
            w = moved(params[f"w{use.weight}"], ins, use.outer)
            h = function(h, w, ins)
        return h

    return apply_fn


# Drawing a program, backwards.

SIZES = st.sampled_from([2, 3, 2, 3, 1])


def undo_transpose(draw, shape, roles):
    order = tuple(draw(st.permutations(range(len(shape)))))
    old = [order.index(k) for k in range(len(shape))]
    return ("transpose", order), [shape[k] for k in old], "".join(roles[k] for k in old)


def undo_reshape(draw, shape, roles):
    """Splits one axis of the view, or joins two of one role, in the weight."""
    if 1 in shape:  # a reshape does not say where an axis of size one goes
        return undo_transpose(draw, shape, roles)
    pairs = [k for k in range(len(shape) - 1) if roles[k] == roles[k + 1]]
    if pairs and draw(st.booleans()):
        k = draw(st.sampled_from(pairs))
        before = [*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :]]
        return ("reshape", tuple(shape)), before, roles[: k + 1] + roles[k + 2 :]
    k = draw(st.integers(0, len(shape) - 1))
    factors = [n for n in range(1, shape[k] + 1) if shape[k] % n == 0]
    n = draw(st.sampled_from(factors))
    before = [*shape[:k], n, shape[k] // n, *shape[k + 1 :]]
    return ("reshape", tuple(shape)), before, roles[:k] + 2 * roles[k] + roles[k + 1 :]


def undo_slice(draw, shape, roles):
    k, start, more = draw(st.integers(0, len(shape) - 1)), draw(st.integers(0, 1)), 1
    stride = draw(st.sampled_from([1, 1, 2]))
    stop = start + stride * (shape[k] - 1) + 1
    before = [*shape[:k], stop + more, *shape[k + 1 :]]
    return ("slice", k, start, stop, stride), before, roles


def undo_split(draw, shape, roles):
    k, part = draw(st.integers(0, len(shape) - 1)), draw(st.integers(0, 1))
    sizes = (shape[k], 1) if part == 0 else (2, shape[k])
    return ("split", k, sizes, part), [*shape[:k], sum(sizes), *shape[k + 1 :]], roles


def undo_index(draw, shape, roles):
    k = draw(st.integers(0, len(shape)))
    name = draw(st.sampled_from(["index", "traced index", "traced item", "taken"]))
    move = (name, k, 1) if name == "index" else (name, k)
    return move, [*shape[:k], draw(st.integers(2, 3)), *shape[k:]], roles[:k] + "b" + roles[k:]


def undo_traced_slice(draw, shape, roles):
    k = draw(st.integers(0, len(shape) - 1))
    return ("traced slice", k, shape[k]), [*shape[:k], shape[k] + 1, *shape[k + 1 :]], roles


def undo_squeeze(draw, shape, roles):
    k = draw(st.integers(0, len(shape)))
    return ("squeeze", k), [*shape[:k], 1, *shape[k:]], roles[:k] + "b" + roles[k:]


def undo_broadcast(draw, shape, roles):
    """A size-one axis appears or grows; another axis keeps its role in the weight."""
    free = [k for k, r in enumerate(roles) if r == "b" or roles.count(r) > 1]
    if not free:
        return undo_transpose(draw, shape, roles)
    k = draw(st.sampled_from(free))
    if shape[k] == 1 and draw(st.booleans()):
        return ("expand", k), [*shape[:k], *shape[k + 1 :]], roles[:k] + roles[k + 1 :]
    if k == 0 and draw(st.booleans()):
        return ("broadcast", shape[0]), shape[1:], roles[1:]
    return ("grow", tuple(shape)), [*shape[:k], 1, *shape[k + 1 :]], roles


def undo_number(draw, shape, roles):
    moves = [("scale", -1.5), ("traced scale",), ("divide",), ("negate",)]
    return draw(st.sampled_from(moves)), shape, roles


def undo_label(draw, shape, roles):
    moves = [("name",), ("barrier",), ("copy",), ("flip", draw(st.integers(0, len(shape) - 1)))]
    moves += [("stop",)]
    return draw(st.sampled_from(moves)), shape, roles


UNDO = (
    undo_transpose,
    undo_transpose,
    undo_reshape,
    undo_reshape,
    undo_slice,
    undo_split,
    undo_index,
    undo_traced_slice,
    undo_squeeze,
    undo_broadcast,
    undo_number,
    undo_label,
)


def undo_wildly(draw, shape, roles):
    """Joins axes whatever their roles, or computes something that is not linear."""
    k = draw(st.integers(0, max(len(shape) - 2, 0)))
    if len(shape) > 2 and draw(st.booleans()):
        before = [*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :]]
        return ("reshape", tuple(shape)), before, roles[: k + 1] + roles[k + 2 :]
    names = ["columns", "shift", "sine", "sum", "join", "pad", "where", "norm"]
    return (draw(st.sampled_from(names)),), shape, roles


def draw_moves(draw, shape, roles, most, undo):
    """Moves that end in a view of `shape`, and the shape and roles that they start from."""
    moves = []
    for _ in range(draw(st.integers(0, most))):
        move, before, before_roles = draw(st.sampled_from(undo))(draw, shape, roles)
        if math.prod(before) > 400 or len(before) > 5 or len(before) < 2:
            continue
        wrap = draw(st.sampled_from(["", "", "", "jit", "remat"]))
        moves.append((wrap, move) if wrap else move)
        shape, roles = list(before), before_roles
    return tuple(moves[::-1]), shape, roles


def draw_form(draw, roles):
    forms = ["einsum", "einsum", "rows", "dot_general"]
    forms += ["stacked", "experts"] * (roles.count("b") == 1)
    forms += ["lookup"] * 2 * (roles in ("io", "oi"))
    forms += ["conv"] * 2 * (roles in ("iio", "oii", "ioi"))
    return draw(st.sampled_from(forms))


def draw_use(draw, weight, wraps, undo):
    roles = draw(st.sampled_from(VIEWS))
    shape = [draw(SIZES) for _ in roles]
    kinds = draw(st.lists(st.sampled_from(wraps), max_size=2, unique=True)) if wraps else []
    use = Use(
        weight,
        wraps=tuple(kinds),
        roles=roles,
        form=draw_form(draw, roles),
        order=tuple(draw(st.permutations(letters(roles)))),
        weight_first=draw(st.booleans()),
    )
    if use.form == "conv" and undo is UNDO:
        undo = tuple(move for move in UNDO if move is not undo_broadcast)
    inner, shape, roles = draw_moves(draw, shape, roles, 2, undo)
    if "layers" in kinds:
        shape, roles = [2, *shape], "b" + roles
    outer, shape, roles = draw_moves(draw, shape, roles, 2, undo)
    return dataclasses.replace(use, inner=inner, outer=outer), tuple(shape), roles


def turned(draw, use):
    """The same view once more, with inputs and outputs exchanged: a tied weight."""
    swap = use.roles.translate(str.maketrans("io", "oi")) if draw(st.booleans()) else use.roles
    plain = {"form": "einsum"} if use.form in ("conv", "experts") else {}
    return dataclasses.replace(use, roles=swap, weight_first=draw(st.booleans()), **plain)


SUPPORTED_WRAPS = ("jit", "remat", "cond", "half", "loop", "layers")


@st.composite
def programs(draw, wraps=SUPPORTED_WRAPS, undo=UNDO, most=2):
    """Weights whose axes keep one role each, used once or twice."""
    weights, uses = [], []
    for k in range(draw(st.integers(1, most))):
        use, shape, _ = draw_use(draw, k, wraps, undo)
        dtype = draw(st.sampled_from(["float64", "float64", "float32"]))
        if dtype == "float32":
            use = dataclasses.replace(use, outer=(("cast",), *use.outer))
        weights.append((shape, dtype))
        uses.append(use)
    if draw(st.booleans()):
        uses.append(turned(draw, draw(st.sampled_from(uses))))
    return Program(tuple(weights), tuple(uses))


@st.composite
def wild(draw):
    """Programs that break the roles, or use weights in ways without a low-rank form."""
    program = draw(programs((*SUPPORTED_WRAPS, "custom"), (*UNDO, undo_wildly), most=1))
    other = draw(st.sampled_from(program.uses))
    shape, dtype = program.weights[other.weight]
    if len(shape) > 4 or draw(st.booleans()):
        return program
    roles = draw(st.permutations("iobi"[: len(shape)]))
    use = Use(
        other.weight,
        outer=(("cast",),) * (dtype == "float32"),
        roles="".join(roles),
        order=tuple(draw(st.permutations(letters(roles)))),
    )
    return dataclasses.replace(program, uses=(*program.uses, use))


# Comparing.


def numbers(shape, dtype, rng):
    return jnp.asarray(rng.normal(size=shape) / 2, dtype)


def inputs(rng):
    return {
        "x": numbers((TOKENS, WIDTH), "float64", rng),
        "k": jnp.array(1),
        "number": jnp.array(0.7),
        "flag": jnp.array(bool(rng.integers(2))),
        "rows": jnp.array([2, 1]),
    }


def merged(base, lora, sites):
    """Independent of the library: a and b meet over the rank, whatever order the axes have."""
    whole = dict(base)
    for site in sites:
        names = letters(site.axes)
        a = "".join(n for r in "bi" for n, role in zip(names, site.axes, strict=True) if role == r)
        stacked = "".join(n for n, role in zip(names, site.axes, strict=True) if role == "b")
        kept = "".join(n for n, role in zip(names, site.axes, strict=True) if role == "o")
        factors = lora[site.path]
        delta = jnp.einsum(f"{a}z,{stacked}z{kept}->{names}", factors["a"], factors["b"])
        whole[site.path] = base[site.path].astype(jnp.float64) + site.scale * delta
    return whole


def adapted(program, rank, base, ins, **options):
    config = rl.LoraConfig(rank, alpha=1.5, targets=sorted(base), dtype="float64", **options)
    structs = jax.eval_shape(lambda tree: tree, (base, ins))
    return rl.adapt(interpret(program), *structs, config=config, key=KEY)


def compare(program, rank, seed, **options):
    """Forward and gradients, adapted and merged, in one compilation."""
    rng = np.random.default_rng(seed)
    base = {f"w{k}": numbers(*weight, rng) for k, weight in enumerate(program.weights)}
    ins = inputs(rng)
    params, apply, sites = adapted(program, rank, base, ins, **options)
    lora = jax.tree.map(lambda leaf: numbers(leaf.shape, leaf.dtype, rng), params.lora)
    weight = numbers((TOKENS, WIDTH), "float64", rng)
    assert set(lora) == set(base)

    def loss(function, lora, x):
        out = function(lora, {**ins, "x": x})
        return jnp.vdot(out, weight), out

    def factored(lora, ins):
        return apply(rl.LoraParams(base, lora), ins)

    def whole(lora, ins):
        return interpret(program)(merged(base, lora, sites), ins)

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def both(lora, x):
        return [
            jax.value_and_grad(functools.partial(loss, f), (0, 1), has_aux=True)(lora, x)
            for f in (factored, whole)
        ]

    got, expected = both(lora, ins["x"])
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


RANKS = st.integers(1, 3)
SEEDS = st.integers(0, 2**16)


@settings(max_examples=15, **FIXED)
@given(programs(), RANKS, SEEDS)
def test_every_supported_program_is_adapted_exactly(program, rank, seed):
    for use in program.uses:
        event(f"form: {use.form}")
    with jax.enable_x64(True):
        compare(program, rank, seed)


@settings(max_examples=6, **FIXED)
@given(wild(), RANKS, SEEDS)
def test_a_program_outside_the_rules_is_refused_by_adapt_or_adapted_exactly(program, rank, seed):
    with jax.enable_x64(True):
        try:
            adapted(program, rank, *abstract(program))
        except rl.AdapterError:
            event("refused")
            assume(False)
        event("adapted")
        compare(program, rank, seed)


@settings(max_examples=6, **FIXED)
@given(wild(), RANKS, SEEDS)
def test_merging_the_unsupported_takes_every_program(program, rank, seed):
    with jax.enable_x64(True):
        compare(program, rank, seed, unsupported="merge")


def abstract(program):
    base = {f"w{k}": jax.ShapeDtypeStruct(*w) for k, w in enumerate(program.weights)}
    return base, jax.eval_shape(lambda: inputs(np.random.default_rng(0)))
