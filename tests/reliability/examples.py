"""What the fuzz draws: a call's arguments, most of them right, some wrong; and what each wrong one must raise."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

HAS = {name: importlib.util.find_spec(name) is not None for name in ("pandas", "polars")}
GUARD = 7  # bytes that stand around arrays, to see what is written beside them


@dataclass
class Example:
    given: Any  # x as it is passed
    x: np.ndarray  # its values
    grad_y: Any
    out: Any
    arguments: dict[str, Any]
    in_place: bool
    faults: list[tuple[type[Exception], str]] = field(default_factory=list)  # one of them must be raised


@st.composite
def examples(draw, backends):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    faults: list[tuple[type[Exception], str]] = []
    rarely = st.integers(0, 19).map(lambda i: i == 13)

    def option(right, wrong):
        """One of the right values, or rarely one of the wrong: (value, error, words)."""
        if not draw(rarely):
            return draw(st.sampled_from(right))
        value, error, words = draw(st.sampled_from(wrong))
        faults.append((error, words))
        return value

    x, memory = array(draw, rng, drawn_shape(draw), draw(st.sampled_from(["f4", "f8", "f4", "f8", ">f4", ">f8"])))
    scale, shift = draw(st.sampled_from([(3, 1), (3, -10), (1e-3, 0), (1e3, 1)]))
    x[...] = rng.standard_normal(x.shape) * scale + shift
    given, x = kind_of_x(draw, x, option)
    axis = option([*range(-x.ndim, x.ndim)], [
        (x.ndim, ValueError, "axis must be in"), (-x.ndim - 1, ValueError, "axis must be in"),
        (1.0, TypeError, "axis must be an integer"), (None, TypeError, "axis must be an integer"),
    ])
    at = axis if isinstance(axis, int) and -x.ndim <= axis < x.ndim else 0
    channels = x.shape[at] if x.ndim else 0
    if x.ndim < 2:
        faults.append((ValueError, "x must have at least 2 dimensions"))
    elif x.size == channels > 0:
        faults.append((ValueError, "x must have more than one value per channel"))

    result = np.dtype("f4" if x.dtype.itemsize == 4 else "f8")
    grad_y, _ = array(draw, rng, x.shape, draw(st.sampled_from(["f4", "f8", ">f8", "i2"])))
    grad_y[...] = rng.standard_normal(x.shape) * 4
    out, in_place = output(draw, rng, given, x, memory, result, faults)
    arguments = {
        "gamma": vector(draw, rng, "gamma", channels, option), "beta": vector(draw, rng, "beta", channels, option),
        "axis": axis,
        "eps": option([1e-5, 1e-3, 1, np.float32(0.1)], [
            (-1e-9, ValueError, "eps must be"), (np.nan, ValueError, "eps must be"),
            (np.inf, ValueError, "eps must be"), ("1", TypeError, "eps must be"), (None, TypeError, "eps must be"),
        ]),
        "activation": option([None, "relu"], [
            ("gelu", ValueError, "activation must be"), (1, ValueError, "activation must be"),
        ]),
        "num_threads": option([None, 1, 2, 3, 9], [
            (0, ValueError, "num_threads must be"), (-1, ValueError, "num_threads must be"),
            (2.0, TypeError, "num_threads must be"),
        ]),
        "backend": option(backends, [
            ("cuda", ValueError, "backend must be one of"),
        ]),
    }
    return Example(given, x, grad_y, out, arguments, in_place, faults)


def drawn_shape(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    kind = draw(st.sampled_from(["small"] * 16 + ["empty", "1-D", "rows", "wide"]))
    if kind == "small":
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(2, 70))
    elif kind == "empty":
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return {"1-D": shape[:1], "rows": [700, 23], "wide": [19, 1100]}.get(kind, shape)


def array(draw, rng, shape, dtype):
    """An array of any axis order, steps and alignment, with guarded memory around it; and that memory."""
    dtype = np.dtype(dtype)
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    lengths = [1 + abs(steps[i]) * shape[i] for i in order]
    shift = draw(st.sampled_from([0, 0, 0, 1, 2, 4])) % dtype.itemsize
    memory = np.full(shift + int(np.prod(lengths)) * dtype.itemsize, GUARD, np.uint8)
    whole = np.ndarray(lengths, dtype, memory, shift)
    cut = whole[tuple(slice(None, None, steps[i]) for i in order)][tuple(slice(shape[i]) for i in order)]
    return cut.transpose(np.argsort(order)), memory


def kind_of_x(draw, x, option):
    """x as one of the things that people pass, and its values."""
    kinds = ["itself"] * 12 + ["read-only", "int", "bool", "recarray", "broadcast"]
    if x.size:
        kinds += ["list"]
    if x.ndim == 2 and x.size:
        kinds += ["matrix", *(["pandas", "pandas array"] if HAS["pandas"] else [])]
        kinds += ["polars", "polars array"] if HAS["polars"] else []
    wrong = [(name, TypeError, "x must") for name in ("masked", "c8", "f2", "O", "U5", "g", "m8[s]")]
    kind = option(kinds, wrong)
    if kind == "itself":
        return x, x
    native = x.astype(x.dtype.newbyteorder("="))
    if kind == "read-only":
        x.flags.writeable = False
        return x, x
    if kind in ("int", "bool"):
        native = native.astype(kind)
        return native, native.astype(float)
    if kind == "broadcast":
        view = np.broadcast_to(x[:1], x.shape) if len(x) else x
        return view, view
    if kind == "list":
        return x.tolist(), x.astype(float)
    if kind == "matrix":
        return native.view(np.matrix), native
    if kind == "recarray":
        return x.view(np.recarray), native
    if kind.startswith("pandas"):
        import pandas

        frame = pandas.DataFrame(native)
        return (frame if kind == "pandas" else frame.to_numpy()), native
    if kind.startswith("polars"):
        import polars

        frame = polars.DataFrame(native)
        return (frame if kind == "polars" else frame.to_numpy()), native
    if kind == "masked":
        return np.ma.masked_less(x, 0), x
    return native.astype("i8" if kind == "m8[s]" else native.dtype).astype(kind), x


def vector(draw, rng, name, channels, option):
    """gamma or beta."""
    kind = option(["None", "f4", "f8", ">f8", "i4", "list", "unaligned", "steps"], [
        ("masked", TypeError, f"{name} must not be a masked array"), ("complex", TypeError, f"{name} must be real"),
        ("object", TypeError, f"{name} must be real"), ("long", ValueError, f"{name} must have shape"),
        ("column", ValueError, f"{name} must have shape"),
    ])
    if kind == "None":
        return None
    values = rng.uniform(0.5, 2, channels + (kind == "long"))
    if kind == "list":
        return values.tolist()
    if kind == "unaligned":
        memory = np.empty(values.nbytes + 1, np.uint8)[1:].view(float)
        memory[...] = values
        return memory
    if kind == "steps":
        return np.repeat(values, 2)[::2].astype("f4")
    if kind == "masked":
        return np.ma.array(values)
    if kind == "column":
        return values[:, None]
    return values.astype(kind if kind in ("f4", "f8", ">f8", "i4", "complex", "object") else float)


def output(draw, rng, given, x, memory, dtype, faults):
    """out, and whether it is x itself."""
    kind = draw(st.sampled_from([
        *["None"] * 12, *["own"] * 12, *["itself"] * 6, *["shifted"] * 3,
        "read-only", "dtype", "order", "shape", "masked", "list", "overlaps itself",
    ]))
    own, _ = array(draw, rng, x.shape, dtype)
    if kind == "own":
        return own, False
    if kind == "None":
        return None, False
    if kind == "itself":
        if given is x and x.dtype == dtype and x.dtype.isnative and x.flags.writeable:
            return x, True
        return None, False
    if kind == "shifted":
        return shifted(draw, given, x, memory, dtype, faults), False
    faults.append({"list": (TypeError, "out must be"), "masked": (TypeError, "out must be"),
                   "dtype": (TypeError, "out must have dtype"), "order": (TypeError, "out must have dtype"),
                   "shape": (ValueError, "out must have shape"), "read-only": (ValueError, "out must be writeable"),
                   "overlaps itself": (ValueError, "out must have a place of its own")}[kind])
    if kind == "list":
        return own.tolist(), False
    if kind == "masked":
        return np.ma.array(own), False
    if kind == "dtype":
        return own.astype("f8" if dtype == np.float32 else "f4"), False
    if kind == "order":
        return own.astype(dtype.newbyteorder()), False
    if kind == "shape":
        return np.empty((*x.shape, 1), dtype), False
    if kind == "read-only":
        own.flags.writeable = False
        return own, False
    if x.size < 2:
        faults.pop()
        return None, False
    return np.lib.stride_tricks.as_strided(own, x.shape, [0] * x.ndim), False


def shifted(draw, given, x, memory, dtype, faults):
    """An array in the memory of x, of its strides, which begins some bytes away from it."""
    if given is not x or x.dtype != dtype or not x.dtype.isnative or not x.flags.writeable:
        return None
    shift = draw(st.integers(-6, 6)) * dtype.itemsize // draw(st.sampled_from([1, 1, 1, 2]))
    start, own = memory.ctypes.data, addresses(x)
    if not shift or not own or min(own) + shift < start or max(own) + shift >= start + memory.nbytes:
        return None
    out = np.ndarray(x.shape, dtype, memory, x.ctypes.data - start + shift, x.strides)
    if x.flags.aligned and own & addresses(out):  # an unaligned x is copied, so that its memory may be written to
        faults.append((ValueError, "out must be the input itself or share no memory"))
    return out


def addresses(array):
    """Of each byte."""
    at = np.array(array.ctypes.data)
    for length, stride in zip(array.shape, array.strides, strict=True):
        at = np.add.outer(at, np.arange(length) * stride)
    return {int(address) + byte for address in at.ravel() for byte in range(array.itemsize)}
