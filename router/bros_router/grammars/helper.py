"""The grammar helper: a process that vets grammars for the router, and may not do much else.

    python -m bros_router.grammars.helper tokenizer.json 49152 0,2

Its arguments are those of `GrammarCompiler`. A grammar is vetted by compiling it, as a rank will, and asking for the
tokens that a text may begin with.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from bros_router.grammars.protocol import (
    MAX_REASON_CHARACTERS,
    GrammarSource,
    Refused,
    RegexSource,
    Rule,
    VetReply,
    Vetted,
)
from bros_router.grammars.writer import RefusedGrammarError, warm_up, write
from bros_router.helper.loop import give_up_resources, serve
from bros_shard.grammar_compiler import GrammarCompiler, GrammarError, is_broken
from bros_shard.protocol import MAX_GRAMMAR_BYTES

#: The tokenizer included, of which large ones take some hundred megabytes.
_MEMORY_LIMIT_BYTES: Final = 2 * 2**30
#: Seconds of processor time. Rank 0 compiles again, and where that has not ended when the prompt is computed, every
#: sequence of the step waits for it. Schemas of a hundred properties take some milliseconds.
_COMPILE_LIMIT_S: Final = 0.25

_source_decoder: msgspec.json.Decoder[GrammarSource] = msgspec.json.Decoder(GrammarSource)


def main() -> None:
    """Serve until the router closes stdin."""
    tokenizer, vocab_size, eos_token_ids = sys.argv[1:]
    compiler = None
    try:
        compiler = GrammarCompiler(Path(tokenizer), int(vocab_size), [int(item) for item in eos_token_ids.split(",")])
    except GrammarError as error:
        print(error, file=sys.stderr)
    warm_up()
    give_up_resources(_MEMORY_LIMIT_BYTES)
    serve(lambda body: _answer(compiler, body))


def _answer(compiler: GrammarCompiler | None, body: bytes) -> VetReply:
    try:
        if compiler is None:
            raise RefusedGrammarError("unsupported")
        return Vetted(_vetted(compiler, _source_decoder.decode(body)))
    except RefusedGrammarError as error:
        return Refused(error.rule, _public(str(error)))
    except RecursionError:
        return Refused("invalid", "recursion limit exceeded")
    except MemoryError:
        return Refused("uncompilable", "it takes too much memory")


def _vetted(compiler: GrammarCompiler, source: GrammarSource) -> str:
    grammar = write(source)
    rule: Rule = "invalid" if isinstance(source, RegexSource) else "uncompilable"
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise RefusedGrammarError(rule, f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
    started_s = time.thread_time()
    try:
        matcher = compiler.compile(grammar)
    except GrammarError as error:
        raise RefusedGrammarError(rule, str(error)) from None
    matcher.compute_bitmask()
    if is_broken(matcher):
        raise RefusedGrammarError(rule, "nothing matches it, or it is too complex")
    if time.thread_time() - started_s > _COMPILE_LIMIT_S:
        raise RefusedGrammarError(rule, "it takes too long")
    return grammar


def _public(reason: str) -> str:
    return reason[:MAX_REASON_CHARACTERS].encode(errors="replace").decode()


if __name__ == "__main__":
    main()
