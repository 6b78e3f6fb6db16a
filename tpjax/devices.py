"""Which devices a command runs on, from its options."""

import argparse
from collections.abc import Callable

from tpjax import env
from tpjax.errors import UsageError

DEFAULT_CPU_DEVICES = 4
MOST = 512  # more than one process drives; forced CPU devices cost memory and threads


def start_devices(args: argparse.Namespace) -> None:
    """Start jax on the devices asked for: accelerators if there are any, else forced CPU devices,
    as many as the mesh needs or four."""
    tensor, data = args.tensor_parallel_size, args.data_parallel_size
    for name, size in (
        ("--tensor-parallel-size", tensor),
        ("--data-parallel-size", data),
        ("--devices", args.devices),
    ):
        if size is not None and not 1 <= size <= MOST:
            raise UsageError(f"{name} {size}: must be between 1 and {MOST}")
    devices = args.devices
    if devices is None and not env.has_accelerator() and not env.cpu_devices_chosen():
        devices = (tensor or DEFAULT_CPU_DEVICES) * (data or 1)
    env.start(devices)


def choose_degree(args: argparse.Namespace, config, say: Callable[[str], None]) -> int:
    """The tensor degree asked for, or the largest this model allows on all devices."""
    if args.tensor_parallel_size is not None:
        return args.tensor_parallel_size
    import jax

    from tpjax.parallel.mesh import allowed_degrees

    each = max(1, len(jax.devices()) // (args.data_parallel_size or 1))
    degree = max(d for d in allowed_degrees(config) if d <= each)
    if degree < each:
        say(f"using {degree} of {each} devices: heads={config.heads} cannot be split further")
    return degree
