"""What a step on a CPU does between its matrix products: the C beside this, called in torch's own threads.

A second team of threads would fight torch's, which spins between two operations, for the cores. So these
run in torch's, through `GOMP_parallel`, which libgomp and libiomp5 both export. Without the library (no C
compiler where this was installed) torch's operations compute the same. Shapes: `N` flat tokens, `R` decoding
ones, `H` query heads, `K` key-value heads, `D` head dim. Does not know models. Start at `Kernels.find`.
"""

import ctypes
import zlib
from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from runtime.serving.engine.attention import AttentionLayer
    from runtime.serving.engine.batch import Batch, SlotChunk

LIBRARY = Path(__file__).with_name("libkernels.so")
"""Built when the project is installed (hatch_build.py)."""
TEAM = "GOMP_parallel"
"""(function, argument, threads, flags): what a compiler makes of `#pragma omp parallel`."""
WIDTH = 16
"""Sizes have to be multiples of this."""
MOST_TOKENS = 4
"""That `multiply` takes."""
PARTS = 2
"""Parts of a weight for each thread: long, to be streamed, and one more in case a core is busy."""
SMALL = 1 << 14
"""Numbers that one thread handles sooner than a team of them begins."""


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
    _fields_ = _layout("x weight bias out", "tokens size outs part")


class _Attend(Structure):
    _fields_ = _layout(
        "query keys values out slots places",
        "tokens groups queries dim query_stride slot_stride head_stride window",
        real="scaling",
    )


class _AttendChunk(Structure):
    _fields_ = _layout(
        "query keys values out",
        "tokens start heads groups dim query_stride head_stride window",
        real="scaling",
    )


class _Turn(Structure):
    _fields_ = _layout(
        "mixed cosines sines keys values slots places",
        "tokens heads groups dim turned slot_stride head_stride",
    )


class _Norm(Structure):
    _fields_ = _layout("hidden update weight out", "tokens size", real="epsilon")


class _Gate(Structure):
    _fields_ = _layout("mixed out", "tokens size")


class _Adapt(Structure):
    _fields_ = _layout("x out lanes down ups outs", "tokens parts resident rank size")


class Kernels:
    """The compiled kernels, for float32 in a CPU's memory."""

    def __init__(self, library: Path, team: Callable[..., None]) -> None:
        """`team` is `GOMP_parallel` of the library that torch computes with."""
        functions = ctypes.PyDLL(str(library))  # keeps the interpreter's lock: what one thread does is short
        if ctypes.c_uint32.in_dll(functions, "built_from").value != checksum():
            raise OSError(f"{library} was built from other sources")
        self._functions = {
            name: getattr(functions, name)
            for name in ("multiply", "attend", "attend_chunk", "turn", "norm", "gate", "adapt")
        }
        self._addresses = {name: ctypes.cast(each, c_void_p).value for name, each in self._functions.items()}
        self._team, self._threads = team, torch.get_num_threads()

    @classmethod
    def find(cls) -> "Kernels | None":
        """Return the kernels, or None: not built from these sources, or torch has another kind of threads."""
        torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        try:
            team = getattr(ctypes.CDLL(str(torch_library)), TEAM)  # looked up in what torch itself links to
            team.argtypes, team.restype = (c_void_p, c_void_p, ctypes.c_uint, ctypes.c_uint), None
            return cls(LIBRARY, team)
        except (OSError, AttributeError, ValueError):  # no library, no function, no `built_from`
            return None

    def _run(self, name: str, job: Any, *, tasks: int, size: int) -> None:
        """Run a kernel over `job`, whose `tasks` handle `size` numbers together."""
        if tasks == 1 or size < SMALL:
            self._functions[name](ctypes.byref(job))
        else:
            self._team(self._addresses[name], ctypes.addressof(job), min(self._threads, tasks), 0)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (…, in) times weight (out, in), plus bias, for at most MOST_TOKENS tokens."""
        outs, size = weight.shape
        out, tokens = x.new_empty(*x.shape[:-1], outs), x.numel() // size
        part = -(-outs // (PARTS * self._threads))
        added = bias.data_ptr() if bias is not None else None
        job = _Multiply(x.data_ptr(), weight.data_ptr(), added, out.data_ptr(), tokens, size, outs, part, 0)
        self._run("multiply", job, tasks=outs, size=outs * size)
        return out

    def attend(self, query: Tensor, layer: "AttentionLayer", batch: "Batch", out: Tensor) -> None:
        """Write the attention of the first R tokens of query (N, H, D) over their slots into out, alike."""
        rows, heads, dim = batch.decodes, query.shape[1], query.shape[2]
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        keys, groups = layer.keys, layer.keys.shape[1]
        job = _Attend(
            query.data_ptr(), keys.data_ptr(), layer.values.data_ptr(), out.data_ptr(),
            batch.slots.data_ptr(), batch.places.data_ptr(),
            rows, groups, heads // groups, dim, query.stride(0),
            keys.stride(0), keys.stride(1), layer.window or 0, layer.scaling, 0,
        )  # fmt: skip
        self._run(
            "attend",
            job,
            tasks=rows * groups,
            size=2 * dim * groups * sum(r.count * r.longest for r in batch.runs),
        )

    def attend_chunk(self, query: Tensor, layer: "AttentionLayer", piece: "SlotChunk", out: Tensor) -> None:
        """Write the attention of a chunk's query (T, H, D), each token up to itself, into out, alike."""
        tokens, heads, dim = query.shape
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        keys, values = layer.keys[piece.slot], layer.values[piece.slot]
        job = _AttendChunk(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            tokens, piece.start, heads, keys.shape[0], dim, query.stride(0), keys.stride(0),
            layer.window or 0, layer.scaling, 0,
        )  # fmt: skip
        tasks = heads * (-(-tokens // WIDTH))
        self._run("attend_chunk", job, tasks=tasks, size=2 * dim * heads * tokens * (piece.start + tokens))

    def turn(
        self, mixed: Tensor, angles: tuple[Tensor, Tensor], layer: "AttentionLayer", batch: "Batch"
    ) -> None:
        """Rotate the queries in mixed (N, H + 2 K, D) in place, the keys into their slots; values follow.

        `angles`: cos and sin (1, N, d), the first d dims, halves paired (arXiv:2104.09864).
        """
        tokens, heads, dim = mixed.shape
        cosines, sines = (angle.contiguous() for angle in angles)
        keys, groups = layer.keys, layer.keys.shape[1]
        job = _Turn(
            mixed.data_ptr(), cosines.data_ptr(), sines.data_ptr(), keys.data_ptr(), layer.values.data_ptr(),
            batch.slots.data_ptr(), batch.positions.data_ptr(),
            tokens, heads - 2 * groups, groups, dim, cosines.shape[-1], keys.stride(0), keys.stride(1), 0,
        )  # fmt: skip
        self._run("turn", job, tasks=tokens, size=mixed.numel())

    def norm(self, hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add `update` to `hidden` (…, size) in place, and return its RMS norm times weight."""
        out, size = torch.empty_like(hidden), hidden.shape[-1]
        tokens = hidden.numel() // size
        added = update.data_ptr() if update is not None else None
        job = _Norm(hidden.data_ptr(), added, weight.data_ptr(), out.data_ptr(), tokens, size, epsilon, 0)
        self._run("norm", job, tasks=tokens, size=hidden.numel())
        return out

    def gate(self, mixed: Tensor) -> Tensor:
        """Return silu(a) * b (…, size) for a and b side by side in mixed (…, 2 size)."""
        size = mixed.shape[-1] // 2
        out, tokens = mixed.new_empty(*mixed.shape[:-1], size), mixed.numel() // size // 2
        job = _Gate(mixed.data_ptr(), out.data_ptr(), tokens, size, 0)
        self._run("gate", job, tasks=tokens, size=mixed.numel())
        return out

    def adapt(self, down: Tensor, ups: Sequence[Tensor]) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Return what adds LoRA updates of n parts by `down` (n, A, r, in) and an up (A, r, out) of each.

        It is called with x (N, in), what to add to (N, sum of outs), and lanes (T,): the adapters of the
        first T tokens, -1 for none.
        """
        parts, resident, rank, size = down.shape
        pointers = (c_void_p * parts)(*(up.data_ptr() for up in ups))
        outs = (c_int64 * parts)(*(up.shape[-1] for up in ups))
        job = _Adapt(
            down=down.data_ptr(), ups=ctypes.addressof(pointers), outs=ctypes.addressof(outs),
            parts=parts, resident=resident, rank=rank, size=size,
        )  # fmt: skip
        numbers = rank * (parts * size + sum(outs))
        job.kept = (down, tuple(ups), pointers, outs)  # what it points to

        def add(x: Tensor, out: Tensor, lanes: Tensor) -> None:
            job.x, job.out, job.lanes, job.next = x.data_ptr(), out.data_ptr(), lanes.data_ptr(), 0
            job.tokens = tokens = lanes.numel()
            self._run("adapt", job, tasks=tokens, size=tokens * numbers)

        return add
