"""The encoder: a Hugging Face model with pooling, normalisation and prompts."""

from hbt_fast.encoder.model import Encoder, EncoderError

__all__ = ["Encoder", "EncoderError"]
