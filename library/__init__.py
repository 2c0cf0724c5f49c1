"""longreach as a library: decode and prefill methods on a Hugging Face model, in this process."""

from library.attached import Attached, attach
from library.decode import DECODE_METHODS, DecodeMethod, decode_names, parse_decode

__all__ = [
    "DECODE_METHODS",
    "Attached",
    "DecodeMethod",
    "attach",
    "decode_names",
    "parse_decode",
]
