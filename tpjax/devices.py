"""Which devices a command runs on, from its options."""

import argparse

from tpjax import env
from tpjax.errors import UsageError

DEFAULT_CPU_DEVICES = 4
MOST = 512  # more than one process drives; forced CPU devices cost memory and threads


def start_devices(args: argparse.Namespace) -> None:
    """Start jax on the devices asked for: accelerators if there are any, else forced CPU devices,
    as many as the mesh needs or four."""
    tensor, data = args.tensor_parallel_size, args.data_parallel_size
    expert = args.expert_parallel_size
    for name, size in (
        ("--tensor-parallel-size", tensor),
        ("--data-parallel-size", data),
        ("--expert-parallel-size", expert),
        ("--devices", args.devices),
    ):
        if size is not None and not 1 <= size <= MOST:
            raise UsageError(f"{name} {size}: must be between 1 and {MOST}")
    devices = args.devices
    if devices is None and not env.has_accelerator() and not env.cpu_devices_chosen():
        per_replica = (tensor or 1) * expert if expert else tensor or DEFAULT_CPU_DEVICES
        devices = per_replica * (data or 1)
    env.start(devices)
