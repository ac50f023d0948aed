"""CPU kernels, C beside this file: what a step does between its matrix products. Tensors in, tensors out.

They run in torch's own threads, through `GOMP_parallel`, which libgomp and libiomp5 both export: a second
pool would compete for the cores with torch's, which spins between two operations. Without the library (no C
compiler where this was installed) torch's operations compute the same. Shapes: `N` flat tokens, `R` tokens of
decoding sequences, `T` tokens of a chunk, `H` query heads, `K` key-value heads, `D` head dim, `d` rotary
dims, `P` positions of an arena, `A` adapter slots, `M` merged modules, `r` LoRA rank. Does not know models.
Start at `Kernels.find`.
"""

import ctypes
import zlib
from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libkernels.so")
"""Built when the project is installed (hatch_build.py)."""
PARALLEL = "GOMP_parallel"
"""(function, argument, threads, flags): what a compiler makes of `#pragma omp parallel`."""
WIDTH = 16
"""Sizes have to be multiples of this."""
MAX_TOKENS = 4
"""The most that `multiply` takes."""
TASKS_PER_THREAD = 2
"""Of a weight's outputs: long, to be streamed, and one more in case a core is busy."""
SMALL = 1 << 14
"""Numbers that one thread handles sooner than several threads have begun."""


def checksum() -> int:
    """Return what a library built from the sources beside this has as `built_from` (hatch_build.py)."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]"))))


def _layout(pointers: str, sizes: str, *, real: str | None = None) -> list[tuple[str, type]]:
    """Return the members of a job in the order that all of them have in C."""
    members: list[tuple[str, type]] = [(name, c_void_p) for name in pointers.split()]
    members += [(name, c_int64) for name in sizes.split()]
    members += [(real, c_float)] if real else []
    return [*members, ("next", c_int64)]


class _Multiply(Structure):
    _fields_ = _layout("x weight bias out", "tokens in_features out_features task_outputs")


class _AttendDecode(Structure):
    _fields_ = _layout(
        "query keys values out starts lengths",
        "tokens kv_heads group dim query_stride position_stride head_stride",
        real="scaling",
    )


class _AttendChunk(Structure):
    _fields_ = _layout(
        "query keys values out",
        "tokens first heads kv_heads dim query_stride position_stride head_stride window",
        real="scaling",
    )


class _Rotate(Structure):
    _fields_ = _layout(
        "qkv cos sin keys values stores",
        "tokens heads kv_heads dim rotary_dim position_stride head_stride",
    )


class _Norm(Structure):
    _fields_ = _layout("hidden update weight out", "tokens features", real="epsilon")


class _Gate(Structure):
    _fields_ = _layout("gate_up out", "tokens features")


class _AddLora(Structure):
    _fields_ = _layout(
        "x out adapters down ups out_features", "tokens modules adapter_stride rank in_features"
    )


class Kernels:
    """The compiled kernels, for float32 in a CPU's memory."""

    def __init__(self, library: Path, parallel: Callable[..., None]) -> None:
        """`parallel` is `GOMP_parallel` of the library that torch computes with."""
        functions = ctypes.PyDLL(str(library))  # keeps the interpreter's lock: what one thread does is short
        if ctypes.c_uint32.in_dll(functions, "built_from").value != checksum():
            raise OSError(f"{library} was built from other sources")
        names = ("multiply", "attend_decode", "attend_chunk", "rotate", "norm", "gate", "add_lora")
        self._functions = {name: getattr(functions, name) for name in names}
        self._addresses = {name: ctypes.cast(each, c_void_p).value for name, each in self._functions.items()}
        self._parallel, self._threads = parallel, torch.get_num_threads()

    @classmethod
    def find(cls) -> "Kernels | None":
        """Return the kernels, or None: not built from these sources, or torch has another kind of threads."""
        torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        try:
            parallel = getattr(
                ctypes.CDLL(str(torch_library)), PARALLEL
            )  # found in what torch itself links to
            parallel.argtypes, parallel.restype = (c_void_p, c_void_p, ctypes.c_uint, ctypes.c_uint), None
            return cls(LIBRARY, parallel)
        except (OSError, AttributeError, ValueError):  # no library, no function, no `built_from`
            return None

    def run(self, name: str, job: Any, *, tasks: int, size: int) -> None:
        """Run a kernel over `job`, whose `tasks` handle `size` numbers together."""
        if tasks == 1 or size < SMALL:
            self._functions[name](ctypes.byref(job))
        else:
            self._parallel(self._addresses[name], ctypes.addressof(job), min(self._threads, tasks), 0)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (…, in) times weight (out, in), plus bias, for at most MAX_TOKENS tokens."""
        outputs, size = weight.shape
        out, tokens = x.new_empty(*x.shape[:-1], outputs), x.numel() // size
        task_outputs = -(-outputs // (TASKS_PER_THREAD * self._threads))
        bias_at = bias.data_ptr() if bias is not None else None
        job = _Multiply(
            x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), tokens, size, outputs, task_outputs, 0
        )
        self.run("multiply", job, tasks=outputs, size=outputs * size)
        return out

    def attention(
        self, keys: Tensor, values: Tensor, *, scaling: float, window: int | None
    ) -> "AttentionKernel":
        """Return rotation and attention over a layer's keys and values (P, K, D), which stay in place."""
        return AttentionKernel(self.run, keys, values, scaling=scaling, window=window)

    def norm(self, hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add `update` to `hidden` (…, features) in place, and return its RMS norm times weight."""
        out, size = torch.empty_like(hidden), hidden.shape[-1]
        tokens = hidden.numel() // size
        update_at = update.data_ptr() if update is not None else None
        job = _Norm(hidden.data_ptr(), update_at, weight.data_ptr(), out.data_ptr(), tokens, size, epsilon, 0)
        self.run("norm", job, tasks=tokens, size=hidden.numel())
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up (…, features) for the two side by side in gate_up (…, 2 features)."""
        size = gate_up.shape[-1] // 2
        out, tokens = gate_up.new_empty(*gate_up.shape[:-1], size), gate_up.numel() // size // 2
        job = _Gate(gate_up.data_ptr(), out.data_ptr(), tokens, size, 0)
        self.run("gate", job, tasks=tokens, size=gate_up.numel())
        return out

    def lora(self, down: Tensor, ups: Sequence[Tensor]) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Return what adds updates of M merged modules, by `down` (A, M, r, in) and an up (A, r, out) each.

        All of them have the stride of their first dimension in common. It is called with x (N, in), the
        outputs to add to (N, sum of outs), and adapters (T,): the adapter slot of each of the first T tokens,
        0 for none.
        """
        _, modules, rank, size = down.shape
        pointers = (c_void_p * modules)(*(up.data_ptr() for up in ups))
        out_features = (c_int64 * modules)(*(up.shape[-1] for up in ups))
        job = _AddLora(
            down=down.data_ptr(), ups=ctypes.addressof(pointers), out_features=ctypes.addressof(out_features),
            modules=modules, adapter_stride=down.stride(0), rank=rank, in_features=size,
        )  # fmt: skip
        numbers = rank * (modules * size + sum(out_features))
        job.kept = (down, tuple(ups), pointers, out_features)  # what it points to

        def add(x: Tensor, out: Tensor, adapters: Tensor) -> None:
            job.x, job.out, job.adapters, job.next = x.data_ptr(), out.data_ptr(), adapters.data_ptr(), 0
            job.tokens = tokens = adapters.numel()
            self.run("add_lora", job, tasks=tokens, size=tokens * numbers)

        return add


class AttentionKernel:
    """Rotation and attention of one layer; its jobs are kept, and a call fills in what differs."""

    __slots__ = (
        "_chunk",
        "_decode",
        "_dim",
        "_keys",
        "_kv_heads",
        "_position_bytes",
        "_rotate",
        "_run",
        "_tensors",
        "_values",
    )

    def __init__(
        self,
        run: Callable[..., None],
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> None:
        """`run` is `Kernels.run`; keys, values (P, K, D); a chunk's tokens see `window` positions or all."""
        self._run, self._tensors = run, (keys, values)  # kept, because the jobs hold their addresses
        _, self._kv_heads, self._dim = keys.shape
        self._keys, self._values = keys.data_ptr(), values.data_ptr()
        position_stride, head_stride, _ = keys.stride()
        self._position_bytes = position_stride * keys.itemsize
        sizes = {"kv_heads": self._kv_heads, "dim": self._dim}
        sizes |= {"position_stride": position_stride, "head_stride": head_stride}
        layer = {"keys": self._keys, "values": self._values}
        self._decode = _AttendDecode(**sizes, **layer, scaling=scaling)
        self._chunk = _AttendChunk(**sizes, window=window or 0, scaling=scaling)
        self._rotate = _Rotate(**sizes, **layer)

    def decode(self, query: Tensor, out: Tensor, *, starts: Tensor, lengths: Tensor, reads: int) -> None:
        """Write the attention of the first R tokens of query (N, H, D) into out, alike.

        Each token reads `lengths` (R,) positions from `starts` (R or more,) on, both int32, `reads` in all.
        """
        heads = query.shape[1]
        if query.stride()[1:] != (self._dim, 1):
            query = query.contiguous()
        job = self._decode
        job.query, job.out, job.query_stride = query.data_ptr(), out.data_ptr(), query.stride(0)
        job.starts, job.lengths, job.next = starts.data_ptr(), lengths.data_ptr(), 0
        job.tokens, job.group = (tokens := lengths.numel()), heads // self._kv_heads
        self._run(
            "attend_decode", job, tasks=tokens * self._kv_heads, size=2 * self._dim * self._kv_heads * reads
        )

    def chunk(self, query: Tensor, out: Tensor, *, start: int, length: int) -> None:
        """Write the attention of a chunk's query (T, H, D) into out, alike.

        The tokens are the last of the `length` positions from `start` on; each sees those up to itself.
        """
        tokens, heads, dim = query.shape
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        job, at = self._chunk, start * self._position_bytes
        job.query, job.out, job.query_stride = query.data_ptr(), out.data_ptr(), query.stride(0)
        job.keys, job.values = self._keys + at, self._values + at
        job.tokens, job.first, job.heads, job.next = tokens, length - tokens, heads, 0
        tasks = heads * (-(-tokens // WIDTH))
        self._run("attend_chunk", job, tasks=tasks, size=2 * dim * heads * tokens * length)

    def rotate(self, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], *, stores: Tensor) -> None:
        """Rotate the queries in qkv (N, H + 2 K, D) in place, the keys into the arena; values follow.

        `cos_sin`: both (1, N, d), the first d dims, halves paired (arXiv:2104.09864). `stores` (N,) int64
        are the positions of the arena where the tokens belong.
        """
        tokens, heads, _ = qkv.shape
        cos, sin = (each.contiguous() for each in cos_sin)
        job = self._rotate
        job.qkv, job.cos, job.sin = qkv.data_ptr(), cos.data_ptr(), sin.data_ptr()
        job.stores, job.next = stores.data_ptr(), 0
        job.tokens, job.heads, job.rotary_dim = tokens, heads - 2 * self._kv_heads, cos.shape[-1]
        self._run("rotate", job, tasks=tokens, size=qkv.numel())
