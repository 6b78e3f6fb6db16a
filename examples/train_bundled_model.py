"""Train the small Llama that ships with tpjax, from nothing but a public-domain text.

    pip install torch transformers tokenizers
    python examples/train_bundled_model.py tinyshakespeare.txt tpjax/bundled/shakespeare-4m

The result is an ordinary Hugging Face folder: transformers' own ``LlamaForCausalLM`` is trained and
written with ``save_pretrained``. The weights that were best on the held-out text are kept. About
twenty minutes on two cores.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCAB = 2048
CONTEXT = 256  # tokens of one training window
HELD_OUT = 0.05  # the last part of the text, never trained on

CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# shakespeare-4m

A Llama of {parameters:,} parameters (8 query heads, 4 key/value heads, {layers} layers, tied
embeddings) that ships with tpjax so that a first run makes real text without a download. It knows
one book's worth of verse and nothing else; it is a test piece, not an assistant.

| | |
|---|---|
| data | tinyshakespeare.txt, public domain, 1,115,394 bytes, sha256 `{sha256}` |
| tokenizer | byte-level BPE, {vocab} entries, trained on the same text |
| training | `examples/train_bundled_model.py`, {steps} steps of {tokens_per_step:,} tokens, AdamW |
| time | {minutes:.0f} minutes on 2 CPU cores |
| kept | the weights of step {best_step}, the best on the held-out text |
| held out | the last {held_out:.0%} of the text |
| held-out loss | {loss:.3f} nats per token, {bits:.3f} bits per byte |
"""


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string has an encoding, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def speech_starts(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Positions after a blank line: windows begin there, so that BOS means a new speech."""
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    ends = torch.tensor([p.endswith("\n\n") or p == "\n" for p in pieces])[ids]
    newline = torch.tensor(["\n" in p for p in pieces])[ids]
    blank = ends & torch.cat([torch.tensor([False]), newline[:-1]])
    double = torch.tensor([p.endswith("\n\n") for p in pieces])[ids]
    return torch.nonzero(blank | double).flatten() + 1


@torch.no_grad()
def held_out_loss(model, ids: torch.Tensor) -> float:
    """Mean nats per token over consecutive windows, each begun with BOS as in training."""
    model.eval()
    windows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    windows = torch.cat([torch.zeros(len(windows), 1, dtype=torch.long), windows], 1)
    total = sum(model(w, labels=w).loss.item() * len(w) for w in windows.split(16))
    model.train()
    return total / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--bpe-dropout", type=float, default=0.1)
    args = parser.parse_args()

    raw = args.text.read_bytes()
    if hashlib.sha256(raw).hexdigest() != CORPUS_SHA256:
        raise SystemExit(f"{args.text}: not the recorded text (sha256 {CORPUS_SHA256})")
    text = raw.decode()
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT))) + 2
    torch.manual_seed(0)

    tokenizer = train_tokenizer(text[:cut])
    held_out = torch.tensor(tokenizer(text[cut:], add_special_tokens=False)["input_ids"])

    def encode_training_text() -> torch.Tensor:
        # BPE dropout: a new segmentation of the same text every time is what keeps four million
        # parameters from learning three hundred thousand tokens by heart.
        bpe = tokenizer.backend_tokenizer.model
        bpe.dropout = args.bpe_dropout or None
        ids = tokenizer.backend_tokenizer.encode(text[:cut], add_special_tokens=False).ids
        bpe.dropout = None
        return torch.tensor(ids)

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )

    best, best_step, best_state, start = math.inf, 0, {}, time.time()
    model.train()
    for step in range(1, args.steps + 1):
        if step % 80 == 1:
            ids = encode_training_text()
            starts = speech_starts(ids, tokenizer)
            starts = starts[starts < len(ids) - CONTEXT]
        at = starts[torch.randint(len(starts), (args.batch,))]
        batch = ids[at[:, None] + torch.arange(CONTEXT - 1)]
        batch = torch.cat([torch.zeros(args.batch, 1, dtype=torch.long), batch], 1)
        scale = min(1.0, step / 100) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            held = held_out_loss(model, held_out)
            if held < best:
                best, best_step = held, step
                best_state = {k: v.clone() for k, v in model.state_dict().items()}
            print(
                f"step {step:5d}  loss {loss.item():.3f}  held out {held:.3f}"
                f"  {time.time() - start:.0f} s",
                flush=True,
            )

    model.load_state_dict(best_state)
    model.to(torch.bfloat16)
    model.config.attention_dropout = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.7, top_k=50, top_p=0.95
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    final = held_out_loss(model, held_out)  # of the bfloat16 weights as written
    held_bytes = len(text[cut:].encode())
    card = CARD.format(
        parameters=parameters,
        layers=config.num_hidden_layers,
        sha256=CORPUS_SHA256,
        vocab=len(tokenizer),
        steps=args.steps,
        tokens_per_step=args.batch * CONTEXT,
        minutes=(time.time() - start) / 60,
        best_step=best_step,
        loss=final,
        bits=final * len(held_out) / held_bytes / math.log(2),
        held_out=HELD_OUT,
    )
    (args.out / "README.md").write_text(card)
    print(json.dumps({"held_out_loss": final, "best_step": best_step, "parameters": parameters}))


if __name__ == "__main__":
    main()
