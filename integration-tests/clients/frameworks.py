"""Talks to a server with LangChain, LiteLLM and LlamaIndex, unmodified, and prints what came back as JSON.

Usage: frameworks.py URL, in an environment that has `langchain-openai`, `langchain-huggingface`, `litellm` and
`llama-index-llms-huggingface-api`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from enum import Enum
from typing import Any

import litellm
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI
from pydantic import BaseModel

QUESTION, PROMPT = "What does str.strip do?", "Return a list of the"


class Kind(str, Enum):
    """What a model that knows nothing can only say one of."""

    STR = "str"
    BYTES = "bytes"


class Answer(BaseModel):
    """A reply that ends."""

    kind: Kind
    is_list: bool


@tool
def describe(kind: Kind, is_list: bool) -> str:
    """Describe a kind."""
    return f"{kind} {is_list}"


def langchain_openai(url: str) -> dict[str, Any]:
    """Chats, structured replies, tools, completions."""
    how: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "-", "model": "tgi", "temperature": 0}
    chat = ChatOpenAI(max_tokens=12, **how)
    long = ChatOpenAI(max_tokens=100, **how)
    whole = chat.invoke(QUESTION)
    chunks = list(ChatOpenAI(max_tokens=12, stream_usage=True, **how).stream(QUESTION))
    likely = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    forced = long.bind_tools([describe], tool_choice="describe")
    called = forced.invoke(QUESTION)
    streamed = list(forced.stream(QUESTION))
    joined = streamed[0]
    for chunk in streamed[1:]:
        joined = joined + chunk
    results = [ToolMessage("done", tool_call_id=call["id"]) for call in called.tool_calls]
    history = [HumanMessage(QUESTION), AIMessage("", tool_calls=called.tool_calls), *results]
    completion = OpenAI(max_tokens=12, **how)
    choices = OpenAI(max_tokens=4, n=2, best_of=2, **how | {"temperature": 1.0}).generate([PROMPT])
    return {
        "chat": whole.content,
        "chat_stream": "".join(chunk.content for chunk in chunks),
        "chat_async": asyncio.run(chat.ainvoke(QUESTION)).content,
        "chat_batch": [message.content for message in chat.batch([QUESTION, QUESTION])],
        "usage": whole.usage_metadata["output_tokens"],
        "stream_usage": [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata],
        "num_likely": [len(token["top_logprobs"]) for token in likely],
        "structured": [
            long.with_structured_output(Answer, method=method).invoke(QUESTION).model_dump()
            for method in ("json_schema", "function_calling")
        ],
        "call": called.tool_calls[0]["args"],
        "call_stream": joined.tool_calls[0]["args"],
        "any_call": long.bind_tools([describe], tool_choice="any").invoke(QUESTION).tool_calls[0]["name"],
        "after_call": chat.bind_tools([describe]).invoke(history, tool_choice="none").content,
        "completion": completion.invoke(PROMPT),
        "completion_stream": "".join(completion.stream(PROMPT)),
        "completion_batch": completion.batch([PROMPT, PROMPT]),
        "num_choices": len(choices.generations[0]),
    }


def langchain_huggingface(url: str) -> dict[str, Any]:
    """TGI's own route, with all that this client sends to it, and chats."""
    endpoint = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=12, seed=1, stop_sequences=["\n\n\n"])
    chat = ChatHuggingFace(llm=HuggingFaceEndpoint(endpoint_url=url), model_id="tgi", max_tokens=60)
    seeded = chat.bind(seed=1)
    tools = chat.bind_tools([describe], tool_choice="describe")
    return {
        "text": endpoint.invoke(PROMPT),
        "stream": "".join(endpoint.stream(PROMPT)),
        "chat": seeded.invoke(QUESTION).content,
        "chat_stream": "".join(chunk.content for chunk in seeded.stream(QUESTION)),
        "call": tools.invoke(QUESTION).tool_calls[0]["name"],
    }


def lite_llm(url: str) -> dict[str, Any]:
    """As an OpenAI server, and as a Hugging Face endpoint."""
    messages = [{"role": "user", "content": QUESTION}]
    how: dict[str, Any] = {"api_key": "-", "messages": messages, "temperature": 0}
    openai: dict[str, Any] = how | {"model": "openai/tgi", "api_base": f"{url}/v1"}
    function = {"name": "describe", "description": "", "parameters": Answer.model_json_schema()}
    called = litellm.completion(
        **openai, max_tokens=100, tools=[{"type": "function", "function": function}], tool_choice="required"
    )
    chunks = litellm.completion(**openai, max_tokens=12, stream=True)
    text = litellm.text_completion(
        model="text-completion-openai/tgi",
        api_base=f"{url}/v1",
        api_key="-",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
    )
    formatted = litellm.completion(**openai, max_tokens=100, response_format=Answer)
    hub = litellm.completion(**how, model="huggingface/tgi", api_base=url, max_tokens=12)
    return {
        "chat": litellm.completion(**openai, max_tokens=12).choices[0].message.content,
        "chat_stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "hub_chat": hub.choices[0].message.content,
        "completion": text.choices[0].text,
        "structured": json.loads(formatted.choices[0].message.content),
        "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
    }


def llama_index(url: str) -> dict[str, Any]:
    """Chats, and prompts, which this client sends as chats."""
    model = HuggingFaceInferenceAPI(model_name=url, num_output=12, temperature=0.01)
    messages = [ChatMessage(role="user", content=QUESTION)]
    return {
        "chat": model.chat(messages).message.content,
        "chat_stream": "".join(chunk.delta for chunk in model.stream_chat(messages)),
        "chat_async": asyncio.run(model.achat(messages)).message.content,
        "completion": model.complete(QUESTION).text,
    }


if __name__ == "__main__":
    address = sys.argv[1]
    parts = (langchain_openai, langchain_huggingface, lite_llm, llama_index)
    print(json.dumps({part.__name__: part(address) for part in parts}))
