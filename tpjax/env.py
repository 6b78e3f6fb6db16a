"""Everything tpjax sets outside itself: the only file that touches environment variables, XLA flags
and jax's configuration. What the user has set is never overridden.

XLA_FLAGS ``--xla_cpu_experimental_ynn_fusion_type=individual_dot``
    Without it every bfloat16 product on a CPU first copies its weights to float32: 0.6 to 1.9 GB/s
    instead of 14 or more (BENCHMARKS.md). Read by the CPU backend only.
platform ``cpu``, if the CUDA plugin is installed but there is no GPU
    Otherwise jax prints a traceback about missing CUDA libraries.
compilation cache in the user's cache directory, whatever the compile time
    The second start of a model compiles nothing.
XLA_PYTHON_CLIENT_MEM_FRACTION 0.92
    Weights and cache are known in advance; jax's default leaves a quarter of a GPU unused.
TRANSFORMERS_NO_ADVISORY_WARNINGS
    transformers is used without torch on purpose and need not warn about it.
"""

import contextlib
import importlib.metadata
import os
import re
import sys
import tempfile
from pathlib import Path

YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_FLAG_VERSIONS = ("0.10.", "0.11.")  # an unknown name in XLA_FLAGS aborts the process
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
    flags = os.environ.get("XLA_FLAGS", "")
    if YNN_FLAG not in flags and importlib.metadata.version("jaxlib").startswith(_FLAG_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_FLAG}=individual_dot".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with _without_plugin_noise():
        import jax

        if devices is not None:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", devices)
        elif not getattr(jax.config, "jax_platforms", None) and not has_accelerator():
            jax.config.update("jax_platforms", "cpu")
        if not getattr(jax.config, "jax_compilation_cache_dir", None):
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.devices()


def has_accelerator() -> bool:
    """Whether this machine shows a GPU or TPU, told without starting jax."""
    nodes = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0", "/dev/dxg")
    return any(Path(node).exists() for node in nodes)


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
