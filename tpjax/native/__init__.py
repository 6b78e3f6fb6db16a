"""Our own kernel for CPUs: products of few rows, built from `matvec.cc` by the machine's compiler.

XLA has nothing fast there for bfloat16: it repacks every weight on every call. Without a compiler
its products are used all the same; `ready` says whether, `why_not` why not.
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

from tpjax import env

SOURCE = Path(__file__).with_name("matvec.cc")
TARGET = "tpjax_few_rows"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
SECONDS = 300  # it takes three
MOST_ROWS = 8


def wins(rows: int, dtype) -> bool:
    """Whether it is faster than XLA's product (BENCHMARKS.md, "Few rows on a CPU"): not for one row
    of float32, which XLA reads as fast as the memory goes."""
    if dtype == jnp.bfloat16:
        return rows <= MOST_ROWS
    return dtype == jnp.float32 and 1 < rows <= MOST_ROWS


def few_rows(x_RI: jax.Array, w_OI: jax.Array, devices: int) -> jax.Array:
    """``x @ w.T`` in float32 on one of ``devices``, which share the processors: each has its own
    thread, and more where there are more processors."""
    shape = jax.ShapeDtypeStruct((x_RI.shape[0], w_OI.shape[0]), jnp.float32)
    threads = max(1, _processors() // devices)
    return jax.ffi.ffi_call(TARGET, shape)(x_RI, w_OI, threads=threads)


def _processors() -> int:
    """Those this process may use, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ready() -> bool:
    """Whether the kernel can be used in this process; built, the first time on a machine, and
    loaded."""
    return not why_not()


@functools.cache
def why_not() -> str:
    """Why there is no kernel; empty if there is."""
    if not env.native_kernels():
        return "TPJAX_NATIVE=0 turns it off"
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)})"
    try:
        function = getattr(_library(compiler), TARGET)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not build or load it: {(said.strip().splitlines() or ['?'])[0]}"
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(function), platform="cpu")
    return ""


def _library(compiler: str) -> ctypes.CDLL:
    """The library, from the user's cache if it is there: it is named by all it depends on. Where
    nothing can be kept, every process builds its own."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True
    ).stdout
    about = (SOURCE.read_text(), version, FLAGS, importlib.metadata.version("jaxlib"), _machine())
    name = f"few_rows-{hashlib.sha256(repr(about).encode()).hexdigest()[:20]}.so"
    folder = env.cache_dir() / "native"
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
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(partial)]
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
