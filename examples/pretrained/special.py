"""Special tokens: what ends an answer, opens a text and fills a row."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from pretrained.errors import ModelError


class Special(NamedTuple):
    """Special tokens, as `Source` explains them."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int


def find_special(
    tokenizer: Tokenizer, words: Mapping[str, str], settings: Iterable[Mapping[str, Any]]
) -> Special:
    """Special tokens of a Hugging Face folder.

    Args:
      tokenizer: of the folder.
      words: the tokenizer's own, such as `{"eos_token": "</s>"}`.
      settings: the objects of generation_config.json and config.json.
    """
    ids = {name: tokenizer.token_to_id(word) for name, word in words.items()}
    said = [ids.get("eos_token"), *_numbers(settings, "eos_token_id")]
    eos = tuple(dict.fromkeys(token for token in said if token is not None))
    pad = _pad([ids.get("pad_token"), *_numbers(settings, "pad_token_id")], eos)
    return Special(eos, first_token(tokenizer), pad)


def first_token(tokenizer: Tokenizer) -> int | None:
    """The token that a tokenizer puts in front of every text, if it does.

    What tokenizer_config.json says of it, transformers does not follow either.
    """
    with_it, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    opens = len(with_it.ids) > len(without.ids) and with_it.special_tokens_mask[0] == 1
    return with_it.ids[0] if opens else None


def check_vocabulary(tokenizer: Tokenizer, special: Special, rows: int) -> None:
    """Refuse a tokenizer with tokens that the embedding lacks; unused rows do no harm.

    Raises:
      ModelError: there is such a token.
    """
    top = max([*tokenizer.get_vocab().values(), *special.eos, special.pad])
    if top >= rows:
        raise ModelError(
            f"the tokenizer has a token {top}, but the embedding has {rows} rows (tokens 0 to "
            f"{rows - 1}): tokenizer and weights are of different models"
        )


def _pad(said: Iterable[int | None], eos: tuple[int, ...]) -> int:
    return next((token for token in said if token is not None and token >= 0), (*eos, 0)[0])


def _numbers(settings: Iterable[Mapping[str, Any]], name: str) -> list[int]:
    """The numbers under a name, which may be one or a list, in the order of the settings."""
    found = [said.get(name) for said in settings]
    lists = [value if isinstance(value, list) else [value] for value in found]
    return [token for several in lists for token in several if token is not None]
