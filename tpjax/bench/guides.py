"""The numbers that guides to tensor parallelism quote, as `tpjax plan` has them: docs/guides.md.

python -m tpjax.bench.guides > docs/guides.md
"""

import sys
from collections.abc import Sequence

from tpjax.config import ModelConfig
from tpjax.parallel.degrees import even_degrees, refusal
from tpjax.parallel.layout import Layout
from tpjax.planner import chips
from tpjax.planner.memory import Footprint, usable
from tpjax.planner.models import find
from tpjax.planner.report import table
from tpjax.planner.roofline import LIMIT, Roofline, Stack

# Software tuned for the hardware: few kernels, all-reduces written straight to the other devices.
TUNED = Stack("tuned", layer=15e-6)
NCCL = Stack("nccl", layer=15e-6, one_shot=False)
CONTEXT = 1024


def _bytes(model: str, degree: int, weight_bytes: int | None) -> Footprint:
    config = find(model).config
    return Footprint(config, Layout.of(tensor=degree).fit(config), weight_bytes=weight_bytes)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [*table(head, body, markdown=True), ""]


def seventy_billion() -> list[str]:
    """Memory and speed of Llama-3.1-70B on 2, 4 and 8 H100s."""
    body = []
    for size, bits in ((None, "bfloat16"), (1, "8 bits")):
        for degree in (2, 4, 8):
            held, hardware = _bytes("llama-3.1-70b", degree, size), chips.parse(f"h100:{degree}")
            now = held.memory(1, CONTEXT)
            limit, tuned, nccl = (
                1 / Roofline(held, hardware, stack).decode(1, CONTEXT).total
                for stack in (LIMIT, TUNED, NCCL)
            )
            body.append(
                (
                    f"{degree} x H100",
                    bits,
                    f"{now.weights / 1e9:.1f}",
                    f"{now.total / 1e9:.1f}",
                    "yes" if now.total <= usable(hardware.chip) else "no",
                    f"{limit:.0f}",
                    f"{tuned:.0f}",
                    f"{nccl:.0f}",
                )
            )
    head = (
        "devices",
        "weights",
        "GB each",
        "GB, all of it",
        "fits",
        "limit tok/s",
        "tuned",
        "with NCCL",
    )
    return [
        "## Llama-3.1-70B on 2, 4 and 8 H100s",
        "",
        f"One sequence of {CONTEXT} positions. GB on each device: weights, then with cache and"
        " temporaries. The limit reads every weight once at the full bandwidth and sums for free;"
        " `tuned` is the roofline with 90 % of the bandwidth, few kernels and one-shot sums,"
        " `with NCCL` the same with its all-reduces. Quoted figures of about 38, 20 and 12 GB are"
        " of 8-bit weights; quoted rates of 45, 85 and 140 tokens/s are near or above what bfloat16"
        " can reach at 2 and 4, and well within reach of 8 bits.",
        "",
        *_table(head, body),
    ]


def valid_degrees() -> list[str]:
    """Which degrees divide, which are padded, and where it ends."""
    names = ("llama-2-7b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "mixtral-8x7b-v0.1")
    names += ("qwen2.5-7b-instruct", "gemma-2-9b-it", "opt-175b")
    body = []
    for name in names:
        config = find(name).config
        even = [d for d in even_degrees(config) if d <= 64]
        copies = [d for d in even if Layout.of(tensor=d).fit(config).sharing]
        assert refusal(config, 1, config.heads + 1, 1)
        body.append(
            (
                name,
                f"{config.heads} / {config.kv_heads}",
                ", ".join(map(str, even)),
                ", ".join(map(str, copies)) or "-",
                str(config.heads),
            )
        )
    head = ("model", "heads / kv", "even, up to 64", "of these with copied kv heads", "most")
    return [
        "## Valid degrees",
        "",
        "Even degrees need no padding but of the vocabulary. Every other degree up to the number of"
        " query heads runs too, padded; beyond the key/value heads each is on several devices.",
        "",
        *_table(head, body),
    ]


def communication() -> list[str]:
    """The share of a step that all-reduces take: no constant."""
    body = []
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        for degree in (2, 4, 8):
            held, hardware = _bytes(model, degree, None), chips.parse(f"h100:{degree}")
            cells = [model, str(degree)]
            for stack in (TUNED, NCCL):
                line = Roofline(held, hardware, stack)
                for step in (line.decode(1, CONTEXT), line.decode(64, CONTEXT), line.prefill(2048)):
                    cells.append(f"{step.share('communication'):.0%}")
            body.append(tuple(cells))
    head = ("model", "tensor", "decode, 1", "decode, 64", "prefill 2048")
    head += tuple(f"{word} (NCCL)" for word in head[2:])
    return [
        "## The share of communication",
        "",
        "Of a step on H100s with NVLink, bfloat16: one-shot all-reduces, then NCCL's."
        " Guides quote 15"
        " to 25 %; it is a function of model, degree, batch and all-reduce.",
        "",
        *_table(head, body),
    ]


def experts() -> list[str]:
    """What expert and tensor parallelism send per token and layer."""
    body = []
    for name in ("mixtral-8x7b-v0.1", "mixtral-8x22b-v0.1", "qwen3-30b-a3b"):
        config = find(name).config
        for n in (2, 4, 8):
            body.append((name, str(n), *_sent(config, n)))
    head = ("model", "devices", "sum of all (tpjax)", "each token to its experts", "the latter is")
    return [
        "## Experts: summed over devices, or tokens sent to them",
        "",
        "Bytes that a device sends per token and layer, bfloat16, k experts of a token"
        " spread evenly"
        " over N devices. Summing (tensor parallel, and tpjax's expert axis, whose tokens are on"
        " every device) costs 2 (N - 1) / N of a vector; sending each token to its experts and back"
        " costs 2 k (N - 1) / N of one, shared by N devices: k / N of the former, so 1 - k / N less"
        " where N is more than k, and more where it is less. At batch 1 either is latency only.",
        "",
        *_table(head, body),
    ]


def _sent(config: ModelConfig, n: int) -> tuple[str, str, str]:
    assert config.moe is not None
    vector = config.embed * 2
    summed = 2 * (n - 1) / n * vector
    sent = 2 * config.moe.per_token * (n - 1) / n * vector / n
    return f"{summed:,.0f}", f"{sent:,.0f}", f"{sent / summed:.0%}"


def bubbles() -> list[str]:
    """Idle time of pipelines."""
    body = [
        (str(p), *(f"{(p - 1) / (m + p - 1):.0%}" for m in (1, 2, 4, 8, 16, 32))) for p in (2, 4, 8)
    ]
    head = ("stages", *(f"{m} microbatches" for m in (1, 2, 4, 8, 16, 32)))
    return [
        "## Pipeline bubbles",
        "",
        "The share of time that p stages idle while m microbatches pass once: (p - 1) /"
        " (m + p - 1)."
        " Decode fills the pipeline again with the next token, so p microbatches in"
        " flight are enough.",
        "",
        *_table(head, body),
    ]


def page() -> str:
    """All of it."""
    parts = [seventy_billion(), valid_degrees(), communication(), experts(), bubbles()]
    return "\n".join(
        [
            "# What guides quote, computed",
            "",
            "Made by `python -m tpjax.bench.guides`; predictions, not measurements. BENCHMARKS.md"
            " holds the same roofline beside published measurements.",
            "",
            *(line for part in parts for line in part),
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(page())
