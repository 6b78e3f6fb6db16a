"""Text from tokens, on other tokenizers than the bundled one, and stop strings anywhere in it."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tpjax.engine.request import Detokenizer


class Sentencepiece:
    """A tokenizer as Llama 1 and 2 have it: a mark for spaces, bytes for what has no piece."""

    def __init__(self):
        pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁Once", "▁upon", "▁a", "▁", "▁t"]
        pieces += ["▁time", "ime", "STOP", "ST", "OP", "S", "T", "é"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        self.backend_tokenizer = Tokenizer(
            models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
        )
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        self.backend_tokenizer.decoder = decoders.Sequence([*strip, decoders.Strip(" ", 1, 0)])
        self.id = vocab

    def decode(self, ids) -> str:
        return self.backend_tokenizer.decode(list(ids))


@pytest.fixture(scope="module")
def tokenizer():
    return Sentencepiece()


def read(tokenizer, pieces, stop=(), prompt=()):
    """What is shown piece by piece, and the whole text."""
    detokenizer = Detokenizer(tokenizer, stop, [tokenizer.id[p] for p in prompt])
    shown = []
    for piece in pieces:
        if detokenizer.push(tokenizer.id[piece]):
            break
        shown.append(detokenizer.new_text(finished=False))
    shown.append(detokenizer.new_text(finished=True))
    assert "".join(shown) == detokenizer.text
    return shown, detokenizer


def test_text_goes_on_from_the_prompt(tokenizer):
    """The first space of a completion is not the first of a text."""
    _, detokenizer = read(tokenizer, ["▁time"], prompt=["▁Once", "▁upon", "▁a"])
    assert detokenizer.text == " time"
    assert tokenizer.decode([tokenizer.id["▁time"]]) == "time"


def test_bytes_of_one_character_come_together(tokenizer):
    shown, _ = read(tokenizer, ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁t"], prompt=["▁a"])
    assert [s for s in shown if s] == ["\N{SLIGHTLY SMILING FACE}", " t"]


def test_any_tokens_can_be_read(tokenizer):
    """Bytes that are no character included: no sequence may end the run."""
    rng = random.Random(0)
    names = list(tokenizer.id)
    for _ in range(2000):
        pieces = [rng.choice(names) for _ in range(rng.randrange(1, 12))]
        read(tokenizer, pieces, stop=("STOP",), prompt=["▁a"] * rng.randrange(2))


@pytest.mark.parametrize(
    "pieces, stop, text",
    [
        (["STOP", "▁a"], ["STOP"], ""),
        (["▁a", "ST", "OP", "▁a"], ["STOP"], " a"),
        (["▁a", "S", "T", "OP"], ["STOP"], " a"),
        (["▁a", "S", "T", "▁a"], ["STOP"], " aST a"),
        (["▁a", "ST", "OP"], ["TOP", "STOP"], " a"),
        (["▁a", "ST", "ST", "OP"], ["STOP"], " aST"),
        (["▁a", "▁time"], ["a ti", "x"], " "),
        (["▁a", "ST"], ["STOP"], " aST"),
    ],
)
def test_stop_strings_across_tokens(tokenizer, pieces, stop, text):
    shown, detokenizer = read(tokenizer, pieces, stop, prompt=["▁a"])
    assert detokenizer.text == text
    assert not any(s in "".join(shown) for s in stop)
