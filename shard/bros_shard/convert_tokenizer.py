"""One-shot helper: turns a slow tokenizer into the `tokenizer.json` that the router reads.

    python -m bros_shard.convert_tokenizer MODEL_FOLDER TARGET_FILE

Exit status 4, and the reason as the last line of stderr, where it cannot.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from bros_shard.exit_codes import ExitCode
from bros_shard.lifeline import die_with_parent

#: The library explains at length.
_MAX_REASON_LENGTH: Final = 200


def convert(model_path: Path, target: Path) -> None:
    """Write the fast form of the tokenizer in `model_path` to `target`. Runs no code of the model's.

    Raises:
        ValueError: `transformers` knows no fast form of it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast form")
    backend.save(str(target))


def main() -> None:
    """Convert, or say why not."""
    die_with_parent()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # whatever a broken file provokes in the library
        reason = " ".join(str(error).split())
        print(f"{type(error).__name__}: {reason[:_MAX_REASON_LENGTH]}", file=sys.stderr)
        sys.exit(ExitCode.BAD_CHECKPOINT)


if __name__ == "__main__":
    main()
