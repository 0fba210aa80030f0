"""Talks to a server with TGI's own client, sync and async, and prints what came back as JSON.

Usage: tgi_client.py URL PROMPT, in an environment that has `text-generation` 0.7.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

#: What needs no particular server.
DETAILS = {"max_new_tokens": 4, "do_sample": True, "watermark": True, "top_n_tokens": 2}


def talk(client: Client, prompt: str) -> dict[str, Any]:
    """Plain, streamed, refused, and in detail."""
    response = client.generate(prompt, max_new_tokens=8)
    stream = "".join(event.token.text for event in client.generate_stream(prompt, max_new_tokens=8))
    error = "none"
    try:
        client.generate(prompt, max_new_tokens=8, truncate=10_000_000)
    except ValidationError as caught:
        error = type(caught).__name__
    best = client.generate(prompt, best_of=2, decoder_input_details=True, **DETAILS).details
    events = [*client.generate_stream(prompt, **DETAILS)]
    return {
        "num_best_of_sequences": len(best.best_of_sequences),
        "num_top_tokens": [len(best.top_tokens), *(len(event.top_tokens) for event in events)],
        "plain": response.generated_text,
        "stream": stream,
        "finish_reason": response.details.finish_reason.value,
        "error": error,
    }


async def talk_async(client: AsyncClient, prompt: str) -> dict[str, Any]:
    """The same, asynchronously."""
    response = await client.generate(prompt, max_new_tokens=8)
    texts = [event.token.text async for event in client.generate_stream(prompt, max_new_tokens=8)]
    error = "none"
    try:
        await client.generate(prompt, max_new_tokens=8, truncate=10_000_000)
    except ValidationError as caught:
        error = type(caught).__name__
    best = (await client.generate(prompt, best_of=2, decoder_input_details=True, **DETAILS)).details
    events = [event async for event in client.generate_stream(prompt, **DETAILS)]
    return {
        "num_best_of_sequences": len(best.best_of_sequences),
        "num_top_tokens": [len(best.top_tokens), *(len(event.top_tokens) for event in events)],
        "plain": response.generated_text,
        "stream": "".join(texts),
        "finish_reason": response.details.finish_reason.value,
        "error": error,
    }


def main() -> None:
    """Talk both ways."""
    url, prompt = sys.argv[1:]
    print(json.dumps({"sync": talk(Client(url), prompt), "async": asyncio.run(talk_async(AsyncClient(url), prompt))}))


if __name__ == "__main__":
    main()
