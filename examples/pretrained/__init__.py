"""Pretrained Llamas: Hugging Face folders and GGUF files, loaded tensor by tensor."""

from pretrained.chat import Chat
from pretrained.errors import ModelError
from pretrained.opening import open_model
from pretrained.source import Source

__all__ = ["Chat", "ModelError", "Source", "open_model"]
