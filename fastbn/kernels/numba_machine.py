"""What the Numba kernels need of the compiler and the machine, and Numba has no word for; machine.h is its twin.

How functions are compiled; pointers, arrays on the stack, prefetches; vectors; calls by address.
"""

import operator

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LINE = 64  # bytes of a cache line
FEATURES = binding.get_host_cpu_features()
AVX2 = bool(FEATURES.get("avx2") and FEATURES.get("fma"))
VECTOR_BYTES = 64 if FEATURES.get("avx512f") else 32 if AVX2 else 16
AMD = binding.get_host_cpu_name().startswith(("amdfam", "btver", "bdver", "znver"))
LOADS_TWO = AMD and bool(FEATURES.get("avx512vp2intersect"))  # vectors a cycle; see machine.h
ZEN3_OR_4 = AMD and bool(FEATURES.get("vpclmulqdq")) and not LOADS_TWO
ZEN4 = ZEN3_OR_4 and VECTOR_BYTES == LINE
# A load waits for a store before it whose address differs by a multiple of this; on a Zen 5 it is not worth going back.
ALIAS_BYTES = 1 << 62 if LOADS_TWO else 4096 if AMD else 1 << 20

OPTIONS = {"nogil": True, "error_model": "numpy"}
INTERNAL = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
helper = njit(**INTERNAL, forceinline=False)  # not even where its caller is to be inlined
inline = njit(**INTERNAL, forceinline=True)   # by LLVM; by Numba the sums of the backward took 29 s, not 10
splice = njit(**INTERNAL, inline="always")    # by Numba: what it has on the stack is its caller's


@intrinsic
def data(typingctx, array):
    """The address of array[0, 0, ...]."""
    def codegen(context, builder, signature, args):
        return context.make_array(signature.args[0])(context, builder, args[0]).data
    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def at(typingctx, pointer, index):
    """The address of pointer[index]."""
    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])
    return pointer(pointer, types.int64), codegen


@intrinsic
def address(typingctx, pointer):
    """The pointer as an integer."""
    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))
    return types.int64(pointer), codegen


@intrinsic(prefer_literal=True)
def local(typingctx, size, pointer):
    """An uninitialised array of `size` elements of the pointer's type (or of the type of a number) on the stack."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    dtype = getattr(pointer, "dtype", pointer)
    def codegen(context, builder, signature, args):
        array = cgutils.alloca_once(builder, context.get_value_type(dtype), size=size.literal_value)
        array.align = LINE  # vectors of coefficients that cross lines took the elementwise passes 17 to 37 % longer
        return array
    return types.CPointer(dtype)(size, pointer), codegen


@intrinsic
def outline(typingctx):
    """Keeps the calling function one: inlined at each call, the loops would be compiled again and again."""
    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def rolled(typingctx):
    """Keeps the loop around it rolled: by eight, LLVM's loop takes longer to enter than short runs take."""
    def codegen(context, builder, signature, args):
        nothing = builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
        nothing.attributes.add("convergent")  # of such a loop there may be no second one for the remainder
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def restrict(typingctx):
    """Promises that the pointers passed to the calling function do not overlap (C's restrict), and keeps it one."""
    def codegen(context, builder, signature, args):
        for arg in builder.function.args:
            if isinstance(arg.type, ir.PointerType):
                arg.add_attribute("noalias")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), codegen


def _prefetch(pointer, to_write=0, locality=3):
    def codegen(context, builder, signature, args):
        i32, byte_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch")
        builder.call(function, [builder.bitcast(args[0], byte_pointer), i32(to_write), i32(locality), i32(1)])
        return context.get_dummy_value()
    return types.void(pointer), codegen


@intrinsic
def prefetch(typingctx, pointer):
    """Asks for the cache line at pointer, which need not be valid."""
    return _prefetch(pointer)


@intrinsic
def prefetch_far(typingctx, pointer):
    """The same into the second cache."""
    return _prefetch(pointer, locality=2)


@intrinsic
def prefetch_write(typingctx, pointer):
    """Asks for a line that will be written."""
    return _prefetch(pointer, to_write=1)


@intrinsic
def stream_end(typingctx):
    """Orders non-temporal stores before what follows; a thread calls it after its last one."""
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()
    return types.void(), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Vectors: of a literal number of elements, in as many registers as that takes. LLVM makes vectors of loops by itself,
# but of short ones scalars, and of the last columns of a row a loop of them.
# ---------------------------------------------------------------------------------------------------------------------

class Vector(types.Type):
    def __init__(self, dtype, size):
        self.dtype = dtype
        self.size = size
        super().__init__(name=f"Vector({dtype}, {size})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.dtype).get_value_type(), vector.size))


def _vector_at(builder, pointer, size):
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, size).as_pointer())


@intrinsic(prefer_literal=True)
def load(typingctx, pointer, size):
    """The vector of `size` elements at pointer."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    def codegen(context, builder, signature, args):
        return builder.load(_vector_at(builder, args[0], size.literal_value), align=pointer.dtype.bitwidth // 8)
    return Vector(pointer.dtype, size.literal_value)(pointer, size), codegen


DOUBLES = max(4, VECTOR_BYTES // 8)  # in a register


@intrinsic(prefer_literal=True)
def load_wide(typingctx, pointer, size):
    """The same in float64. Converted as it is loaded: LLVM would load a whole vector of floats and take it apart."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    n = size.literal_value
    def codegen(context, builder, signature, args):
        parts = []
        for i in range(0, n, min(n, DOUBLES)):
            at_part = builder.gep(args[0], [ir.IntType(64)(i)])
            part = builder.load(_vector_at(builder, at_part, min(n, DOUBLES)), align=pointer.dtype.bitwidth // 8)
            double = ir.VectorType(ir.DoubleType(), part.type.count)
            parts.append(part if part.type == double else builder.fpext(part, double))
        while len(parts) > 1:
            count = 2 * parts[0].type.count
            indices = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
            parts = [builder.shuffle_vector(*pair, indices) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]
    return Vector(types.float64, n)(pointer, size), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx, size):
    """A vector of `size` zeros in float64."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    def codegen(context, builder, signature, args):
        return ir.Constant(ir.VectorType(ir.DoubleType(), size.literal_value), None)
    return Vector(types.float64, size.literal_value)(size), codegen


@intrinsic(prefer_literal=True)
def hidden_ones(typingctx, size):
    """And of ones, of which LLVM does not know that: muladd(x, ones, y) is by the multipliers, in the bits of x + y."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    n = size.literal_value
    def codegen(context, builder, signature, args):
        double, i32 = ir.DoubleType(), ir.IntType(32)
        one = builder.asm(ir.FunctionType(double, [double]), "", "=x,0", [double(1)], side_effect=False)
        vector = builder.insert_element(ir.Constant(ir.VectorType(double, n), ir.Undefined), one, i32(0))
        return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, n), None))
    return Vector(types.float64, n)(size), codegen


@intrinsic
def store(typingctx, pointer, vector):
    """Stores a vector at pointer, register by register from its first one on: left to LLVM, the last would be first."""
    n = min(vector.size, DOUBLES * 64 // vector.dtype.bitwidth)
    def codegen(context, builder, signature, args):
        i32 = ir.IntType(32)
        for i in range(0, vector.size, n):
            part = args[1]
            if n < vector.size:
                part = builder.shuffle_vector(part, part, ir.Constant(ir.VectorType(i32, n), list(range(i, i + n))))
            at_part = builder.gep(args[0], [ir.IntType(64)(i)])
            builder.store(part, _vector_at(builder, at_part, n), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()
    return types.void(pointer, vector), codegen


@intrinsic
def store_past(typingctx, pointer, vector):
    """The same past the caches: whole lines, at a pointer that is aligned to LINE."""
    def codegen(context, builder, signature, args):
        done = builder.store(args[1], _vector_at(builder, args[0], vector.size), align=LINE)
        done.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()
    return types.void(pointer, vector), codegen


def _arithmetic(operation, instruction):
    @infer_global(operation)
    class Arithmetic(AbstractTemplate):
        def generic(self, args, kws):
            return signature(*args[:1], *args) if isinstance(args[0], Vector) and args[0] == args[1] else None

    @lower_builtin(operation, Vector, Vector)
    def lower(context, builder, signature, args):
        return getattr(builder, instruction)(*args)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


@intrinsic
def muladd(typingctx, a, b, c):
    """a * b + c, fused where the processor can: always or never, so that equal arguments give equal bits."""
    def codegen(context, builder, signature, args):
        kind = args[0].type
        function_type = ir.FunctionType(kind, [kind] * 3)
        name = f"llvm.fmuladd.v{a.size}f{a.dtype.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)
    return a(a, b, c), codegen


@intrinsic
def is_off(typingctx, y, relu):
    """The mask of where the activation is off: relu, and y <= 0 (not NaN)."""
    def codegen(context, builder, signature, args):
        mask = builder.fcmp_ordered("<=", args[0], args[0].type(None))
        return builder.select(args[1], mask, mask.type(None))
    return Vector(types.boolean, y.size)(y, types.boolean), codegen


@intrinsic
def cleared(typingctx, mask, vector):
    """0 where the mask is, else the vector."""
    def codegen(context, builder, signature, args):
        return builder.select(args[0], args[1].type(None), args[1])
    return vector(mask, vector), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Calls by address.
# ---------------------------------------------------------------------------------------------------------------------

@intrinsic
def stored(typingctx, value):
    """The address of a copy of value on the stack."""
    def codegen(context, builder, signature, args):
        pointer = cgutils.alloca_once(builder, context.get_data_type(signature.args[0]))
        context.pack_value(builder, signature.args[0], args[0], pointer)
        return builder.ptrtoint(pointer, ir.IntType(64))
    return types.int64(value), codegen


@intrinsic
def loaded(typingctx, pointer):
    """The value at pointer: pointer[0] takes no tuple with a bool."""
    def codegen(context, builder, signature, args):
        return context.unpack_value(builder, signature.return_type, args[0])
    return pointer.dtype(pointer), codegen


@intrinsic
def integer_at(typingctx, address, index):
    """The integer number `index` at an address."""
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))
    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call_at(typingctx, address, part, job):
    """Calls the worker (a C function) at an address."""
    def codegen(context, builder, signature, args):
        byte_pointer = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, byte_pointer])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()),
                     [builder.inttoptr(arg, byte_pointer) for arg in args[1:]])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64), codegen
