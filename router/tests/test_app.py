"""The routes: who may ask what, in which phase, and every byte that TGI's clients look at."""

import asyncio
import json

import pytest

from bros_router.admission import AdmissionController, AdmissionPolicy
from bros_router.config import ApiConfig
from bros_router.request import DeadlineError, FinishReason, GenerationError, RequestClass, ServiceUnavailableError
from bros_router.service import Phase

INFERENCE = ["/", "/generate", "/generate_stream"]
VARY = "origin, access-control-request-method, access-control-request-headers"


# --- replies


async def test_generate_answers_one_object(serve):
    server = await serve()
    response = await server.client.post("/generate", json={"inputs": "xx"})
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    assert await response.read() == b'{"generated_text":"Hello world"}'


async def test_details_are_given_where_asked_for(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hello", "</s>", reason=FinishReason.EOS_TOKEN)
    parameters = {"details": True, "do_sample": True, "seed": 2**64 - 1}
    response = await server.client.post("/generate", json={"inputs": "xx", "parameters": parameters})
    assert await response.read() == (
        b'{"generated_text":"Hello","details":{"finish_reason":"eos_token","generated_tokens":2,'
        b'"seed":18446744073709551615,"prefill":[],"tokens":['
        b'{"id":10,"text":"Hello","logprob":-0.5,"special":false},'
        b'{"id":1,"text":"</s>","logprob":-0.125,"special":true}]}}'
    )


@pytest.mark.parametrize(
    ("parameters", "is_shown"),
    [
        ({}, False),
        ({"seed": 5}, False),
        ({"seed": 5, "temperature": 0.5}, True),
        ({"seed": 5, "do_sample": True}, True),
    ],
)
async def test_the_seed_is_null_when_greedy(serve, parameters, is_shown):
    server = await serve()
    body = {"inputs": "x", "parameters": parameters | {"details": True}}
    details = (await (await server.client.post("/generate", json=body)).json())["details"]
    assert details["seed"] == (5 if is_shown else None)


async def test_a_seed_drawn_by_the_server_is_told(serve):
    server = await serve()
    body = {"inputs": "x", "parameters": {"do_sample": True, "details": True}}
    details = (await (await server.client.post("/generate", json=body)).json())["details"]
    assert details["seed"] == server.engine.requests[0].sampling.seed


@pytest.mark.parametrize(
    ("path", "pipeline_tag", "return_full_text", "text"),
    [
        ("/generate", None, None, "Hello world"),
        ("/generate", None, False, "Hello world"),
        ("/generate", None, True, "Say: Hello world"),
        ("/", None, None, "Say: Hello world"),
        ("/", None, False, "Hello world"),
        ("/", "text-generation", None, "Say: Hello world"),
        ("/", "image-text-to-text", None, "Hello world"),
        ("/", "image-text-to-text", True, "Say: Hello world"),
    ],
)
async def test_the_prompt_is_repeated_where_tgi_does(serve, path, pipeline_tag, return_full_text, text):
    server = await serve(pipeline_tag=pipeline_tag)
    for stream in (False, True):
        body = {"inputs": "Say: ", "stream": stream, "parameters": {"return_full_text": return_full_text}}
        answer = await (await server.client.post(path, json=body)).text()
        assert f'"generated_text":{json.dumps(text)}' in answer


async def test_the_compatible_route_answers_an_array_or_a_stream(serve):
    server = await serve()
    body = {"inputs": "x", "parameters": {"return_full_text": False}}
    plain = await server.client.post("/", json=body)
    assert await plain.read() == b'[{"generated_text":"Hello world"}]'
    stream = await server.client.post("/", json=body | {"stream": True})
    assert stream.headers["content-type"] == "text/event-stream"
    same = await server.client.post("/generate_stream", json=body)
    assert await stream.read() == await same.read()


async def test_generate_ignores_stream(serve):
    server = await serve()
    response = await server.client.post("/generate", json={"inputs": "x", "stream": True})
    assert await response.read() == b'{"generated_text":"Hello world"}'


async def test_headers_tell_where_the_time_went(serve):
    server = await serve()
    headers = (await server.client.post("/generate", json={"inputs": "hé🙂"})).headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == "3"
    assert headers["x-request-class"] == "rt"
    assert headers["x-queue-time"] == "0"
    assert headers["x-inference-time"] == "250"  # as scripted: first step at 0.0 s, last token at 0.25 s
    assert headers["x-time-per-token"] == "125"
    assert headers["x-prompt-tokens"] == str(len(server.engine.requests[0].prompt_token_ids))
    assert headers["x-generated-tokens"] == "2"
    assert 0 <= int(headers["x-validation-time"]) <= int(headers["x-total-time"])
    assert int(float(headers["x-compute-time"]) * 1000) == int(headers["x-total-time"])
    assert "x-accel-buffering" not in headers


async def test_errors_carry_no_timing_headers(serve):
    server = await serve()
    headers = (await server.client.post("/generate", json={"inputs": ""})).headers
    assert not [name for name in headers if name.lower().startswith("x-")]


async def test_tokenize_gives_byte_offsets_and_validates_nothing(serve, byte_level_tokenizer):
    server = await serve(ApiConfig(max_concurrent_requests=0))
    response = await server.client.post(
        "/tokenize", json={"inputs": "x🙂z", "parameters": {"truncate": 1, "top_k": -1}}
    )
    assert response.status == 200
    tokens = await response.json()
    assert [token["id"] for token in tokens] == byte_level_tokenizer.encode("x🙂z").ids
    assert tokens[0] == {"id": 0, "text": "", "start": 0, "stop": 0}
    assert tokens[1] | {"id": 0} == {"id": 0, "text": "x", "start": 0, "stop": 1}
    assert tokens[-1] | {"id": 0} == {"id": 0, "text": "z", "start": 5, "stop": 6}
    assert {(token["text"], token["start"], token["stop"]) for token in tokens[2:-1]} == {("🙂", 1, 5)}
    assert not [line for line in await server.metric_lines() if line.startswith("tgi_request_count")]


async def test_tokenize_takes_an_empty_text(serve):
    server = await serve()
    response = await server.client.post("/tokenize", json={"inputs": ""})
    assert await response.json() == [{"id": 0, "text": "", "start": 0, "stop": 0}]


async def test_info_has_exactly_tgis_keys(serve):
    server = await serve(pipeline_tag="text-generation")
    info = await (await server.client.get("/info")).json()
    version = info.pop("version")
    assert version.count(".") == 2
    assert info == {
        "model_id": "acme/tiny",
        "model_sha": "0123abcd",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 60,
        "max_total_tokens": 64,
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "text-generation-router",
        "sha": None,
        "docker_label": None,
    }


async def test_models_lists_the_one_model(serve):
    server = await serve()
    assert await (await server.client.get("/v1/models")).read() == (
        b'{"object":"list","data":[{"id":"acme/tiny","object":"model","created":0,"owned_by":"acme/tiny"}]}'
    )


async def test_adapters_are_listed_after_their_model_unless_tgis_bytes_are_asked_for(serve):
    for config, ids in ((ApiConfig(), ["acme/tiny", "one", "two"]), (ApiConfig(strict_tgi=True), ["acme/tiny"])):
        server = await serve(config, adapter_ids=("one", "two"))
        models = (await (await server.client.get("/v1/models")).json())["data"]
        assert [model["id"] for model in models] == ids
        assert {model["owned_by"] for model in models} == {"acme/tiny"}


# --- routing


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/health/live"])
async def test_head_answers_as_get_without_the_body(serve, path):
    server = await serve()
    get, head = await server.client.get(path), await server.client.head(path)
    assert (get.status, head.status) == (200, 200)
    assert await head.read() == b""
    assert head.headers.get("content-type") == get.headers.get("content-type")


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_healthy_is_an_empty_200(serve, path):
    server = await serve()
    response = await server.client.get(path)
    assert (response.status, await response.read()) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/generate", "POST"),
        ("HEAD", "/generate_stream", "POST"),
        ("PUT", "/", "GET,HEAD,POST"),
        ("POST", "/health", "GET,HEAD"),
        ("DELETE", "/info", "GET,HEAD"),
        ("PATCH", "/tokenize", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("GET", "/chat_tokenize", "POST"),
    ],
)
async def test_a_wrong_method_is_405_with_the_right_ones(serve, method, path, allow):
    server = await serve()
    response = await server.client.request(method, path)
    assert (response.status, response.headers["allow"], await response.read()) == (405, allow, b"")


@pytest.mark.parametrize(
    "path",
    ["/nope", "/generate/", "//generate", "/v1/chat/completions/", "/v1", "/v2", "/docs/x.js", "/%2e%2e/health"],
)
async def test_an_unknown_path_is_an_empty_404(serve, path):
    server = await serve()
    for method in (b"GET", b"POST"):
        head, _, body = (
            await server.exchange(
                method
                + b" "
                + path.encode()
                + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        ).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert body == b""


# --- CORS


async def responses_of_every_kind(server):
    yield await server.client.get("/health")
    yield await server.client.get("/nope")
    yield await server.client.get("/generate")
    yield await server.client.post("/generate", data=b"{", headers={"content-type": "application/json"})
    yield await server.client.post("/generate", json={"inputs": ""})
    yield await server.client.post("/generate", json={"inputs": "x"})
    yield await server.client.post("/generate_stream", json={"inputs": "x"})
    yield await server.client.options("/generate")


async def test_every_response_allows_every_origin_and_hides_what_serves_it(serve):
    server = await serve()
    statuses = []
    async for response in responses_of_every_kind(server):
        statuses.append(response.status)
        assert response.headers.getall("access-control-allow-origin") == ["*"]
        assert response.headers.getall("vary") == [VARY]
        assert "server" not in response.headers
    assert statuses == [200, 404, 405, 400, 422, 200, 200, 200]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("https://a.example", "https://a.example"), ("https://b.example", None), (None, None)],
)
async def test_listed_origins_alone_are_allowed(serve, origin, allowed):
    server = await serve(ApiConfig(cors_allow_origin=("https://a.example", "https://c.example")))
    headers = {} if origin is None else {"origin": origin}
    response = await server.client.get("/health", headers=headers)
    assert response.headers.get("access-control-allow-origin") == allowed
    assert response.headers["vary"] == VARY


@pytest.mark.parametrize("path", ["/generate", "/health", "/nope"])
async def test_preflight_is_answered_on_any_path_and_needs_no_key(serve, path):
    server = await serve(ApiConfig(api_key="secret"))
    response = await server.client.options(path, headers={"origin": "https://a.example"})
    assert (response.status, await response.read()) == (200, b"")
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == "content-type"


# --- API key


WRONG_KEYS = [None, "", "Bearer", "Bearer wrong", "bearer secret", "Bearer SECRET", "Bearer secret2", "Basic secret"]


@pytest.mark.parametrize("authorization", [*WRONG_KEYS, "secret", "Bearer s\xe9cret"])
@pytest.mark.parametrize("path", [*INFERENCE, "/tokenize", "/v1/chat/completions", "/v1/completions"])
async def test_without_the_key_the_answer_is_an_empty_401(serve, path, authorization):
    server = await serve(ApiConfig(api_key="secret"))
    headers = {} if authorization is None else {"authorization": authorization}
    # The key is judged before everything else: these bodies would be refused as well.
    for response in (
        await server.client.post(path, json={"inputs": "x"}, headers=headers),
        await server.client.post(path, data=b"{", headers=headers),
        await server.client.put(path, headers=headers),
    ):
        assert (response.status, await response.read()) == (401, b"")
        assert response.headers["access-control-allow-origin"] == "*"
    assert server.engine.requests == []


@pytest.mark.parametrize("key", ["secret", "schlüssel 🔑"])
async def test_with_the_key_everything_is_answered(serve, key):
    server = await serve(ApiConfig(api_key=key))
    for path in [*INFERENCE, "/tokenize"]:
        body = b'{"inputs":"x"}'
        answer = await server.exchange(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", [b"/%67enerate", b"/generate?x=1", b"http://other/generate", b"/generate#x"])
async def test_no_spelling_of_a_path_goes_round_the_key(serve, path):
    server = await serve(ApiConfig(api_key="secret"))
    answer = await server.exchange(
        b"POST " + path + b" HTTP/1.1\r\nHost: health\r\nConnection: close\r\n"
        b'Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{"inputs":"x"}'
    )
    assert answer.split(b" ")[1] in (b"401", b"404")
    assert server.engine.requests == []


async def test_open_routes_need_no_key(serve):
    server = await serve(ApiConfig(api_key="secret"))
    for path in ("/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/health/live", "/health/startup"):
        assert (await server.client.get(path)).status == 200
    assert (await server.client.post("/chat_tokenize", json={"messages": []})).status == 200
    assert (await server.client.put("/health")).status == 405
    assert (await server.client.post("/nope")).status == 404


# --- phases


@pytest.mark.parametrize(
    ("phase", "error", "connection"),
    [
        (Phase.RESOLVING, "The server is starting", None),
        (Phase.LOADING, "The server is starting", None),
        (Phase.WARMING, "The server is starting", None),
        (Phase.RESTARTING, "The model is restarting", None),
        (Phase.FAILED, "The model has failed", None),
        (Phase.DRAINING, "The server is shutting down", "close"),
    ],
)
async def test_nothing_is_served_until_ready(serve, phase, error, connection):
    server = await serve()
    server.service.phase = phase
    for path in [*INFERENCE, "/v1/chat/completions", "/v1/completions"]:
        response = await server.client.post(path, json={"inputs": "x"})
        assert response.status == 503
        assert await response.json() == {"error": error, "error_type": "healthcheck"}
        assert response.headers.get("connection") == connection
    for path in ("/", "/health", "/ping"):
        response = await server.client.get(path)
        assert response.status == 503
        assert await response.read() == b'{"error":"unhealthy","error_type":"healthcheck"}'
    assert (await server.client.get("/health/live")).status == 200
    assert (await server.client.get("/metrics")).status == 200
    assert server.engine.requests == []


async def test_before_the_model_is_known_only_the_phase_is_told(serve):
    server = await serve()
    server.service.phase, server.service.progress = Phase.LOADING, 0.25
    server.service.model = server.service.engine = None
    startup = await server.client.get("/health/startup")
    assert (startup.status, await startup.read()) == (503, b'{"phase":"loading","progress":0.25}')
    for method, path in (("GET", "/info"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/v1/completions")):
        response = await server.client.request(method, path, json={"inputs": "x"})
        assert (response.status, (await response.json())["error_type"]) == (503, "healthcheck")


async def test_startup_is_over_once_the_model_was_ready(serve):
    server = await serve()
    for phase in (Phase.READY, Phase.RESTARTING, Phase.DRAINING):
        server.service.phase = phase
        assert (await server.client.get("/health/startup")).status == 200


async def test_an_engine_that_makes_no_progress_is_unhealthy(serve):
    server = await serve()
    server.engine.is_healthy = False
    assert (await server.client.get("/health")).status == 503
    response = await server.client.post("/generate", json={"inputs": "x"})
    assert await response.json() == {"error": "The model is restarting", "error_type": "healthcheck"}


async def test_an_engine_that_refuses_is_503(serve):
    server = await serve()
    server.engine.refusal = ServiceUnavailableError()
    response = await server.client.post("/generate", json={"inputs": "x"})
    assert (response.status, (await response.json())["error_type"]) == (503, "healthcheck")


async def test_readiness_is_judged_again_after_the_body_arrived(serve):
    server = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    writer.write(
        b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 14\r\nExpect: 100-continue\r\n\r\n{"inputs"'
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    server.service.phase = Phase.DRAINING
    writer.write(b':"x"}')
    assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
    writer.close()


# --- failures


async def test_a_generation_error_is_424(serve, reply_of):
    server = await serve()
    server.engine.script = [reply_of("Hello", "!")[0], GenerationError("the model gave no valid token")]
    response = await server.client.post("/generate", json={"inputs": "x"})
    assert response.status == 424
    assert await response.json() == {
        "error": "Request failed during generation: the model gave no valid token",
        "error_type": "generation",
    }
    assert 'tgi_request_failure{err="generation"} 1.0' in await server.metric_lines()
    assert server.engine.num_running == 0


async def test_events_that_end_too_early_are_500(serve, reply_of):
    server = await serve()
    server.engine.script = reply_of("Hello", "!")[:1]
    response = await server.client.post("/generate", json={"inputs": "x"})
    assert response.status == 500
    assert await response.read() == b'{"error":"Incomplete generation","error_type":"incomplete_generation"}'


async def test_faults_of_ours_tell_nothing(serve):
    server = await serve()
    server.engine.script = [RuntimeError("/secret/path")]
    response = await server.client.post("/generate", json={"inputs": "x"})
    assert response.status == 500
    assert await response.read() == b'{"error":"Internal server error","error_type":"internal"}'
    assert server.engine.num_running == 0


async def test_permits_are_never_waited_for_and_always_given_back(serve, reply_of):
    server = await serve(ApiConfig(max_concurrent_requests=1))
    go_on = asyncio.Event()
    server.engine.script = [go_on, *reply_of("Hello")]
    for path in ("/generate", "/generate_stream"):
        go_on.clear()
        server.engine.started.clear()
        first = asyncio.create_task(server.client.post(path, json={"inputs": "x"}))
        await server.engine.started.wait()
        # Before any other rule: this body breaks one.
        refused = await server.client.post("/generate", json={"inputs": "", "parameters": {"top_k": 0}})
        assert refused.status == 429
        assert await refused.read() == b'{"error":"Model is overloaded","error_type":"overloaded"}'
        assert refused.headers["retry-after"] == "1"
        in_band = await server.client.post("/generate_stream", json={"inputs": "x"})
        assert in_band.status == 200
        assert await in_band.read() == b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n'
        go_on.set()
        assert (await (await first).text()).endswith(("}", "}\n\n"))
    assert 'tgi_request_failure{err="overloaded"} 4.0' in await server.metric_lines()
    assert (await server.client.post("/generate", json={"inputs": ""})).status == 422
    assert (await server.client.post("/generate", json={"inputs": "x"})).status == 200


async def test_permits_are_counted_by_class(serve, reply_of):
    """A batch dump never makes a chat answer 429, nor the other way round."""
    server = await serve(ApiConfig(max_concurrent_requests=2, max_concurrent_be_requests=200))
    go_on = asyncio.Event()
    server.engine.script = [go_on, *reply_of("Hello")]
    for request_class, other, num_permits in (("be", "rt", 200), ("rt", "be", 2)):
        go_on.clear()
        num_before = len(server.engine.requests)
        running = [asyncio.create_task(exchange(server, request_class)) for _ in range(num_permits)]
        await until(lambda num=num_before + num_permits: len(server.engine.requests) == num)
        refused = await post(server, request_class)
        assert (refused.status, (await refused.json())["error_type"]) == (429, "overloaded")
        running.append(asyncio.create_task(exchange(server, other)))
        await until(lambda num=num_before + num_permits + 1: len(server.engine.requests) == num)
        go_on.set()
        assert {answer.split(b"\r\n")[0] for answer in await asyncio.gather(*running)} == {b"HTTP/1.1 200 OK"}
    lines = await server.metric_lines()
    assert 'bros_requests_total{class="be",outcome="success"} 201.0' in lines
    assert 'bros_requests_total{class="be",outcome="overloaded"} 1.0' in lines
    assert 'bros_requests_total{class="rt",outcome="success"} 3.0' in lines
    assert 'bros_requests_total{class="rt",outcome="overloaded"} 1.0' in lines
    assert 'bros_admissions_total{class="be",admission="as_asked"} 201.0' in lines


async def post(server, request_class="rt", path="/generate", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return await server.client.post(path, json={"inputs": "x"}, headers={"x-request-class": request_class, **headers})


async def exchange(server, request_class):
    """A request on a connection of its own: the library's client opens no more than a hundred."""
    return await server.exchange(
        f"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Class: {request_class}\r\n"
        'Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{"inputs":"x"}'.encode()
    )


async def until(is_true):
    async def poll():
        while not is_true():
            await asyncio.sleep(0)

    await asyncio.wait_for(poll(), 10)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_full_queue_is_an_overload_that_says_when_to_come_again(serve, latency_model, path):
    server = await serve()
    # A token a step, so that each of a prompt's two tokens takes a little more than a second.
    bounds = {RequestClass.BE: 3}
    server.engine.admission = AdmissionController(latency_model, 1, 1024, AdmissionPolicy.QUEUE, bounds)
    go_on = asyncio.Event()
    server.engine.script = [go_on]
    first = asyncio.create_task(post(server, "be"))
    await server.engine.started.wait()
    refused = await post(server, "be", path)
    assert (await refused.read()).removeprefix(b"data: ").rstrip() == (
        b'{"error":"Model is overloaded","error_type":"overloaded"}'
    )
    assert refused.status == (429 if path == "/generate" else 200)
    assert refused.headers["retry-after"] == "3"
    go_on.set()
    await first


POLICIES = [*AdmissionPolicy]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_target_that_cannot_be_met(serve, latency_model, path, policy):
    """One prompt takes more than a second on this engine, and a millisecond is asked for."""
    server = await serve()
    server.engine.admission = AdmissionController(latency_model, 512, 1024, policy)
    response = await post(server, path=path, x_slo_ttft_ms="1", x_slo_tpot_ms="20")
    shown = {name: response.headers.get(name) for name in ("x-admission", "x-slo-ttft-ms", "x-slo-tpot-ms")}
    lines = await server.metric_lines()
    if policy is AdmissionPolicy.REJECT:
        assert response.status == (429 if path == "/generate" else 200)
        assert (await response.read()).removeprefix(b"data: ").rstrip() == (
            b'{"error":"Model is overloaded: the latency target cannot be met","error_type":"overloaded",'
            b'"code":"slo_infeasible"}'
        )
        assert response.headers["retry-after"] == "2"
        assert set(shown.values()) == {None}
        assert server.engine.requests == []
        assert 'bros_admissions_total{class="rt",admission="refused"} 1.0' in lines
        assert 'bros_targets_total{target="both",outcome="missed"} 1.0' in lines
        assert 'tgi_request_failure{err="overloaded"} 1.0' in lines
        return
    assert response.status == 200
    assert "retry-after" not in response.headers
    assert shown["x-slo-tpot-ms"] == "20"
    if policy is AdmissionPolicy.RELAX:
        assert 1000 < float(shown["x-slo-ttft-ms"]) < 1100
        assert shown["x-admission"] == "relaxed"
    else:
        assert shown["x-slo-ttft-ms"] == "1"
        assert shown["x-admission"] == ("degraded" if policy is AdmissionPolicy.DEGRADE else None)
    assert f'bros_admissions_total{{class="rt",admission="{shown["x-admission"] or "as_asked"}"}} 1.0' in lines


@pytest.mark.parametrize("policy", POLICIES)
async def test_who_names_no_target_is_always_accepted(serve, latency_model, policy):
    server = await serve()
    server.engine.admission = AdmissionController(latency_model, 512, 1024, policy)
    for headers in ({}, {"x-request-class": "be", "x-slo-ttft-ms": "1"}, {"x-slo-tpot-ms": "0.001"}):
        response = await server.client.post("/generate", json={"inputs": "x"}, headers=headers)
        assert response.status == 200
        assert "x-admission" not in response.headers
        assert "x-slo-ttft-ms" not in response.headers


@pytest.mark.parametrize(
    ("has_run", "status", "error"),
    [
        (
            False,
            429,
            {
                "error": "Model is overloaded: the deadline passed before the request could run",
                "error_type": "overloaded",
                "code": "deadline_exceeded",
            },
        ),
        (
            True,
            424,
            {
                "error": "Request failed during generation: the deadline has passed",
                "error_type": "generation",
                "code": "deadline_exceeded",
            },
        ),
    ],
)
async def test_a_deadline_that_passes(serve, has_run, status, error):
    server = await serve()
    server.engine.script = [DeadlineError(has_run=has_run)]
    response = await post(server, "be", x_request_deadline_ms="50")
    assert (response.status, await response.json()) == (status, error)
    assert ("retry-after" in response.headers) is not has_run
    stream = await post(server, "be", "/generate_stream", x_request_deadline_ms="50")
    assert (stream.status, await stream.text()) == (200, f"data: {json.dumps(error, separators=(',', ':'))}\n\n")
    lines = await server.metric_lines()
    assert 'tgi_request_failure{err="deadline"} 2.0' in lines
    assert 'bros_requests_total{class="be",outcome="deadline"} 2.0' in lines


async def test_a_client_that_leaves_ends_its_generation_and_gives_its_permit_back(serve, reply_of):
    server = await serve(ApiConfig(max_concurrent_requests=1))
    server.engine.script = [asyncio.Event()]
    _, writer = await asyncio.open_connection("127.0.0.1", server.client.port)
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n"
        b'{"inputs":"x"}'
    )
    await server.engine.started.wait()
    writer.close()
    await asyncio.wait_for(server.engine.ended.wait(), 5)
    assert server.engine.num_running == 0
    server.engine.script = reply_of("Hello")
    assert (await server.client.post("/generate", json={"inputs": "x"})).status == 200
