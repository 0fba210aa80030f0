"""The model served when none is given: where its files lie. Imports nothing, so that the router may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: A Hugging Face model folder: config, generation config, tokenizer and one safetensors file.
DIRECTORY: Final = Path(__file__).parent
