"""The sizes and constants of a Llama."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context frequencies of Llama 3.1 and later (`"rope_type": "llama3"`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one checkpoint of the Llama family.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream, `d` in the shapes of the model's files.
      d_ff: width of the gated MLP.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads; divides `heads`.
      head_dim: width of one head.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      tied: whether the output head is the embedding.
      attention_bias: whether q, k, v and o have biases.
      mlp_bias: whether gate, up and down have biases.
      rope_scaling: Llama 3.1's change of the rotary frequencies, if any.
      qkv_bias: whether q, k and v have biases, and o perhaps not (Qwen2).
      sliding_window: how many tokens a token sees, itself included (Mistral 7B v0.1), if not all.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no attention can have."""
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}: "
                "every key head serves the same number of query heads"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window={self.sliding_window} must be at least 1: a token sees itself. "
                "Use None for no window"
            )
