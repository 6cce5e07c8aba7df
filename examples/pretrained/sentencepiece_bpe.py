"""SentencePiece BPE: the tokenizers of Llama 2 and the first Mistral, from a GGUF file.

Such a file holds pieces with scores and no merges: of all neighbours whose union is a piece, those
whose union has the best score merge first. Text without a piece is spelled in tokens of bytes.
"""

from collections.abc import Iterator, Mapping

from tokenizers import Tokenizer, decoders, models, normalizers

from pretrained.errors import ModelError
from pretrained.metadata import Metadata

NORMAL, UNKNOWN = (
    1,
    2,
)  # gguf's types of tokens: pieces that text merges into, and the one for the rest
SPACE = "\u2581"  # what SentencePiece writes for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_bpe(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer, without special tokens.

    As in llama.cpp, a space is put before a text and before what follows a special token.

    Raises:
      ModelError: a token of a byte is missing, so that some text could not be spelled.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    ids = {token: at for at, token in enumerate(tokens)}
    if missing := [byte for byte in BYTES if byte not in ids]:
        raise ModelError(
            f"tokenizer.ggml.tokens lacks {len(missing)} of the 256 tokens of bytes, the first is "
            f"{missing[0]}: a SentencePiece tokenizer without them is not supported"
        )
    scores = metadata["tokenizer.ggml.scores"]
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == NORMAL
    }
    unknown = next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None
    )
    bpe = models.BPE(ids, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces = [normalizers.Replace(" ", SPACE)]
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def merges_of(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of pieces whose union is a piece, the best score of a union first."""
    best = sorted(pieces, key=pieces.__getitem__, reverse=True)
    return [pair for piece in best for pair in _splits(piece, pieces)]


def _splits(piece: str, pieces: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        left, right = piece[:at], piece[at:]
        if left in pieces and right in pieces:
            yield left, right
