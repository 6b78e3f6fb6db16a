"""Which way round a weight is best stored: ``[out, in]``, as checkpoints have it, or ``[in, out]``.

    python -m tpjax.bench.layout

Prints Markdown: the rate at which a chain of products reads its weights, for both layouts in
alternation, medians over rounds. This decides the layout in nn/linear.py.
"""

import statistics
import time

from tpjax import env

OUT, IN, WEIGHTS, ROUNDS = 8192, 2048, 8, 7


def main() -> None:
    """Float32 and bfloat16, one row to a prefill chunk."""
    env.start()
    import jax
    import jax.numpy as jnp

    from tpjax.ops.matmul import matmul

    spec = jax.sharding.PartitionSpec()
    platform = jax.devices()[0].platform

    def chain(transposed: bool):
        def run(x, weights):
            total = jnp.zeros((), jnp.float32)
            for w in weights:
                y = matmul(x, w.T if transposed else w, spec, platform)
                total += jnp.sum(y)
                x += y[: x.shape[0], :IN].astype(x.dtype) * jnp.asarray(1e-6, x.dtype)
            return total

        return run

    print("| dtype | rows | [out, in] GB/s | [in, out] GB/s | ratio |")
    print("|---|---|---|---|---|")
    for dtype in (jnp.float32, jnp.bfloat16):
        for rows in (1, 8, 128):
            x = jnp.ones((rows, IN), dtype)
            built, rates = {}, {False: [], True: []}
            for transposed in rates:
                shape = (IN, OUT) if transposed else (OUT, IN)
                weights = [jnp.full(shape, 1e-3 * i, dtype) for i in range(WEIGHTS)]
                built[transposed] = (jax.jit(chain(transposed)).lower(x, weights).compile(), weights)
            for _ in range(ROUNDS + 1):
                for transposed, (run, weights) in built.items():
                    start = time.perf_counter()
                    run(x, weights).block_until_ready()
                    seconds = time.perf_counter() - start
                    rates[transposed].append(sum(w.nbytes for w in weights) / seconds / 1e9)
            a, b = (rates[t][1:] for t in (False, True))
            ratio = statistics.median(i / j for i, j in zip(a, b, strict=True))
            medians = f"{statistics.median(a):.1f} | {statistics.median(b):.1f}"
            print(f"| {jnp.dtype(dtype).name} | {rows} | {medians} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
