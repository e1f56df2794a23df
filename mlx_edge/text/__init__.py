"""Text to tokens and back: tokenizer, chat template, streaming detokenizer, stop strings.

Floor 1. Knows no model and imports no MLX; `tokenizers`, `sentencepiece` and `jinja2` are imported
when one of them is needed, never all three.
"""

from mlx_edge.text.detokenizer import StreamingDetokenizer
from mlx_edge.text.stop import StopMatcher
from mlx_edge.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["StopMatcher", "StreamingDetokenizer", "Tokenizer", "load_tokenizer"]
