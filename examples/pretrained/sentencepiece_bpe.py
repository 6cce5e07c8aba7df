"""SentencePiece BPE: the tokenizers of Llama 2 and the first Mistral, from a GGUF file.

Such a file holds pieces with scores and no merges: of all neighbours whose union is a piece, those
whose union has the best score merge first. Text without a piece is spelled in tokens of bytes.
"""

from collections.abc import Iterator, Mapping

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

from pretrained.errors import ModelError
from pretrained.metadata import Metadata

SPACE = "\u2581"  # what SentencePiece writes for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_bpe(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer, without special tokens.

    As in llama.cpp, a space is put before a text and before what follows a special token. Unlike
    there, a piece is made of pieces: SentencePiece, which trains them, knows no others.

    Raises:
      ModelError: a token of a byte is missing, so that some text could not be spelled, or the
        scores do not say what merges first.
    """
    ids = {token: at for at, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    if missing := [byte for byte in BYTES if byte not in ids]:
        raise ModelError(
            f"tokenizer.ggml.tokens lacks {len(missing)} of the 256 tokens of bytes, the first is "
            f"{missing[0]}, so some text has no tokens: use the model's Hugging Face folder"
        )
    merges = merges_of(_pieces(metadata))
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True))
    spaces = [normalizers.Replace(" ", SPACE)]
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def merges_of(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of pieces whose union is a piece, the best score of a union first.

    Raises:
      ModelError: all unions have one score.
    """
    unions = {piece: tuple(_splits(piece, pieces)) for piece in pieces}
    scores = {pieces[piece] for piece, pairs in unions.items() if pairs}
    if len(scores) == 1 and sum(map(bool, unions.values())) > 1:
        raise ModelError(
            f"all of tokenizer.ggml.scores are {scores.pop():g}, which does not say what merges "
            "first: use the model's Hugging Face folder"
        )
    best = sorted(pieces, key=pieces.__getitem__, reverse=True)
    return [pair for piece in best for pair in unions[piece]]


def _pieces(metadata: Metadata) -> dict[str, float]:
    """The scores of what text can merge into."""
    names = ("tokens", "scores", "token_type")
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in names)
    merging = (TokenType.NORMAL, TokenType.UNUSED)
    return {token: score for token, score, kind in zip(*columns, strict=True) if kind in merging}


def _splits(piece: str, pieces: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        left, right = piece[:at], piece[at:]
        if left in pieces and right in pieces:
            yield left, right
