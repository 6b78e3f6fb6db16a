"""Which devices a command runs on, from its options."""

import argparse

from tpjax import env
from tpjax.errors import UsageError

DEFAULT_CPU_DEVICES = 4
MOST = 512  # more than one process drives; forced CPU devices cost memory and threads


def check_sizes(args: argparse.Namespace) -> None:
    """Raise UsageError for a size no mesh can have. Options that a command lacks are not asked."""
    for name in ("tensor_parallel_size", "data_parallel_size", "expert_parallel_size", "devices"):
        size = getattr(args, name, None)
        if size is not None and not 1 <= size <= MOST:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {size}: must be between 1 and {MOST}")


def start_devices(args: argparse.Namespace) -> None:
    """Start jax on the devices asked for: accelerators if there are any, else forced CPU devices,
    as many as the mesh needs or four."""
    check_sizes(args)
    tensor, data = args.tensor_parallel_size, args.data_parallel_size
    expert = args.expert_parallel_size
    devices = args.devices
    if devices is None and not env.has_accelerator() and not env.cpu_devices_chosen():
        per_replica = (tensor or 1) * expert if expert else tensor or DEFAULT_CPU_DEVICES
        devices = per_replica * (data or 1)
    env.start(devices)
