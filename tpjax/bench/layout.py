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

    def chain(product: str):
        def run(x, weights):
            total = jnp.zeros((), jnp.float32)
            for w in weights:
                y = jnp.einsum(product, x, w, preferred_element_type=jnp.float32)
                total += jnp.sum(y)
                x += y[:, :IN].astype(x.dtype) * jnp.asarray(1e-6, x.dtype)
            return total

        return run

    shapes = {"RI,OI->RO": (OUT, IN), "RI,IO->RO": (IN, OUT)}
    print("| dtype | rows | [out, in] GB/s | [in, out] GB/s | ratio |")
    print("|---|---|---|---|---|")
    for dtype in (jnp.float32, jnp.bfloat16):
        # One row is two in bfloat16, as in ops/matmul.py.
        for rows in (1 if dtype == jnp.float32 else 2, 8, 128):
            x = jnp.ones((rows, IN), dtype)
            built, rates = {}, {product: [] for product in shapes}
            for product, shape in shapes.items():
                weights = [jnp.full(shape, 1e-3 * i, dtype) for i in range(WEIGHTS)]
                built[product] = (jax.jit(chain(product)).lower(x, weights).compile(), weights)
            for _ in range(ROUNDS + 1):
                for product, (run, weights) in built.items():
                    start = time.perf_counter()
                    run(x, weights).block_until_ready()
                    seconds = time.perf_counter() - start
                    rates[product].append(sum(w.nbytes for w in weights) / seconds / 1e9)
            a, b = (rates[product][1:] for product in shapes)
            ratio = statistics.median(i / j for i, j in zip(a, b, strict=True))
            medians = f"{statistics.median(a):.1f} | {statistics.median(b):.1f}"
            print(f"| {jnp.dtype(dtype).name} | {rows} | {medians} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
