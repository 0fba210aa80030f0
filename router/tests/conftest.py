"""What the tests of the HTTP side share: small real tokenizers, an engine that plays a script, a server on a socket."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bros_router.admission import AdmissionController
from bros_router.api.call import Timeouts
from bros_router.app import create_app, create_runner
from bros_router.chat_templates.source import ChatTemplate
from bros_router.config import ApiConfig
from bros_router.grammars.vetter import GuidedVocabulary
from bros_router.metrics import Metrics
from bros_router.request import Finish, FinishReason, RequestClass, Terms, Token, TokenEvent, ValidRequest
from bros_router.scheduling.latency_model import LatencyModel
from bros_router.service import Phase, ServedModel, Service
from bros_router.tokenizer import Tokenizer
from bros_shard.protocol import StepShape

BOS_ID, EOS_ID = 0, 1

#: `user: Hi`, a line each, then `assistant: `.
CHAT_TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    {"bos_token": "<s>", "eos_token": "</s>"},
)


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In GPT-2's manner: a token for every byte, a few merges, `<s>` before every prompt."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["hello world, how are you? 你好 🙂"] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return _saved(tokenizer, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def guided_vocabulary(byte_level_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> GuidedVocabulary:
    """What grammars are compiled for, where the tokenizer is the byte-level one."""
    path = tmp_path_factory.mktemp("guided") / "tokenizer.json"
    byte_level_tokenizer.save(path)
    return GuidedVocabulary(path, 300, frozenset({EOS_ID}))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In Llama's manner: words that begin with `▁`, bytes as `<0xNN>` for every other character."""
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"helowrd,?", "he", "ll", "hell", "hello", "▁hello", "▁w", "▁wo"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w"), ("▁w", "o")]
    tokenizer = FastTokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return _saved(tokenizer, tmp_path_factory.mktemp("sentencepiece"))


def _saved(tokenizer: FastTokenizer, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


class AffineModel(LatencyModel):
    """A latency model that is known and does not learn: a second a step, a hundredth a token."""

    margin = 1.0

    def predict_s(self, shape: StepShape) -> float:
        return 1.0 + 0.01 * (shape.num_prefill_tokens + shape.num_decode_sequences)

    def bound_s(self, shape: StepShape) -> float:
        return self.margin * self.predict_s(shape)


@pytest.fixture
def latency_model() -> AffineModel:
    """A second a step, a hundredth a token; its margin may be set."""
    return AffineModel()


class ScriptedGeneration:
    """One reply of the scripted engine."""

    def __init__(self, engine: "ScriptedEngine", sequence_id: int, terms: Terms) -> None:
        self.terms = terms
        self._script = engine.next_scripts.pop(0) if engine.next_scripts else None
        self._engine = engine
        self._sequence_id = sequence_id

    def __enter__(self) -> "ScriptedGeneration":
        self._engine.num_running += 1
        self._engine.started.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.num_running -= 1
        self._engine.admission.ended(self._sequence_id)
        self._engine.ended.set()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        for item in self._engine.script if self._script is None else self._script:
            if isinstance(item, asyncio.Event):
                await item.wait()
            elif isinstance(item, Exception):
                raise item
            else:
                yield item


@dataclass
class ScriptedEngine:
    """The engine's side of the seam: answers every request with the same script.

    An event in the script is sent, an `asyncio.Event` waited for, an exception raised. Admission is the real one, over
    a latency model that is known; nothing that was admitted is ever computed.
    """

    script: Iterable[TokenEvent | asyncio.Event | Exception]
    #: For the next requests instead, one each.
    next_scripts: list[Iterable[TokenEvent | asyncio.Event | Exception]] = field(default_factory=list)
    is_healthy: bool = True
    #: Raised by the next `submit`.
    refusal: Exception | None = None
    admission: AdmissionController = field(default_factory=lambda: AdmissionController(AffineModel(), 512, 1024))
    requests: list[ValidRequest] = field(default_factory=list)
    num_running: int = 0
    #: A generation was entered, and left.
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, request: ValidRequest) -> ScriptedGeneration:
        if self.refusal is not None:
            raise self.refusal
        now_s = time.monotonic()
        terms = self.admission.judge(request, now_s)
        sequence_id = len(self.requests)
        self.admission.accepted(sequence_id, request, terms, now_s)
        self.requests.append(request)
        return ScriptedGeneration(self, sequence_id, terms)

    def drain_s(self, request_class: RequestClass) -> float:
        return self.admission.drain_s(request_class, time.monotonic())


def reply_of(*texts: str, reason: FinishReason = FinishReason.LENGTH) -> list[TokenEvent]:
    """A whole reply of these texts; `</s>` is the EOS token, other tokens are numbered from 10."""
    tokens = [
        Token(EOS_ID, text, -0.125, True) if text == "</s>" else Token(10 + n, text, -0.5, False)
        for n, text in enumerate(texts)
    ]
    generated_text = "".join(token.text for token in tokens if not token.is_special)
    finish = Finish(reason, generated_text, len(tokens), first_scheduled_s=0.0, finished_s=0.25)
    events = [TokenEvent(token, "" if token.is_special else token.text) for token in tokens]
    return [*events[:-1], replace(events[-1], finish=finish)]


class SocketServer(TestServer):
    """The library's test server, run as the real one is."""

    async def _make_runner(self, **_: object) -> web.BaseRunner:
        return create_runner(self.app)


@dataclass
class Server:
    """A server on a socket, and what is behind it."""

    client: "TestClient[object, object]"
    service: Service
    engine: ScriptedEngine
    metrics: Metrics

    async def exchange(self, data: bytes, *, end: bytes = b"") -> bytes:
        """Send raw bytes on a new connection; what comes back until it closes, or until `end` has come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.client.port)
        writer.write(data)
        answer = await (reader.readuntil(end) if end else reader.read())
        writer.close()
        return answer

    async def metric_lines(self) -> list[str]:
        """The lines of `/metrics` that are not comments."""
        text = await (await self.client.get("/metrics")).text()
        return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.fixture(name="reply_of")
def reply_of_fixture() -> Callable[..., list[TokenEvent]]:
    """`reply_of("Hello", "</s>", reason=...)`: the events of a whole reply."""
    return reply_of


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve(byte_level_tokenizer: Tokenizer) -> AsyncIterator[Serve]:
    """Starts servers that are ready: `await serve(ApiConfig(...), timeouts=...)`."""
    clients = []

    async def start(
        config: ApiConfig | None = None,
        *,
        tokenizer: Tokenizer = byte_level_tokenizer,
        chat_template: ChatTemplate | None = CHAT_TEMPLATE,
        pipeline_tag: str | None = None,
        guided: GuidedVocabulary | None = None,
        adapter_ids: tuple[str, ...] = (),
        max_input_tokens: int = 60,
        max_total_tokens: int = 64,
        timeouts: Timeouts | None = None,
    ) -> Server:
        service, engine, metrics = Service(), ScriptedEngine(reply_of("Hello", " world")), Metrics()
        service.engine, service.phase = engine, Phase.READY
        service.model = ServedModel(
            model_id="acme/tiny",
            model_sha="0123abcd",
            pipeline_tag=pipeline_tag,
            tokenizer=tokenizer,
            chat_template=chat_template,
            vocab_size=300,
            eos_token_ids=frozenset({EOS_ID}),
            max_input_tokens=max_input_tokens,
            max_total_tokens=max_total_tokens,
            compute_type="1-cpu",
            guided=guided,
            adapter_ids=adapter_ids,
        )
        app = create_app(config or ApiConfig(), service, metrics, timeouts)
        client = TestClient(SocketServer(app))
        await client.start_server()
        clients.append(client)
        return Server(client, service, engine, metrics)

    yield start
    for client in clients:
        await client.close()
