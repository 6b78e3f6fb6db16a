"""Everything tpjax sets outside itself: the only file that touches environment variables, XLA flags
and jax's configuration. What the user has set is never overridden.

XLA_FLAGS ``--xla_cpu_experimental_ynn_fusion_type=individual_dot``
    Without it every bfloat16 product on a CPU first copies its weights to float32, and float32 ones
    of several rows are slow too: 4 to 40 times (BENCHMARKS.md). Read by the CPU backend only.
platform ``cpu``, if the CUDA plugin is installed but there is no GPU
    Otherwise jax prints a traceback about missing CUDA libraries.
jax's compilation cache in the user's cache directory, on accelerators, whatever the compile time
    It also keeps what was autotuned. Not on a CPU: an executable that comes from there cannot be
    written again, and our own are traced no more either (`tpjax.kept`).
TPJAX_KEPT is only read: 0 keeps no configs, tokenizers and executables of ours, and uses none
    Where jax's cache is turned off or elsewhere, so are our executables. 1 keeps them on
    accelerators too, which nobody has tried yet: there jax's cache answers, after tracing.
XLA_PYTHON_CLIENT_MEM_FRACTION 0.92
    Weights and cache are known in advance; jax's default leaves a quarter of a GPU unused.
TPJAX_NATIVE is only read: 0 turns our own CPU kernel off
    It is built by the machine's C++ compiler, on first use (`tpjax.native`).
TPJAX_GRAPHED_SUMS is only read: 1 puts the sums of decode into its CUDA graphs
    Several GPUs then have two a step, before and after the sampler's branches. XLA by itself cuts
    at every sum, and launches short pieces kernel by kernel. Off until somebody has timed it.
    Only with jaxlib 0.10: later ones sum by kernels that no graph can hold.
TRANSFORMERS_NO_ADVISORY_WARNINGS
    transformers is used without torch on purpose and need not warn about it.
TPU_SKIP_MDS_QUERY, ALLOW_MULTIPLE_LIBTPU_LOAD, to compile for TPUs where there is none
    Their compiler would ask a cloud's server which TPU this is, and run in one process at a time.
the garbage collector's thresholds, in the commands' own processes
    It looks through all that imports have made, again and again (`collect_rarely`).
``sys.modules["torch"]``, in the commands' own processes
    transformers imports torch wherever it is installed, for nothing that tpjax asks of it: 2.6
    seconds and 200 MB at every start.
"""

import contextlib
import gc
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tpjax.errors import UsageError

YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_YNN = f"{YNN_FLAG}=individual_dot"
_FLAG_VERSIONS = ("0.10.", "0.11.")  # an unknown name in XLA_FLAGS aborts the process
# What XLA puts into CUDA graphs: an option replaces jaxlib 0.10's list, by the enum's full names.
_GRAPHS = "xla_gpu_enable_command_buffer"
_GRAPHED = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"
# How XLA orders a CPU's program: to need little memory. By default layers do not share theirs, tens
# of megabytes, new pages to the system at every call (BENCHMARKS.md, "Beside other systems").
_ORDER = "xla_cpu_scheduler_type"
_PLUGIN_NOISE = re.compile(
    rb"cudart_stub|before absl::InitializeLog|^\s*$|computation_placer.*already registered"
)
_started = False


def start(devices: int | None = None) -> None:
    """Prepare jax and start its backends, once. ``devices`` forces that many CPU devices.

    Call before the first use of jax; afterwards flags no longer have an effect.
    """
    global _started
    if _started:
        return
    _started = True
    on_cpu = devices is not None or not has_accelerator()
    flags = os.environ.get("XLA_FLAGS", "")
    theirs = flags.replace(_YNN, "").strip()  # a parent process may have left ours
    from importlib.metadata import version  # 20 ms, which a wrong option need not wait for

    known = version("jaxlib").startswith(_FLAG_VERSIONS)
    if on_cpu and known and YNN_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA aborts on a wrong flag of the user's, and what it says then must be seen.
    with contextlib.nullcontext() if theirs or not on_cpu else _without_plugin_noise():
        import jax

        if on_cpu:
            jax.config.update("jax_platforms", "cpu")
        if devices is not None:
            jax.config.update("jax_num_cpu_devices", devices)
        if not on_cpu:
            _cache_executables(jax.config)
        jax.devices()


def _cache_executables(config) -> None:
    if config.jax_compilation_cache_dir:
        return
    folder = cache_dir() / "xla"
    if not _can_be_written(folder):  # a read-only home: jax would warn at every program
        return
    config.update("jax_compilation_cache_dir", str(folder))
    for option, value in (
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if option.upper() not in os.environ:
            config.update(option, value)


def compile_for_tpus() -> None:
    """Prepare for a TPU's compiler, before it is loaded."""
    if not has_accelerator():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def caches_executables() -> bool:
    """Whether what is compiled now will be found on disk next time."""
    import jax

    config: Any = jax.config
    folder = kept_executables_dir(jax.default_backend())
    there = folder is not None and _can_be_written(folder)
    return there or bool(config.jax_compilation_cache_dir) and config.jax_enable_compilation_cache


def without_executable_cache() -> None:
    """Build everything anew: for measuring how long that takes."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def leave_torch_out() -> None:
    """Make torch look absent, in a process in which nobody else wants it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def collect_rarely() -> None:
    """Look for cycles of garbage a hundred times less often, in a process of our own: imports and
    tracing make many objects that stay, and looking through them is an eighth of a start."""
    gc.set_threshold(100_000, 50, 100)


def let_torch_in() -> None:
    """Undo `leave_torch_out`, for who needs it after all."""
    if sys.modules.get("torch", sys) is None:
        del sys.modules["torch"]


def has_accelerator() -> bool:
    """Whether jax will find a GPU or TPU here, told without starting it: the device is there, jax's
    plugin for it is installed, and the user has not turned either off."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    nvidia = any(Path(n).exists() for n in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))
    nvidia &= os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    other = any(Path(n).exists() for n in ("/dev/kfd", "/dev/accel0", "/dev/vfio/0"))
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return (nvidia or other) and plugins


def cpu_devices_chosen() -> bool:
    """Whether the user has already said how many CPU devices there are to be."""
    flag = "xla_force_host_platform_device_count"
    return "JAX_NUM_CPU_DEVICES" in os.environ or flag in os.environ.get("XLA_FLAGS", "")


def native_kernels() -> bool:
    """Whether kernels of our own may be built and used: not if the user sets TPJAX_NATIVE=0."""
    return os.environ.get("TPJAX_NATIVE") != "0"


def compiler_options(platform: str, kind: str, devices: int) -> dict[str, str | bool]:
    """XLA's options for one executable, beside its defaults: of a kind of step, on so many devices.
    Raises UsageError for what this jaxlib, or what the user has set, does not go with."""
    if platform == "cpu" and _ORDER not in os.environ.get("XLA_FLAGS", ""):
        return {_ORDER: "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    sums = platform == "gpu" and kind == "decode" and devices > 1
    if not sums or os.environ.get("TPJAX_GRAPHED_SUMS") != "1":
        return {}
    from importlib.metadata import version

    if not (jaxlib := version("jaxlib")).startswith("0.10."):
        raise UsageError(f"TPJAX_GRAPHED_SUMS=1 needs jaxlib 0.10, this is {jaxlib}: unset it")
    if _GRAPHS in os.environ.get("XLA_FLAGS", ""):
        raise UsageError(f"TPJAX_GRAPHED_SUMS=1 and {_GRAPHS} in XLA_FLAGS: set one of them")
    return {_GRAPHS: f"{_GRAPHED},COLLECTIVES"}


def with_cache(folder: Path) -> dict[str, str]:
    """The environment of another process of ours, whose cache is there and nowhere else."""
    gone = ("TPJAX_KEPT", "JAX_COMPILATION_CACHE_DIR")
    return {k: v for k, v in os.environ.items() if k not in gone} | {"XDG_CACHE_HOME": str(folder)}


def kept_dir() -> Path | None:
    """Where configs are kept between starts; None if the user sets TPJAX_KEPT=0."""
    return None if os.environ.get("TPJAX_KEPT") == "0" else cache_dir() / "kept"


def kept_executables_dir(platform: str) -> Path | None:
    """Where our executables are kept; None where they are not, or jax's cache is on no disk."""
    import jax

    config: Any = jax.config
    theirs = config.jax_compilation_cache_dir
    if kept_dir() is None or not config.jax_enable_compilation_cache or "://" in (theirs or ""):
        return None
    if platform != "cpu" and os.environ.get("TPJAX_KEPT") != "1":
        return None
    return Path(theirs) / "tpjax" if theirs else kept_dir()


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def jax_settings() -> list[tuple[str, str]]:
    """What the environment and jax's configuration may change about an executable."""
    import jax

    config: Any = jax.config
    beside = ("cache", "log", "trace", "dump", "debug", "pprint", "tracer", "proxy")
    named = [(k, repr(v)) for k, v in config.values.items() if not any(w in k for w in beside)]
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPJAX_NATIVE")
    return sorted(named) + [(flag, os.environ.get(flag, "")) for flag in flags]


def cache_dir() -> Path:
    """The user's cache directory for tpjax."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tpjax"


@contextlib.contextmanager
def _without_plugin_noise():
    """Hold back what loading CUDA's plugin prints on a machine without CUDA (the C++ library writes
    to the descriptor before any log level applies); everything else is passed on."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not _PLUGIN_NOISE.search(line):
                    os.write(2, line)
