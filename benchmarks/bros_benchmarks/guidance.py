"""`make bench-guidance`: what requests without a grammar pay for those with one beside them.

Observed clients stream greedy replies while as many companions do; in turn, the companions have no grammar, or are held
to a JSON schema. What is compared is the time between two tokens of the observed clients. A round that warms up, and
has the grammar compiled, does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import string
import time
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
import tokenizers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import decoders, models, pre_tokenizers

from bros_benchmarks.checkpoint import SMOLLM2_135M, make_checkpoint
from bros_benchmarks.client import encode_body, open_session, stream_tokens
from bros_benchmarks.server_under_test import ServerUnderTest

_NUM_NEW_TOKENS: Final = 96
#: More than are generated while the observed clients are served.
_NUM_COMPANION_TOKENS: Final = 1000
_NUM_PROMPT_CHARACTERS: Final = 200
#: Replies that do not end before their last token.
_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 1000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer"},
                    "role": {"enum": ["user", "admin", "guest"]},
                },
                "required": ["name", "age", "role"],
            },
        }
    },
    "required": ["people"],
}


def make_guided_checkpoint(folder: Path) -> Path:
    """The checkpoint of other benchmarks, with a tokenizer whose tokens are texts: bytes, and words of two to four
    letters. Made once."""
    model = make_checkpoint(SMOLLM2_135M, folder)
    path = folder / f"{model.name}-letters"
    if (path / "tokenizer.json").exists():
        return path
    shutil.copytree(model, path, dirs_exist_ok=True, copy_function=os.link)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [*itertools.product(string.ascii_lowercase, string.ascii_lowercase)]
    joined = ["".join(pair) for pair in pairs]
    merges = [*pairs, *itertools.product(joined, string.ascii_lowercase), *itertools.product(joined, joined)]
    merges = merges[: SMOLLM2_135M.vocab_size - 1 - len(alphabet)]
    vocabulary = ["</s>", *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (path / "tokenizer.json").unlink()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def guided_body(prompt: str) -> bytes:
    """As `encode_body`, for a reply that matches the schema."""
    parameters = {"max_new_tokens": _NUM_COMPANION_TOKENS, "grammar": {"type": "json", "value": _SCHEMA}}
    return msgspec.json.encode({"inputs": prompt, "parameters": parameters})


async def gaps_ms(url: str, num_clients: int, *, is_guided: bool, seed: int) -> list[float]:
    """Times between two tokens of the observed clients."""
    generator = random.Random(seed)
    prompts = [
        "".join(generator.choices(string.ascii_lowercase + " ", k=_NUM_PROMPT_CHARACTERS))
        for _ in range(2 * num_clients)
    ]
    bodies = [encode_body(prompt, _NUM_NEW_TOKENS) for prompt in prompts[:num_clients]]
    companion_bodies = [
        guided_body(prompt) if is_guided else encode_body(prompt, _NUM_COMPANION_TOKENS)
        for prompt in prompts[num_clients:]
    ]
    async with open_session() as session:
        companions = [_Companion(session, url, body) for body in companion_bodies]
        for companion in companions:
            await companion.has_begun.wait()
        observed = await asyncio.gather(*(_token_times(session, url, body) for body in bodies))
        for companion in companions:
            await companion.stop()
    return [1000 * (late - early) for times in observed for early, late in itertools.pairwise(times)]


async def _token_times(session: aiohttp.ClientSession, url: str, body: bytes) -> list[float]:
    times: list[float] = []
    await stream_tokens(session, url, body, lambda: times.append(time.perf_counter()))
    return times


class _Companion:
    """Streams until it is stopped: begun before the observed clients are, and not ended before they have."""

    def __init__(self, session: aiohttp.ClientSession, url: str, body: bytes) -> None:
        self.has_begun = asyncio.Event()
        self._streaming = asyncio.create_task(stream_tokens(session, url, body, self.has_begun.set))
        self._streaming.add_done_callback(lambda _: self.has_begun.set())

    async def stop(self) -> None:
        """Raises `AssertionError` where it had ended already."""
        assert self._streaming.cancel(), "a companion's reply was too short"
        await asyncio.gather(self._streaming, return_exceptions=True)


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4, help="observed clients, and companions")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model = make_guided_checkpoint(options.folder)
    kinds = {"without a grammar": False, "held to a schema": True}
    rounds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with ServerUnderTest(model, options.threads, options.folder / "guidance.log") as server, Progress() as progress:
        for number in progress.track(range(options.rounds + 1), description="rounds"):
            for name, is_guided in kinds.items():
                gaps = asyncio.run(gaps_ms(server.url, options.clients, is_guided=is_guided, seed=number))
                if number > 0:
                    rounds[name].append(gaps)
    table = Table("companions", "ms between tokens, p50", "p99")
    for name, of_rounds in rounds.items():
        medians = [statistics.median(gaps) for gaps in of_rounds]
        tails = [p99(gaps) for gaps in of_rounds]
        table.add_row(name, f"{statistics.median(medians):.1f}", f"{statistics.median(tails):.1f}")
    console = Console()
    console.print(table)
    free, guided = rounds.values()
    ratios = [p99(late) / p99(early) for early, late in zip(free, guided, strict=True)]
    console.print(f"p99 ratio, median of {options.rounds} rounds: {statistics.median(ratios):.3f}")
    console.print(json.dumps({"p99_ratios": [round(ratio, 3) for ratio in ratios]}))


if __name__ == "__main__":
    main()
