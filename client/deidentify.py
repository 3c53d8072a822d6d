"""De-identification while records are read, by rules that the site declares per column; nothing else sees the value before.

Covered:
    * drop: the column is never read;
    * keyed_hash: HMAC-SHA256 under the site's data key, so that equal values stay equal here and mean nothing elsewhere;
    * generalise: a date to its year or month, a number to the lower end of its band (declared ends), a code to its prefix;
    * scrub: links, e-mail and IP addresses, IBANs in capitals, card numbers (Luhn), dates in digits or with a month's
      name, phone numbers, social security numbers, runs of six and more digits, declared names and expressions become
      fixed tokens;
    * patterns run in RE2, the site's own too: time grows linearly with the text, whatever the text and the expression are;
      look-alikes are folded first (Unicode NFKC, digits of all scripts, invisible characters removed).
Not covered:
    * names, places and employers that nobody declared: patterns do not find them, and no list finds misspellings;
    * dates and numbers in words, numbers of up to five digits, what is identifying by its meaning ("the mayor's wife");
    * pseudonyms are not anonymity: who holds the data key can link them, and rare combinations of columns identify a person;
    * pixels: burnt-in text and faces stay; only the pixels of a file are kept, so its metadata (EXIF) goes.
    What protects a person in what leaves the site is the noise; these rules limit what lies in this site's memory and models.
"""

import hmac
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import Section

if TYPE_CHECKING:
    import pyarrow as pa

Column = Annotated[str, Field(min_length=1, max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Literally = Annotated[str, Field(min_length=2, max_length=100)]
Expression = Annotated[str, Field(min_length=1, max_length=200)]  # in RE2's syntax: no look-around, no back-references

_MONTHS = (  # how they begin in English, German, French, Italian and Spanish
    r"(?:jan|feb|fév|mar|mär|apr|avr|abr|may|mai|mag|jun|juin|giu|jul|juil|lug|aug|aoû|ago|sep|set|oct|okt|ott|nov|dec|dez|déc"
    r"|dic|ene|gen)"
)
PATTERNS: Mapping[str, str] = {  # applied in this order; RE2
    "URL": r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"]+",
    "EMAIL": r"[^\s@<>()\[\],;:\"]{1,64}@[^\s@<>()\[\],;:\"]{1,255}",
    "IP": (
        r"\b\d{1,3}(?:\.\d{1,3}){3}\b"
        r"|(?i:[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){3,7}|[0-9a-f]{0,4}::[0-9a-f]{1,4}(?::[0-9a-f]{1,4})*)"
    ),
    "IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b",
    "DATE": (
        r"\b\d{4}[-./]\d{1,2}[-./]\d{1,2}(?:T[0-9:.]+Z?)?|\b\d{1,2}[-./]\d{1,2}[-./](?:\d{4}|\d{2})\b"
        rf"|(?i:\b\d{{1,2}}(?:st|nd|rd|th|\.|er|º)? ?(?:of |de |-)?{_MONTHS}\pL*[., -]{{0,2}}(?:de )?\d{{2,4}}\b)"
        rf"|(?i:\b{_MONTHS}\pL*\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}\b)"
    ),
    "PHONE": (
        r"(?:\+|\b00)\d{1,3}[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d{1,4}(?:[ ./-]?\d{1,4}){1,6}\b"
        r"|\(?\b\d{3}\)?[ .-]?\d{3}[ .-]\d{4}\b|\b0\d{1,5}[ /.-]{1,3}\d{3,}(?:[ .-]\d{1,4}){0,4}\b"
        r"|\(0\d{1,5}\)[ /.-]{0,3}\d{2,}(?:[ .-]?\d{2,4}){0,4}"
    ),
    "NUMBER": r"\b\d{3}[ -]\d{2}[ -]\d{4}\b|\d{6,}",
}
TOKENS = ("CARD", *PATTERNS, "NAME", "REMOVED")  # each in square brackets
_CARD = re.compile(r"\d(?:[ -]?\d){12,18}")  # nothing in it can match in two ways
_CARD_RE2 = r"\d(?:[ -]?\d){12,18}"
_WORD = re.compile(r"\w+")
MAX_NAME_WORDS = 8


class Rule(Section):
    """One of ``deidentify`` in a ``[[dataset]]`` of site.toml; a column may have several, in their order."""

    column: Column
    action: Literal["drop", "keyed_hash", "generalise", "scrub"]
    to: Literal["year", "month", "band", "prefix"] | None = None  # of generalise
    date_format: Annotated[str, Field(max_length=40)] | None = None  # of year and month; None: ISO, as 1984-03-07 ...
    width: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of a band: minimum + k width, its lower end shown
    minimum: Finite | None = None  # of the bands; what is below falls into the first one
    maximum: Finite | None = None  # of the bands; all from here on are one, as ages of 90 and more
    num_characters: Annotated[int, Field(ge=0, le=100)] | None = None  # of a prefix
    names: Annotated[tuple[Literally, ...], Field(max_length=100_000)] = ()  # of scrub: whole words, whatever their case
    expressions: Annotated[tuple[Expression, ...], Field(max_length=100)] = ()  # of scrub

    @field_validator("expressions")
    @classmethod
    def _expressions_can_run(cls, expressions: tuple[str, ...]) -> tuple[str, ...]:
        if expressions:  # pyarrow takes a tenth of a second to load
            import pyarrow as pa
            import pyarrow.compute as pc

            for number, expression in enumerate(expressions, start=1):
                try:
                    empty = pc.match_substring_regex(pa.array([""]), expression)[0].as_py()
                except pa.ArrowInvalid:
                    message = f"expression {number}: expected RE2 syntax: take out look-around and back-references"
                    raise ValueError(message) from None
                if empty:
                    raise ValueError(f"expression {number} matches nothing at all, everywhere: ask for one character or more")
        return expressions

    @field_validator("names")
    @classmethod
    def _names_have_words(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(names, start=1):
            if not 0 < len(_words(name)) <= MAX_NAME_WORDS:
                raise ValueError(f"name {number}: expected one to {MAX_NAME_WORDS} words of letters or digits")
        return names

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        given = self.model_fields_set - {"column", "action"}
        needed, allowed = _OPTIONS[self.action if self.to is None else self.to]
        if self.action == "generalise" and self.to is None:
            raise ValueError(f"column {self.column!r}: generalise needs to = year, month, band or prefix: add it")
        if (self.to is not None) != (self.action == "generalise"):
            raise ValueError(f"column {self.column!r}: to belongs to action generalise, found it at {self.action}: take it out")
        missing, foreign = sorted(needed - given), sorted(given - needed - allowed - {"to"})
        what = f"column {self.column!r}: {self.action}{f' to {self.to}' if self.to else ''}"
        if missing:
            raise ValueError(f"{what} needs {', '.join(missing)}: add it")
        if foreign:
            raise ValueError(f"{what} knows no {', '.join(foreign)}: take it out")
        if self.minimum is not None and self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"{what}: expected maximum above minimum, found {self.minimum:g} and {self.maximum:g}")
        return self


_OPTIONS: Mapping[str, tuple[set[str], set[str]]] = {  # needed, allowed
    "drop": (set(), set()),
    "keyed_hash": (set(), set()),
    "generalise": (set(), set()),
    "year": (set(), {"date_format"}),
    "month": (set(), {"date_format"}),
    "band": ({"width", "minimum", "maximum"}, set()),
    "prefix": ({"num_characters"}, set()),
    "scrub": (set(), {"names", "expressions"}),
}


def deidentified(
    column: "pa.Array", rules: Sequence[Rule], key: bytes, first_row: int, counts: Counter[str] | None = None
) -> "pa.Array":
    """A column of texts after its rules; what is missing stays missing.

    Args:
        column: texts.
        rules: of this column, in order; none is a drop.
        key: the site's data key.
        first_row: of the file, for messages.
        counts: what was scrubbed, by token, is added to it.

    Raises:
        SiteConfigError: a value is no date or no number, where a rule needs one.
    """
    for rule in rules:
        if rule.action == "scrub":
            column = _scrubbed(column, rule, Counter() if counts is None else counts)
        else:
            column = _mapped(column, _function(rule, key), rule, first_row)
    return column


def pseudonym(key: bytes, value: str) -> str:
    """What keyed_hash makes of a value: 32 hex digits, the same in every column and data set of the site."""
    return hmac.digest(key, f"pseudonym\0{value}".encode(), "sha256")[:16].hex()


def _function(rule: Rule, key: bytes) -> Callable[[str], str]:
    if rule.action == "keyed_hash":
        return lambda value: pseudonym(key, value)
    if rule.to in ("year", "month"):
        return lambda value: _date(value, rule.date_format).isoformat()[: 4 if rule.to == "year" else 7]
    if rule.to == "band":
        return lambda value: _band(float(value), rule.width or 1.0, rule.minimum or 0.0, rule.maximum or 0.0)
    return lambda value: value[: rule.num_characters or 0]


def _date(value: str, date_format: str | None) -> datetime:
    return datetime.fromisoformat(value) if date_format is None else datetime.strptime(value, date_format)


def _band(value: float, width: float, minimum: float, maximum: float) -> str:
    if value != value:
        raise ValueError
    if value >= maximum:
        return f"{maximum:g}"
    number = max(0, int((max(value, minimum) - minimum) // width))
    return f"{minimum + number * width:g}"


def _mapped(column: "pa.Array", function: Callable[[str], str], rule: Rule, first_row: int) -> "pa.Array":
    """Each different value is looked at once."""
    import pyarrow as pa

    encoded = column.dictionary_encode()
    mapped: list[str | None] = []
    for at, value in enumerate(encoded.dictionary.to_pylist()):
        try:
            mapped.append(function(value))
        except (ValueError, OverflowError):
            row = first_row + encoded.indices.to_pylist().index(at)
            needs = "a number" if rule.to == "band" else f"a date ({rule.date_format or 'as 1984-03-07'})"
            raise SiteConfigError(
                f"row {row}: expected {needs} in column {rule.column!r}, to generalise it to a {rule.to}: correct it"
            ) from None
    return pa.array(mapped, pa.string()).take(encoded.indices)


def _scrubbed(column: "pa.Array", rule: Rule, counts: Counter[str]) -> "pa.Array":
    import pyarrow.compute as pc

    # folded, or full-width digits and invisible characters would hide what the patterns look for
    column = pc.replace_substring_regex(pc.utf8_normalize(column, form="NFKC"), r"\p{Cf}", "")
    if pc.any(pc.match_substring_regex(column, r"[^\P{Nd}0-9]")).as_py():
        column = _replaced(column, _with_ascii_digits)
    for expression in rule.expressions:
        column = _without(column, expression, "REMOVED", counts)
    for token, pattern in PATTERNS.items():
        if token == "DATE":  # a card number must be seen before its digits are taken for something else
            column = _without_cards(column, counts)
        column = _without(column, pattern, token, counts)
    names = _by_first_word(rule.names)  # last: a name inside an address would hide the address
    return _replaced(column, lambda text: _without_names(text, names, counts)) if names else column


def _without(column: "pa.Array", pattern: str, token: str, counts: Counter[str]) -> "pa.Array":
    import pyarrow.compute as pc

    found = pc.sum(pc.count_substring_regex(column, pattern)).as_py() or 0
    if not found:
        return column
    counts[token] += found
    return pc.replace_substring_regex(column, pattern, f"[{token}]")


def _without_cards(column: "pa.Array", counts: Counter[str]) -> "pa.Array":
    import pyarrow.compute as pc

    def without(match: re.Match[str]) -> str:
        if not luhn(match[0]):
            return match[0]
        counts["CARD"] += 1
        return "[CARD]"

    if not pc.any(pc.match_substring_regex(column, _CARD_RE2)).as_py():
        return column
    return _replaced(column, lambda text: _CARD.sub(without, text))


def _replaced(column: "pa.Array", function: Callable[[str], str]) -> "pa.Array":
    import pyarrow as pa

    return pa.array([None if text is None else function(text) for text in column.to_pylist()], pa.string())


def _with_ascii_digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)


def luhn(number: str) -> bool:
    """Whether the digits of a text carry a card number's check digit (ISO/IEC 7812-1, annex B)."""
    digits = [int(one) for one in number if one in "0123456789"][::-1]
    return sum(digits[0::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10


def _words(text: str) -> tuple[str, ...]:
    return tuple(match[0].casefold() for match in _WORD.finditer(unicodedata.normalize("NFKC", text)))


def _by_first_word(names: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Names as words by their first one, longest first."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for words in sorted({_words(name) for name in names}, key=len, reverse=True):
        found.setdefault(words[0], []).append(words)
    return found


def _without_names(text: str, names: Mapping[str, list[tuple[str, ...]]], counts: Counter[str]) -> str:
    """One pass over the words of a text; what lies between the words of a name is not looked at."""
    spans = [match.span() for match in _WORD.finditer(text)]
    words = [text[start:end].casefold() for start, end in spans]
    parts, kept, at = [], 0, 0
    while at < len(words):
        name = next((one for one in names.get(words[at], ()) if tuple(words[at : at + len(one)]) == one), None)
        if name is not None:
            parts += [text[kept : spans[at][0]], "[NAME]"]
            kept = spans[at + len(name) - 1][1]
            counts["NAME"] += 1
        at += 1 if name is None else len(name)
    return "".join([*parts, text[kept:]])
