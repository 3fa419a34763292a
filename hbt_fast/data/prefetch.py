"""Ask the processor for memory before it is needed, in Numba functions.

Texts of a batch lie anywhere in a token store of gigabytes: a loop that copies them waits for every one. Asked for some
texts ahead, the waits overlap. Measured on 16,384 texts of 80 tokens out of 128 MB: 2.0-2.8 ms instead of 9.7 ms
(texts that are in the cache take 2.0 ms); reading a word of each cache line ahead instead takes 3.5-8 ms.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing import Signature
from numba.core.typing.context import BaseContext as TypingContext
from numba.extending import intrinsic
from numba.np import arrayobj

LINE = 64  # bytes of a cache line


@intrinsic
def prefetch(typing: TypingContext, array: types.Array, index: types.Integer):  # noqa: ANN201
    """`prefetch(array, index)`: element `index` (any number: none is read) of a 1-d array will be read soon."""
    signature = types.void(array, types.int64)

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]):
        data = arrayobj.make_array(signature.args[0])(context, builder, arguments[0]).data
        word, address = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        where = builder.bitcast(builder.gep(data, [arguments[1]]), address)
        builder.call(function, [where, word(0), word(3), word(1)])  # to read; into every cache; it is data
        return context.get_dummy_value()

    return signature, generate
