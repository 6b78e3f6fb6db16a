"""Our own kernels for CPUs, built by the machine's compiler: products (`product.cc`) and
attention over the cache (`attend.cc`).

XLA has nothing fast there for bfloat16: it repacks every weight on every call, and widens what it
reads of the cache. With float32 it cannot read a matrix of bfloat16, and is a little slower.
Without a compiler it is used all the same; `ready` says whether, `why_not` why not.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tpjax import env

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("product.cc", "attend.cc")]
PRODUCT, ATTEND = "tpjax_product", "tpjax_attend"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
SECONDS = 300  # it takes ten
LARGE = 1 << 21  # weights on one device


def wins(rows: int, dtype, held, weights: int) -> bool:
    """Whether `product` is there and faster than XLA's (BENCHMARKS.md, "Products on a CPU"), for
    rows of ``dtype`` and so many weights, which are ``held`` in the same or in bfloat16. One row of
    float32 XLA reads as fast where the matrix is small."""
    if dtype not in (jnp.bfloat16, jnp.float32) or held not in (jnp.bfloat16, dtype) or not ready():
        return False
    return held == jnp.bfloat16 or rows > 1 or weights >= LARGE


def product(x_RI: jax.Array, w_EOI: jax.Array, which: int | jax.Array, devices: int) -> jax.Array:
    """``x @ w[which].T`` in float32 on one of ``devices``, which share the processors: each has its
    own thread, and more where there are more processors. No matrix is copied or widened whole."""
    shape = jax.ShapeDtypeStruct((x_RI.shape[0], w_EOI.shape[1]), jnp.float32)
    number = jnp.asarray(which, jnp.int32)
    return jax.ffi.ffi_call(PRODUCT, shape)(x_RI, w_EOI, number, threads=_threads(devices))


def attends(dtype) -> bool:
    """Whether `attend` is there, for this dtype."""
    return dtype in (jnp.bfloat16, jnp.float32) and ready()


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    start_B: jax.Array,
    devices: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """`tpjax.ops.attention_ref.attend` of T new tokens from position ``start`` on, in float32
    throughout, on one of ``devices``. Reads the positions that a sequence has, and no others; a
    cache of bfloat16 is given as integers of its bits."""
    call = jax.ffi.ffi_call(ATTEND, jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32))
    about = {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0.0),
        "window": window or 0,
        "threads": _threads(devices),
    }
    return call(q_BTNH, k_BKSH, v_BKSH, start_B, **about).astype(q_BTNH.dtype)


def _threads(devices: int) -> int:
    return max(1, _processors() // devices)


def _processors() -> int:
    """Those this process may use, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ready() -> bool:
    """Whether the kernel can be used in this process; built, the first time on a machine, and
    loaded."""
    return not why_not()


def identity() -> tuple[str, str, int]:
    """What a program for CPUs depends on beside its own text: which kernels of ours it calls, the
    processor, and how many of them share the work."""
    compiler = _compiler()
    return why_not() or _name(compiler or ""), _machine(), _processors()


@functools.cache
def why_not() -> str:
    """Why there is no kernel; empty if there is."""
    if not env.native_kernels():
        return "TPJAX_NATIVE=0 turns it off"
    compiler = _compiler()
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)})"
    try:
        library = _library(compiler)
        functions = {name: getattr(library, name) for name in (PRODUCT, ATTEND)}
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not build or load it: {(said.strip().splitlines() or ['?'])[0]}"
    for name, function in functions.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return ""


@functools.cache
def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


@functools.cache
def _name(compiler: str) -> str:
    """What the library is called: by all it depends on."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True
    ).stdout
    text = [file.read_text() for file in (*SOURCES, *sorted(FOLDER.glob("*.h")))]
    about = (text, version, FLAGS, importlib.metadata.version("jaxlib"), _machine())
    return f"kernels-{hashlib.sha256(repr(about).encode()).hexdigest()[:20]}.so"


def _library(compiler: str) -> ctypes.CDLL:
    """The library, from the user's cache if it is there. Where nothing can be kept, every process
    builds its own."""
    name, folder = _name(compiler), env.cache_dir() / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = os.access(folder, os.W_OK) or (folder / name).exists()
    except OSError:
        kept = False
    if kept:
        if not (folder / name).exists():
            _build(compiler, folder / name)
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(prefix="tpjax-native-") as passing:
        _build(compiler, Path(passing) / name)
        return ctypes.CDLL(str(Path(passing) / name))  # stays mapped when the file is gone


def _build(compiler: str, file: Path) -> None:
    """Compile it; the file appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    sources = map(str, SOURCES)
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(partial)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _machine() -> str:
    """What the compiler builds for, and what runs it: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {about}"
