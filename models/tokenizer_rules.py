"""Which tokenizers may read a site's records: every text becomes tokens, in time and memory that grow with its length only.

A tokenizer of elsewhere is a program over the words of records. One that fails, or takes ever so long, for the word of a
single record would say that the record is there, whatever noise is added later.

Covered:
    a word that is not in the vocabulary always becomes a token, or bytes, or nothing; it is never an error;
    components are those that published models of `huggingface.FAMILIES` are made of; any other is refused;
    no normaliser makes a text longer more than once, and none by more than `MAX_GROWTH` bytes a character;
    regular expressions are those of published models, letter by letter; none is an attacker's;
    nothing is drawn: the same text gives the same tokens.
Not covered:
    what tokens a text becomes: that is the model's own business, and its features are noised.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from urna.protocol.errors import ModelError

NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace")
COMPONENTS: Mapping[str, tuple[str, frozenset[str]]] = {  # place: how a sequence calls its parts, and what it may hold
    "normalizer": ("normalizers", frozenset({*NORMALIZERS, "Strip", "StripAccents"})),
    "pre_tokenizer": (
        "pretokenizers",
        frozenset(
            {"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"}
        ),
    ),
    "post_processor": ("processors", frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"})),
    "decoder": (  # never run
        "decoders",
        frozenset({"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}),
    ),
}
REPEATED = ("Replace", "Split")  # any other component comes once, or it could make a text longer again and again
MAX_COMPONENTS = 16  # of one kind
MAX_GROWTH = 96  # bytes that a character becomes; of the normal forms of Unicode U+FDFA grows most, to 33
MAX_WORD = 200  # characters of a word that WordPiece looks for pieces in, which takes their square; published: 100
MAX_PIECE = 128  # characters of a piece of Unigram; published: 16, and some symbols
MAX_AFFIX = 16  # characters of what marks a word's inside, its end or the text's beginning
MAX_TEMPLATE = 16  # parts of a template
_REPLACED = frozenset({r"\s+", " {2,}", r"\s{2,}|[\n\r\t]"})
_SPLITS = frozenset(
    {
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        *(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            rf"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            for digits in ("", "{1,3}")
        ),
    }
)
Json = Mapping[str, object]


def check_tokenizer(found: Json) -> None:
    """Whether a tokenizer may read records.

    Args:
        found: As the library itself writes down what it read, so that nothing is read in two ways.

    Raises:
        ModelError: see the module.
    """
    chains = {place: _chain(place, found.get(place)) for place in COMPONENTS}
    for place, chain in chains.items():
        allowed = COMPONENTS[place][1]
        kinds = Counter(str(part.get("type")) for part in chain)
        if foreign := sorted(set(kinds) - allowed):
            raise _refusal(f"{place} of {', '.join(sorted(allowed))}", foreign[0])
        again = sorted(kind for kind, times in kinds.items() if times > 1 and kind not in REPEATED)
        if place != "decoder" and (again or len(chain) > MAX_COMPONENTS):
            raise _refusal(f"at most {MAX_COMPONENTS} parts of its {place}, each once", f"{len(chain)}, {again} again")
        if place != "decoder":
            for part in chain:
                _PARTS.get(str(part.get("type")), _nothing)(part)
    model = _mapping("model", found.get("model"))
    kind = str(model.get("type"))
    if kind not in _MODELS:
        raise _refusal(f"a model of {', '.join(sorted(_MODELS))}", kind)
    byte_level = any(part.get("type") == "ByteLevel" for part in chains["pre_tokenizer"])
    _MODELS[kind](model, byte_level)


def _refusal(expected: str, found: object) -> ModelError:
    return ModelError(f"tokenizer.json must have {expected}, found {str(found)[:80]!r}: choose another model")


def _mapping(place: str, value: object) -> Json:
    if not isinstance(value, dict):
        raise _refusal(f"an object as {place}", type(value).__name__)
    return value


def _sequence(place: str, value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise _refusal(f"a list as {place}", type(value).__name__)
    return value


def _chain(place: str, component: object) -> list[Json]:
    """The components of a place in their order, those of sequences within sequences too."""
    if component is None:
        return []
    part = _mapping(place, component)
    if part.get("type") != "Sequence":
        return [part]
    return [one for inner in _sequence(place, part.get(COMPONENTS[place][0])) for one in _chain(place, inner)]


# ---- components


def _nothing(part: Json) -> None:
    """Its type says all."""


def _replace(part: Json) -> None:
    """As many characters as there were, or fewer."""
    pattern, content = _mapping("pattern", part.get("pattern")), str(part.get("content"))
    wanted, text = pattern.get("Regex"), pattern.get("String")
    known = wanted in _REPLACED and len(content) <= 1
    if not known and not (isinstance(text, str) and len(content) <= len(text) != 0):
        raise _refusal("replacements that make no text longer", f"{text or wanted!r} by {content!r}")


def _split(part: Json) -> None:
    pattern = _mapping("pattern", part.get("pattern"))
    wanted, text = pattern.get("Regex"), pattern.get("String")
    if wanted not in _SPLITS and not (isinstance(text, str) and text):
        raise _refusal("a regular expression of a known model to split by", wanted)


def _prepend(part: Json) -> None:
    if len(str(part.get("prepend"))) > MAX_AFFIX:
        raise _refusal(f"at most {MAX_AFFIX} characters to prepend", part.get("prepend"))


def _precompiled(part: Json) -> None:
    """A trie behind its length, 4 bytes little-endian; then what characters become, each up to a zero byte."""
    try:
        charsmap = base64.b64decode(str(part.get("precompiled_charsmap")), validate=True)
    except binascii.Error:
        raise _refusal("a charsmap in base64", "another text") from None
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    longest = max(map(len, texts.split(b"\0")))
    if longest > MAX_GROWTH:
        raise _refusal(f"a charsmap that makes at most {MAX_GROWTH} bytes of a character", longest)


def _template(part: Json) -> None:
    """The text once, among a few tokens."""
    single = [_mapping("single", one) for one in _sequence("single", part.get("single"))]
    if sum("Sequence" in one for one in single) != 1 or len(single) > MAX_TEMPLATE:
        raise _refusal(f"a template of at most {MAX_TEMPLATE} parts, the text once", len(single))


_PARTS: Mapping[str, Callable[[Json], None]] = {
    "Replace": _replace,
    "Split": _split,
    "Prepend": _prepend,
    "Precompiled": _precompiled,
    "TemplateProcessing": _template,
}


# ---- models


def _known(model: Json) -> None:
    """Whether there is a token for unknown words."""
    if model.get("unk_token") not in _mapping("vocab", model.get("vocab")):
        raise _refusal("a token for unknown words in its vocabulary", model.get("unk_token"))


def _affixes(model: Json) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > MAX_AFFIX:
            raise _refusal(f"a {name} of at most {MAX_AFFIX} characters", model.get(name))


def _word_level(model: Json, _: bool) -> None:
    _known(model)


def _word_piece(model: Json, _: bool) -> None:
    _known(model)
    _affixes(model)
    limit = model.get("max_input_chars_per_word")
    if not isinstance(limit, int) or limit > MAX_WORD:
        raise _refusal(f"max_input_chars_per_word up to {MAX_WORD}", limit)


def _bpe(model: Json, byte_level: bool) -> None:
    """Of bytes, or with a token for unknown ones; a byte of no token is left out."""
    _affixes(model)
    if model.get("dropout"):
        raise _refusal("no dropout: the same text has the same tokens", model.get("dropout"))
    if model.get("unk_token") is not None or not (byte_level or model.get("byte_fallback")):
        _known(model)


def _unigram(model: Json, _: bool) -> None:
    unknown, vocab = model.get("unk_id"), _sequence("vocab", model.get("vocab"))
    if not isinstance(unknown, int) or not 0 <= unknown < len(vocab):
        raise _refusal("a token for unknown words in its vocabulary", unknown)
    longest = max(len(str(_sequence("vocab", one)[0])) for one in vocab)
    if longest > MAX_PIECE:
        raise _refusal(f"pieces of at most {MAX_PIECE} characters", longest)


_MODELS: Mapping[str, Callable[[Json, bool], None]] = {
    "WordLevel": _word_level,
    "WordPiece": _word_piece,
    "BPE": _bpe,
    "Unigram": _unigram,
}
