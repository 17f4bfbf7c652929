"""Streamed pieces against the tokenizer's own decoding of the whole answer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.errors import InputError
from ds_offload.text_stream import TextStream

TEXTS = [
    "The keeper wrote it down.\nTwice, in fact.",
    "Crème brûlée à la façon d'Étienne",
    "👩‍👩‍👧 waves 🇫🇷🇯🇵 at 🧑🏽‍🚀!",
    "鲸鱼在海里游泳。クジラは大きい。고래",
    "tabs\tand  two spaces\n\n\n   indented",
    "a",
    "नमस्ते दुनिया",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer, as GPT-2, Llama 3, Qwen and SmolLM have: emoji take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the keeper wrote it down twice in the book of the light"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer in the way of Llama 2: word marks, byte tokens, the first space stripped on decoding."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab += [*"abcdefghijklmnopqrstuvwxyzTE.,!'", "▁the", "▁keeper", "in"]
    merges = [("i", "n")]
    for word in ("the", "keeper"):
        for cut in range(1, len(word) + 1):
            if "▁" + word[:cut] not in vocab:
                vocab.append("▁" + word[:cut])
            merges.append(("▁" + word[: cut - 1], word[cut - 1]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level_tokenizer, "byte-fallback": byte_fallback_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def stream(tokenizer: object, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """The pieces of every token, then of finish(); tokens stop with the first stop string."""
    out = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(out.push(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert "".join(pieces) == out.text
    return pieces, out


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_join_to_the_decoded_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Broken bytes, lone word marks and special tokens in the middle, as an untrained model gives them."""
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 24))]
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_random_bytes_join_to_the_decoded_text() -> None:
    """The tokenizer of dummy weights, with ids beyond its bytes among them."""
    tokenizer, draw = ByteTokenizer(400), random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(400) for _ in range(draw.randrange(1, 24))]
        ids[1:1] = "🐋é".encode()
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids), ids


def test_words_come_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """Plain words are not held back: after each token the text is all there is."""
    ids = tokenizer("the keeper in the keeper")["input_ids"]
    out = TextStream(tokenizer)
    for count, token in enumerate(ids, start=1):
        out.push(token)
        assert out.text == tokenizer.decode(ids[:count], skip_special_tokens=True)


def test_an_emoji_comes_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a🐋b")["input_ids"]
    pieces, _ = stream(tokenizer, ids)
    assert len(ids) > 4, "the emoji must take several tokens for this test to mean anything"
    assert any("🐋" in piece for piece in pieces)


def test_the_decoded_window_stays_short(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = []

    class Watched:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        is_fast = True
        convert_ids_to_tokens = staticmethod(tokenizer.convert_ids_to_tokens)

        @staticmethod
        def decode(ids: list[int], **options: bool) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer("the keeper, 鲸 🐋 again. " * 50)["input_ids"]
    pieces, _ = stream(Watched(), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert max(lengths) <= 24 < len(ids)


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("keeper",), "the "),
        (("eper t",), "the ke"),
        (("per the k", "er the"), "the keep"),  # "er the" is complete first, though it starts later
        (("er the", "eeper the"), "the k"),  # both end at the same place: the longer
        (("p", "keeper"), "the kee"),
        (("nowhere",), "the keeper the keeper"),
        (("keepers",), "the keeper the keeper"),
    ],
)
def test_stop_strings(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], left: str) -> None:
    """The same end however the text is cut into tokens."""
    text = "the keeper the keeper"
    by_letter = [token for letter in text for token in letter_ids(tokenizer, letter)]
    for ids in (tokenizer(text)["input_ids"], by_letter):
        _, out = stream(tokenizer, ids, stop)
        assert out.text.lstrip() == left
        assert out.stopped == (left != text)


def letter_ids(tokenizer: PreTrainedTokenizerFast, letter: str) -> list[int]:
    """One token that is `letter` alone, in either alphabet."""
    names = {" ": ("Ġ", "▁")}.get(letter, (letter,))
    vocab = tokenizer.get_vocab()
    return [next(vocab[name] for name in names if name in vocab)]


def test_text_that_may_start_a_stop_string_is_held_back() -> None:
    tokenizer = byte_level_tokenizer()
    ids = [token for letter in "kee!" for token in letter_ids(tokenizer, letter)]
    out = TextStream(tokenizer, ("keeper",))
    assert [out.push(token) for token in ids] == ["", "", "", "kee!"]


def test_nothing_comes_after_a_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    out = TextStream(tokenizer, ("keeper",))
    for token in tokenizer("the keeper")["input_ids"]:
        out.push(token)
    assert out.stopped
    before = out.text
    assert out.push(tokenizer("in")["input_ids"][0]) == "" and out.finish() == "" and out.text == before


def test_a_line_break_as_a_byte_token_stops_at_once() -> None:
    """Llama 2 writes a line break as a byte token; the stop must not need another token."""
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer("the keeper\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<0x0A>"
    out = TextStream(tokenizer, ("\n",))
    for token in ids:
        out.push(token)
    assert out.stopped and out.text == "the keeper"


def test_without_a_tokenizer_the_text_is_the_ids() -> None:
    pieces, out = stream(None, [5, 17, 0])
    assert pieces == ["5", " 17", " 0", ""] and out.text == "5 17 0"
    with pytest.raises(InputError, match="tokenizer"):
        TextStream(None, ("5",))


@pytest.mark.slow
def test_smollm2() -> None:
    cache = Path(os.environ.get("DS_OFFLOAD_CACHE", Path.home() / ".cache" / "ds_offload"))
    folder = cache / "models" / "smollm2-135m"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} has no tokenizer.json; `ds-offload run` with the default model makes it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(1)
    cases = [tokenizer(text)["input_ids"] for text in TEXTS]
    cases += [[draw.randrange(len(tokenizer)) for _ in range(40)] for _ in range(200)]
    for ids in cases:
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
