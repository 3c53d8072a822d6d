"""Texts become tokens: the tokenizer of an installed candidate, as one JSON file and nothing else.

Covered:
    a tokenizer is read from bytes of limited size by the Rust library; no code of the model's publisher runs;
    a text of any length gives 1 to ``max_tokens`` tokens of the model, and its tokens do not depend on its company;
    whatever a tokenizer makes of a text, a panic of the library included, the others and the release do not notice.
Not covered:
    what a model makes of the padding: the mask says which tokens are real, and a test compares both ways;
    a panic's own words, which the library writes to this machine's standard error.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from urna.models.candidate_file import TextInput
from urna.models.tokenizer_rules import check_tokenizer
from urna.protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from urna.models.loading import Inputs

TOKENS, MASK = "input_ids", "attention_mask"  # as Hugging Face names a text model's inputs
SMALLEST_CLASS = 16  # tokens
CHARACTERS_PER_TOKEN = 64  # of a text that are read, for each of max_tokens; the rest could take ever so long
SAMPLES = (
    "",
    "a",
    "Fever of 38.5 °C, since 3 days.\n\t\uff26 e\u0301 \ufdfa \u4f53\u6e29 \U0001f321 \u200b\x00",
    "word " * 999,
)
_OFFSET_POSITIONS = ("roberta", "xlm-roberta")  # the first pad_id + 1 positions are no token's
_ENDLESS = ("t5", "xlnet")  # positions are relative: what their configurations say is no limit
_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_Given = TypeVar("_Given")


@dataclass(frozen=True, eq=False)
class TextAdapter:
    """Texts to a batch of tokens.

    Args:
        settings: Of the candidate.
        tokenizer: As `read_tokenizer` gives it, with this candidate's truncation.
        vocab_size: Of the model: every token is below.
    """

    settings: TextInput
    tokenizer: Tokenizer
    vocab_size: int

    def length_classes(self, inputs: "Inputs") -> NDArray[np.int64]:
        """For each text alone: the smallest of 16, 32, 64, ..., max_tokens that holds its tokens, int64 (n,).

        Raises:
            ModelError: these are not texts.
        """
        limit = self.settings.max_tokens
        powers = (SMALLEST_CLASS << at for at in range(limit.bit_length()))
        classes = [*(one for one in powers if one < limit), limit]
        lengths = [len(row) for row in self._rows(inputs)]
        return np.array(classes, np.int64)[np.searchsorted(classes, lengths)]

    def batch(self, inputs: "Inputs", length: int | None = None) -> dict[str, torch.Tensor]:
        """Tokenise, and bring every text to one length: padded on the right, or cut; an empty text is one token.

        Args:
            inputs: n texts; n may be 0.
            length: A class of `length_classes`, never the longest of these texts; None is max_tokens.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (n, length).

        Raises:
            ModelError: these are not texts, or the length is not 1 to max_tokens.
        """
        length = self.settings.max_tokens if length is None else length
        if not 1 <= length <= self.settings.max_tokens:
            raise ModelError(f"length must be 1 to {self.settings.max_tokens}, found {length}: give a class of length_classes")
        rows = [row[:length] for row in self._rows(inputs)]
        tokens = torch.full((len(rows), length), self.settings.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        return {TOKENS: tokens, MASK: mask}

    def _rows(self, inputs: "Inputs") -> list[list[int]]:
        if isinstance(inputs, str | np.ndarray) or not all(isinstance(text, str) for text in inputs):
            raise ModelError(f"expected a sequence of texts, found {type(inputs).__name__}: ask for models of this modality")
        return [self._row(text) for text in inputs]

    def _row(self, text: str) -> list[int]:
        """One text's tokens, 1 to max_tokens of them; a text that makes the tokenizer fail is a single padding token."""
        try:
            ids = encoded(self.tokenizer, text, self.settings.max_tokens)
        except ModelError:
            ids = []
        return ids if ids and max(ids) < self.vocab_size else [self.settings.pad_id]


def encoded(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """The tokens of one text, at most ``max_tokens``; of a limited number of its characters.

    Raises:
        ModelError: the library failed.
    """
    text = text[: CHARACTERS_PER_TOKEN * max_tokens].encode("utf-8", "replace").decode()  # a lone surrogate is a ?
    return _guarded(lambda: tokenizer.encode_batch_fast([text])[0].ids)[:max_tokens]


def read_tokenizer(content: bytes, settings: TextInput, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ModelError: it is none, may not read records, has more tokens than the model, or leaves no room for a text.
    """
    written = _guarded(lambda: Tokenizer.from_buffer(content).to_str())
    check_tokenizer(json.loads(written))
    tokenizer = _guarded(lambda: Tokenizer.from_str(written))  # what was checked, and nothing that was not written
    _check_tokens(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0), settings, vocab_size)
    if _guarded(lambda: tokenizer.num_special_tokens_to_add(is_pair=False)) >= settings.max_tokens:
        raise ModelError(f"max_tokens must leave room for a text, found {settings.max_tokens}: raise it")
    tokenizer.enable_truncation(settings.max_tokens)
    tokenizer.no_padding()
    for text in SAMPLES:  # a template has numbers of its own
        _check_tokens(max(encoded(tokenizer, text, settings.max_tokens), default=0), settings, vocab_size)
    return tokenizer


def positions(config: "PreTrainedConfig") -> int | None:
    """How many tokens a model has positions for; None if they do not end."""
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits: list[int] = [one for one in found if isinstance(one, int) and one > 0]
    if not limits or config.model_type in _ENDLESS:
        return None
    return min(limits) - (int(config.pad_token_id or 0) + 1 if config.model_type in _OFFSET_POSITIONS else 0)


def check_positions(config: "PreTrainedConfig", settings: TextInput) -> None:
    """Whether the model has a position for every token of the longest text.

    Raises:
        ModelError: it has fewer.
    """
    limit = positions(config)
    if limit is not None and settings.max_tokens > limit:
        raise ModelError(f"max_tokens must be at most {limit}, the model's positions, found {settings.max_tokens}: lower it")


def _check_tokens(largest: int, settings: TextInput, vocab_size: int) -> None:
    largest = max(largest, settings.pad_id)
    if largest >= vocab_size:
        raise ModelError(
            f"the tokenizer must have tokens below {vocab_size}, the model's, found {largest}: is it another model's?"
        )


def _guarded(call: Callable[[], _Given]) -> _Given:
    """Call the library: whatever it raises, a panic too, which is no Exception, is one error.

    Raises:
        ModelError: it failed.
    """
    try:
        return call()
    except _STOPS:
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"tokenizer.json must be a tokenizer, found {reason!r}: install the model again") from None
