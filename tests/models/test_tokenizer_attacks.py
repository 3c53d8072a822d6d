"""A tokenizer of elsewhere that would say whether a single record holds a word: by failing, or by taking ever so long."""

import base64
import json
import struct
import time
from collections.abc import Callable, Mapping

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.models.folders import SIZE
from urna.models.candidate_file import TextInput
from urna.models.text import MASK, TOKENS, TextAdapter, check_positions, positions, read_tokenizer
from urna.protocol.errors import ModelError

VOCAB = {"[PAD]": 0, "[UNK]": 1} | {f"w{at}": at for at in range(2, 50)}
SETTINGS = TextInput(max_tokens=8, pad_id=0)
Change = Callable[[Tokenizer], None]


def words(**parts: object) -> Tokenizer:
    """Whole words; with components of a tokenizer, by name."""
    found = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def read(found: Tokenizer | bytes, vocab_size: int = 50, settings: TextInput = SETTINGS) -> TextAdapter:
    content = found if isinstance(found, bytes) else found.to_str().encode()
    return TextAdapter(settings, read_tokenizer(content, settings, vocab_size), vocab_size)


def changed(**entries: object) -> bytes:
    """What the library would not write."""
    return json.dumps(json.loads(words().to_str()) | entries).encode()


def charsmap(replacement: bytes, index: int = 0) -> bytes:
    """A trie of the letter q alone, which becomes what is behind, from a byte on."""
    trie = [0] * 256
    trie[ord("q")] = ord("q") | 1 << 8 | 1 << 10  # it has a leaf, at q ^ 1
    trie[ord("q") ^ 1] = index
    return struct.pack("<I256I", 4 * 256, *trie) + replacement + b"\0"


def precompiled(replacement: bytes, index: int = 0) -> bytes:
    content = base64.b64encode(charsmap(replacement, index)).decode()
    return changed(normalizer={"type": "Precompiled", "precompiled_charsmap": content})


PIECES = [("[PAD]", 0.0), ("a", -1.0), ("b", -1.0)]
GROWING = normalizers.Sequence([normalizers.Replace(*pair) for pair in (("q", "r" * 100), ("r", "s" * 100), ("s", "t" * 100))])
NEVER_ENDING = Regex(r"(a|a)*[^a]b")
ORACLES: Mapping[str, tuple[Tokenizer | bytes, str]] = {
    "words without an unknown one": (Tokenizer(models.WordLevel({"a": 0, "b": 1})), "a token for unknown words"),
    "an unknown word that is not there": (Tokenizer(models.WordLevel({"a": 0}, unk_token="[U]")), r"found '\[U\]'"),
    "pieces without an unknown one": (Tokenizer(models.Unigram(PIECES, unk_id=None)), "a token for unknown words"),
    "pieces of words without one": (Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")), "a token for unknown words"),
    "pairs of no bytes without one": (Tokenizer(models.BPE({"a": 0}, [])), "a token for unknown words"),
    "pairs whose unknown is not there": (Tokenizer(models.BPE({"a": 0}, [], unk_token="[U]")), r"found '\[U\]'"),
    "pairs that are drawn": (Tokenizer(models.BPE({"a": 0}, [], unk_token="a", dropout=0.5)), "no dropout"),
    "one letter becomes a million": (words(normalizer=GROWING), "replacements that make no text longer"),
    "nothing becomes something": (words(normalizer=normalizers.Replace("", "x")), "replacements that make no text longer"),
    "a pattern that does not end": (words(normalizer=normalizers.Replace(NEVER_ENDING, "")), "replacements that make no"),
    "a split that does not end": (words(pre_tokenizer=pre_tokenizers.Split(NEVER_ENDING, "isolated")), "of a known model"),
    "bytes of bytes of bytes": (
        words(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 3)),
        "each once.*ByteLevel",
    ),
    "bytes in a normaliser": (words(normalizer=normalizers.ByteLevel()), "normalizer of .*found 'ByteLevel'"),
    "sequences within sequences": (
        words(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.NFC()])])),
        "each once",
    ),
    "very many replacements": (words(normalizer=normalizers.Sequence([normalizers.Replace("a", "b")] * 17)), "at most 16"),
    "a beginning of a book": (words(normalizer=normalizers.Prepend("x" * 10**6)), "characters to prepend"),
    "a charsmap that makes a letter a book": (precompiled(b"x" * 1000), "at most 96 bytes of a character, found '1000'"),
    "a charsmap that is none": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "//8="}), "must"),
    "pieces of no length": (changed(pre_tokenizer={"type": "FixedLength", "length": 0}), "found 'FixedLength'"),
    "the text twice": (
        words(post_processor=processors.TemplateProcessing(single="$A $A", special_tokens=[])),
        "the text once",
    ),
    "a template of a token that is not there": (
        changed(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            }
        ),
        "must",
    ),
    "a template's token of another model": (
        words(post_processor=processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", 50)])),
        "tokens below 50, the model's, found 50",
    ),
    "a frame's token of another model": (
        words(post_processor=processors.BertProcessing(("[SEP]", 99), ("[CLS]", 2))),
        "tokens below 50, the model's, found 99",
    ),
    "very long words": (
        Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]", max_input_chars_per_word=10**6)),
        "max_input_chars_per_word up to 200",
    ),
    "very long pieces": (Tokenizer(models.Unigram([*PIECES, ("a" * 129, -1.0)], unk_id=0)), "pieces of at most 128"),
    "a model of elsewhere": (changed(model={"type": "Evil", "vocab": {}}), "must be a tokenizer"),
    "a decoder that no model has": (words(decoder=decoders.CTC()), "decoder of .*found 'CTC'"),
}


@pytest.mark.parametrize("case", ORACLES)
def test_a_tokenizer_that_could_fail_for_one_record_is_refused(case: str) -> None:
    found, part = ORACLES[case]
    with pytest.raises(ModelError, match=part):
        read(found)


def test_a_tokenizer_that_panics_at_one_word_is_no_oracle() -> None:
    """The letter q becomes the second half of a character: the library panics, which is no Exception."""
    adapter = read(precompiled("é".encode(), index=1))
    with pytest.raises(BaseException, match="char boundary") as caught:
        adapter.tokenizer.encode_batch_fast(["w2 q"])
    assert not isinstance(caught.value, Exception)
    batch = adapter.batch(["w2 w3", "w2 q", "w4"])
    assert batch[TOKENS].tolist() == [[2, 3, *[0] * 6], [0] * 8, [4, *[0] * 7]]
    assert batch[MASK].sum(1).tolist() == [2, 1, 1]
    assert adapter.length_classes(["w2 q"]).tolist() == [8]


def test_a_charsmap_of_a_published_kind_is_read() -> None:
    assert read(precompiled(b"w7")).batch(["w2 q"])[TOKENS].tolist() == [[2, 7, *[0] * 6]]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_stops_the_process_is_not_taken_for_a_panic(stop: type[BaseException]) -> None:
    class Stopped:
        def encode_batch_fast(self, texts: list[str]) -> None:  # noqa: ARG002 - the library's signature
            raise stop

    stopped: object = Stopped()
    adapter = TextAdapter(SETTINGS, stopped, 50)  # type: ignore[arg-type]  # nothing else stops in the middle of a text
    with pytest.raises(stop):
        adapter.batch(["w2"])


def test_a_token_that_the_model_has_not_is_the_padding_token_of_that_text_alone() -> None:
    """Were one let through by the reading, the table of the model would fail for whoever holds the word."""
    adapter = TextAdapter(SETTINGS, words(), vocab_size=10)
    assert adapter.batch(["w2 w49", "w3"])[TOKENS].tolist() == [[0] * 8, [3, *[0] * 7]]


def test_what_is_checked_is_what_the_library_read() -> None:
    """Of two entries of one name a reader may take either."""
    twice = changed().replace(b'"unk_token": "[UNK]"', b'"unk_token": "%s", "unk_token": "%s"')
    assert read(twice % (b"[NONE]", b"[UNK]")).batch(["never heard"])[TOKENS].tolist() == [[1, 1, *[0] * 6]]
    with pytest.raises(ModelError, match=r"found '\[NONE\]'"):
        read(twice % (b"[UNK]", b"[NONE]"))


def test_only_a_public_number_of_characters_of_a_text_is_read() -> None:
    adapter = read(words())
    start = time.perf_counter()
    batch = adapter.batch(["w2 " * 10**7])
    assert time.perf_counter() - start < 1.0
    assert batch[TOKENS].tolist() == [[2] * 8]
    spaces = " " * (64 * SETTINGS.max_tokens)
    assert adapter.batch([spaces[1:] + "w2"])[MASK].sum().item() == 1
    assert adapter.batch([f"{spaces}w2"])[TOKENS].tolist() == [[0] * 8]


PUBLISHED: Mapping[str, Tokenizer] = {
    "BERT": words(normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer()),
    "ALBERT": words(
        normalizer=normalizers.Sequence(
            [
                normalizers.Replace("``", '"'),
                normalizers.Replace("''", '"'),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        ),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    ),
    "DeBERTa": words(
        normalizer=normalizers.Sequence(
            [normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC(), normalizers.Strip(left=False)]
        ),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace()]),
    ),
    "Llama 2": words(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    ),
    "Llama 3": words(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                        r"\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        post_processor=processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", 0)])]
        ),
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_components_of_published_models_are_read(family: str) -> None:
    assert read(PUBLISHED[family]).batch(["w2 'w3'  w4"])[MASK].sum() >= 1


def test_the_models_of_published_tokenizers_are_read() -> None:
    of_bytes = Tokenizer(models.BPE({token: at for at, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert read(of_bytes, 256).batch(["é"])[MASK].sum() == 3  # a space and two bytes
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    assert read(Tokenizer(models.BPE(fallback, [], byte_fallback=True)), 256).batch(["é"])[TOKENS][0, :2].tolist() == [195, 169]
    unigram = Tokenizer(models.Unigram([("[UNK]", 0.0), *PIECES[1:]], unk_id=0))
    unigram.add_special_tokens([AddedToken("</s>", special=True)])
    assert read(unigram, 4).batch(["abz</s>"])[TOKENS].tolist() == [[1, 2, 0, 3, 0, 0, 0, 0]]
    assert read(Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))).batch(["w2"])[MASK].sum() == 1


def test_more_tokens_than_positions_are_refused_when_an_artefact_is_loaded() -> None:
    """A text of 21 tokens would fail for a model of 20 positions: for whoever holds one."""
    bert = hf.BertConfig(max_position_embeddings=20, **SIZE)
    roberta = hf.RobertaConfig(max_position_embeddings=20, pad_token_id=1, **SIZE)
    assert (positions(bert), positions(roberta), positions(hf.T5Config())) == (20, 18, None)
    for config, limit in ((bert, 20), (roberta, 18)):
        check_positions(config, TextInput(max_tokens=limit, pad_id=0))
        with pytest.raises(ModelError, match=f"at most {limit}, the model's positions, found {limit + 1}"):
            check_positions(config, TextInput(max_tokens=limit + 1, pad_id=0))


def test_every_tokens_number_is_one_of_the_model_whatever_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = ["".join(chr(one) for one in torch.randint(1, 0xD7FF, (40,), generator=generator)) for _ in range(200)]
    for found in (words(), PUBLISHED["ALBERT"], PUBLISHED["Llama 3"]):
        batch = read(found).batch(texts)
        assert 0 <= int(batch[TOKENS].min()) <= int(batch[TOKENS].max()) < 50
        assert bool((batch[MASK].sum(1) >= 1).all())
