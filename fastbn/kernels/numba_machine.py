"""What the Numba kernels need of the compiler and the machine, and Numba has no word for; machine.h is its twin.

How functions are compiled; pointers, arrays on the stack, prefetches and stores past the caches; calls by address.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line

OPTIONS = {"nogil": True, "error_model": "numpy"}
INTERNAL = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
helper = njit(**INTERNAL)
inline = njit(**INTERNAL, inline="always")  # Numba inlines it, with its literals


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


@intrinsic
def zero(typingctx, value):
    """0 in the type of value: a literal 0 would take float32 arithmetic to float64."""
    def codegen(context, builder, signature, args):
        return context.get_constant(value, 0)
    return value(value), codegen


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
def restrict(typingctx):
    """Promises that the pointers passed to the calling function do not overlap (C's restrict); keeps it a function."""
    def codegen(context, builder, signature, args):
        for arg in builder.function.args:
            if isinstance(arg.type, ir.PointerType):
                arg.add_attribute("noalias")
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def wide_vectors(typingctx):
    """Vectors of 512 bits where there are such: LLVM prefers 256, which takes the sums 10 to 20 % longer."""
    def codegen(context, builder, signature, args):
        # llvmlite knows no attributes with a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()
    return types.void(), codegen


def _prefetch(pointer, to_write):
    def codegen(context, builder, signature, args):
        i32, byte_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch")
        builder.call(function, [builder.bitcast(args[0], byte_pointer), i32(to_write), i32(3), i32(1)])
        return context.get_dummy_value()
    return types.void(pointer), codegen


@intrinsic
def prefetch(typingctx, pointer):
    """Asks for the cache line at pointer, which need not be valid."""
    return _prefetch(pointer, 0)


@intrinsic
def prefetch_write(typingctx, pointer):
    """The same for a line that will be written."""
    return _prefetch(pointer, 1)


@intrinsic
def stream_line(typingctx, target, source):
    """Copies LINE bytes past the caches to target, which is aligned to LINE."""
    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(8), LINE).as_pointer()
        value = builder.load(builder.bitcast(args[1], line), align=1)
        store = builder.store(value, builder.bitcast(args[0], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()
    return types.void(target, source), codegen


@intrinsic
def stream_end(typingctx):
    """Orders non-temporal stores before what follows; a thread calls it after its last one."""
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()
    return types.void(), codegen


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


@helper
def copy(target, source, n):
    """memcpy."""
    restrict()
    for i in range(n):
        target[i] = source[i]
