"""Who may ask which route, and the routes that clouds and KServe ask."""

import gzip
import hashlib
import json

import jsonschema
import pytest

from bros_router.api.dialect import OpenAIDialect, TgiDialect
from bros_router.config import ApiConfig
from bros_router.request import GenerationError
from bros_router.routes import Access, description, routes

MODEL = "/v2/models/llama/versions/7"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def bytes_of(text: str) -> dict:
    return {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": list(text.encode())}


# --- the key


KSERVE_PROBES = {"/v2/health/live", "/v2/health/ready", "/v2/models/llama/versions/1/ready"}


async def test_a_key_for_all_leaves_health_checks_alone(serve):
    config = ApiConfig(api_key="secret", api_key_scope="all", kserve=True)
    server = await serve(config)
    every = [route.path for route in routes(config, OpenAIDialect()) if route.method == "GET"]

    async def refused(**how) -> set[str]:
        paths = [path.format(name="llama", version="1") for path in every]
        return {path for path in paths if (await server.client.get(path, **how)).status == 401}

    probes = {"/", "/health", "/ping", "/health/live", "/health/startup"} | KSERVE_PROBES
    assert await refused() == {path.format(name="llama", version="1") for path in every} - probes
    assert await refused(headers={"authorization": "Bearer secret"}) == set()
    assert (await server.client.post("/chat_tokenize", json=CHAT)).status == 401
    assert (await server.client.put("/metrics")).status == 401
    assert (await server.client.put("/health")).status == 405
    assert (await server.client.get("/nope")).status == 404


async def test_tgis_scope_guards_what_generates(serve):
    server = await serve(ApiConfig(api_key="secret", kserve=True, vertex_predict_route="/predict"))
    for path in ("/invocations", "/vertex", f"{MODEL}/infer"):
        response = await server.client.post(path, json={"inputs": "x"})
        assert (response.status, await response.read()) == (401, b"")
    assert (await server.client.post("/predict", json={"instances": [{"inputs": "x"}]})).status == 200
    assert (await server.client.get(MODEL)).status == 200


def test_every_route_that_generates_by_tgis_table_needs_the_key():
    guarded = {route.path for route in routes(ApiConfig(), TgiDialect()) if route.access is Access.KEY}
    assert guarded == {
        *("/", "/generate", "/generate_stream", "/tokenize", "/invocations", "/vertex"),
        *("/v1/chat/completions", "/v1/completions"),
    }


# --- SageMaker


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "x"}),
        ("/", {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": 2}}),
        ("/", {"inputs": "x", "messages": []}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 1}),
        ("/v1/chat/completions", CHAT | {"stream": True, "prompt": "x"}),
        ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "stream": True, "inputs": 5}),
    ],
)
async def test_invocations_answers_as_the_route_whose_body_it_is(serve, path, body):
    server = await serve(ApiConfig(strict_tgi=True))
    answers = []
    for asked in (path, "/invocations"):
        response = await server.client.post(asked, json=body)
        assert response.status == 200
        text = (await response.text()).splitlines()
        answers.append([response.headers["content-type"], [line.split('"created"')[0] for line in text]])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"inputs":"x"', 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs":"x"} behind', 200, ""),
        (
            b'{"inputs":5}',
            422,
            "Failed to deserialize the JSON body into the target type: "
            "data did not match any variant of untagged enum SagemakerRequest",
        ),
        (b'{"inputs":"","messages":[]}', 422, '{"error":"Input validation error: `inputs` cannot be empty"'),
    ],
)
async def test_invocations_refuses_what_no_route_would_take(serve, body, status, text):
    server = await serve()
    response = await server.client.post("/invocations", data=body, headers={"content-type": "application/json"})
    assert response.status == status
    assert (await response.text()).startswith(text)


# --- Vertex AI


async def test_vertex_answers_a_text_for_each_instance(serve):
    server = await serve()
    parameters = {"max_new_tokens": 3, "seed": 7, "do_sample": False, "temperature": 0.5, "return_full_text": True}
    instances = [
        {"inputs": "x", "parameters": parameters},
        CHAT | {"max_tokens": 5},
        {"inputs": "y", "parameters": None},
    ]
    response = await server.client.post("/vertex", json={"instances": instances})
    assert await response.read() == b'{"predictions":["Hello world","Hello world","Hello world"]}'
    assert not [name for name in response.headers if name.lower().startswith("x-")]
    requests = {request.max_new_tokens: request for request in server.engine.requests}
    assert len(requests) == 3
    # Of a prompt's parameters two are used, as by TGI.
    assert (requests[3].sampling.seed, requests[3].sampling.temperature) == (7, 1.0)
    assert requests[5].prompt_token_ids != requests[3].prompt_token_ids
    assert all(request.sampling.do_sample for request in requests.values())


@pytest.mark.parametrize(
    ("body", "status", "answer"),
    [
        ({"instances": []}, 422, '{"error":"Input validation error","error_type":"Input validation error"}'),
        ({}, 422, "Failed to deserialize the JSON body into the target type: "),
        (
            {"instances": [{"inputs": "x"}, {"input": "y"}]},
            422,
            "Failed to deserialize the JSON body into the target type: instances: "
            "data did not match any variant of untagged enum VertexInstance",
        ),
        (
            {"instances": [{"inputs": "x"}, {"inputs": ""}]},
            422,
            '{"error":"Input validation error: `inputs` cannot be empty","error_type":"validation"}',
        ),
    ],
)
async def test_vertex_says_what_is_wrong(serve, body, status, answer):
    server = await serve()
    response = await server.client.post("/vertex", json=body)
    assert response.status == status
    assert (await response.text()).startswith(answer)
    assert server.engine.num_running == 0


async def test_more_than_there_are_permits_is_refused_unseen(serve):
    server = await serve(ApiConfig(max_concurrent_requests=2, max_concurrent_be_requests=3, kserve=True))
    many = {"id": "", "instances": [5] * 6, "inputs": [bytes_of("x")] * 6, "outputs": []}
    for path in ("/vertex", f"{MODEL}/infer"):
        response = await server.client.post(path, json=many)
        assert (response.status, (await response.json())["error_type"]) == (429, "overloaded")
    assert server.engine.requests == []


async def test_an_instance_that_fails_ends_the_others(serve, reply_of):
    server = await serve()
    server.engine.script = [reply_of("Hello", "!")[0], GenerationError("no more")]
    response = await server.client.post("/vertex", json={"instances": [{"inputs": "x"}, {"inputs": "y"}]})
    assert (response.status, (await response.json())["error_type"]) == (424, "generation")
    assert server.engine.num_running == 0


async def test_vertex_ai_is_answered_where_it_was_told_to_ask(serve):
    server = await serve(ApiConfig(vertex_predict_route="/generate", vertex_health_route="/health"))
    response = await server.client.post("/generate", json={"instances": [{"inputs": "x"}]})
    assert await response.read() == b'{"predictions":["Hello world"]}'
    assert (await server.client.get("/health")).status == 200


# --- KServe


async def test_kserve_is_there_for_who_asks_for_it(serve):
    server = await serve()
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", MODEL, f"{MODEL}/ready"):
        assert (await server.client.get(path)).status == 404


async def test_kserve_tells_who_is_there(serve):
    server = await serve(ApiConfig(kserve=True))
    version = (await (await server.client.get("/info")).json())["version"]
    for path, answer in (
        (
            "/v2",
            {
                "name": "text-generation-inference",
                "version": version,
                "extensions": ["health", "models", "metrics"],
            },
        ),
        (MODEL, {"name": "llama", "version": "7", "extensions": ["infer", "ready"]}),
        (f"{MODEL}/ready", {"live": True}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"live": True}),
    ):
        response = await server.client.get(path)
        assert (response.status, await response.json()) == (200, answer)
    server.engine.is_healthy = False
    for path, status in (("/v2/health/live", 200), ("/v2/health/ready", 503), (f"{MODEL}/ready", 503)):
        assert (await server.client.get(path)).status == status


async def test_kserve_answers_bytes_with_bytes(serve):
    server = await serve(ApiConfig(kserve=True))
    body = {"id": "a", "inputs": [bytes_of("x"), bytes_of("hé🙂")], "outputs": [{"name": "p"}, {"name": "q"}]}
    response = await server.client.post(f"{MODEL}/infer", json=body | {"parameters": {"return_full_text": True}})
    assert response.status == 200
    reply = await response.json()
    assert reply["id"] == "a"
    for output, (name, text) in zip(reply["outputs"], (("p", "xHello world"), ("q", "hé🙂Hello world")), strict=True):
        assert output == {
            "name": name,
            "shape": [1, len(text.encode())],
            "datatype": "BYTES",
            "data": list(text.encode()),
        }
    assert not any(request.sampling.do_sample for request in server.engine.requests)
    await server.client.post(f"{MODEL}/infer", json=body)
    assert server.engine.requests[-1].sampling.do_sample  # as where a generate request has no parameters


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (
            {"inputs": [bytes_of("x")], "outputs": []},
            {"error": "Inputs and outputs length mismatch", "error_type": "length mismatch"},
        ),
        (
            {"inputs": [bytes_of("") | {"data": [97, 0xC3, 0x28]}], "outputs": []},
            {"error": "invalid utf-8 sequence of 1 bytes from index 1", "error_type": "utf8"},
        ),
        (
            {"inputs": [bytes_of("") | {"data": [0xF0, 0x9F, 0x99]}], "outputs": []},
            {"error": "incomplete utf-8 byte sequence from index 0", "error_type": "utf8"},
        ),
        (
            {"inputs": [bytes_of("")], "outputs": [{"name": "p"}]},
            {"error": "Input validation error: `inputs` cannot be empty", "error_type": "validation"},
        ),
    ],
)
async def test_kserve_says_what_is_wrong(serve, body, answer):
    server = await serve(ApiConfig(kserve=True))
    response = await server.client.post(f"{MODEL}/infer", json={"id": ""} | body)
    assert (response.status, await response.json()) == (422, answer)
    assert 'tgi_request_failure{err="validation"} 1.0' in await server.metric_lines()


# --- the description, and the page that shows it


async def test_the_description_is_complete_and_its_references_lead_somewhere(serve):
    config = ApiConfig(kserve=True, vertex_predict_route="/predict", vertex_health_route="/is_ok")
    server = await serve(config)
    response = await server.client.get("/api-doc/openapi.json")
    assert response.headers["content-type"] == "application/json"
    text = await response.text()
    described = json.loads(text)
    everything = {(route.path, route.method.lower()) for route in routes(config, OpenAIDialect())}
    shown = {(path, method) for path, methods in described["paths"].items() for method in methods}
    pages = {(path, "get") for path, _ in everything if path.startswith(("/api-doc", "/docs"))}
    assert shown == everything - pages
    names = [operation["operationId"] for methods in described["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    components = described["components"]["schemas"]
    for reference in text.split('"$ref":"#/components/schemas/')[1:]:
        assert reference.split('"')[0] in components
    for schema in components.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "security" not in text


def test_names_of_tgis_operations_are_kept():
    described = json.loads(description(routes(ApiConfig(), OpenAIDialect()), ApiConfig()))
    names = {operation["operationId"] for methods in described["paths"].values() for operation in methods.values()}
    assert names >= {
        *("compat_generate", "generate", "generate_stream", "tokenize", "get_chat_tokenize", "chat_completions"),
        *("completions", "get_model_info", "health", "metrics", "openai_get_model_info", "sagemaker_compatibility"),
    }


@pytest.mark.parametrize("dialect", [OpenAIDialect(), TgiDialect()])
def test_examples_are_what_they_describe(dialect):
    described = json.loads(description(routes(ApiConfig(kserve=True), dialect), ApiConfig()))
    num_examples = 0
    for methods in described["paths"].values():
        for operation in methods.values():
            media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" in media:
                jsonschema.validate(media["example"], media["schema"] | {"components": described["components"]})
                num_examples += 1
    assert num_examples >= 8


GENERATE = {"inputs": "x", "parameters": {"details": True, "do_sample": True}}
ANSWERED = [
    ("/generate", GENERATE),
    ("/generate", {"inputs": ""}),
    ("/generate_stream", GENERATE),
    ("/generate_stream", {"inputs": ""}),
    ("/", GENERATE),
    ("/", GENERATE | {"stream": True}),
    ("/v1/chat/completions", CHAT | {"logprobs": True}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", CHAT | {"top_p": 2, "stream": True}),
    ("/v1/completions", {"prompt": ["x", "y"]}),
    ("/v1/completions", {"prompt": ["x", "y"], "stream": True}),
    ("/v1/completions", {"prompt": "x", "top_p": 2, "stream": True}),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}),
    ("/invocations", CHAT),
    ("/vertex", {"instances": [CHAT]}),
    ("/tokenize", GENERATE),
    ("/chat_tokenize", CHAT),
]


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(("path", "body"), ANSWERED)
async def test_answers_are_what_is_described(serve, path, body, is_strict):
    server = await serve(ApiConfig(strict_tgi=is_strict))
    described = await (await server.client.get("/api-doc/openapi.json")).json()
    components = {"components": described["components"]}
    response = await server.client.post(path, json=body)
    contents = described["paths"][path]["post"]["responses"][str(response.status)]["content"]
    schema = contents[response.content_type]["schema"]
    if response.content_type == "application/json":
        jsonschema.validate(await response.json(), schema | components)
        return
    events = [event.removeprefix("data: ") for event in (await response.text()).split("\n\n")]
    text, *others = schema["properties"]["data"].get("anyOf", [schema["properties"]["data"]])
    last = [other["const"] for other in others]
    assert events[-1 - len(last) :] == [*last, ""]
    assert len(events) > 1 + len(last)
    for event in events[: -1 - len(last)]:
        jsonschema.validate({"data": event}, schema | components)
        jsonschema.validate(json.loads(event), text["contentSchema"] | components)


def test_the_description_tells_where_the_key_is_asked_for():
    for scope, unguarded in (("tgi", {"/info", "/metrics", "/chat_tokenize"}), ("all", set())):
        config = ApiConfig(api_key="secret", api_key_scope=scope)
        described = json.loads(description(routes(config, OpenAIDialect()), config))
        operations = [
            (path, operation) for path, methods in described["paths"].items() for operation in methods.values()
        ]
        assert all(("401" in operation["responses"]) == ("security" in operation) for _, operation in operations)
        without_key = {path for path, operation in operations if "security" not in operation}
        assert without_key >= {"/health", "/ping", "/health/live"} | unguarded
        assert not without_key & {"/generate", "/v1/completions"}
        assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


async def test_the_page_needs_nothing_but_this_server(serve):
    server = await serve()
    page = await server.client.get("/docs")
    assert (page.url.path, page.status) == ("/docs/", 200)
    text = await page.text()
    assert "http:" not in text
    assert "https:" not in text
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
        assert f'"{name}"' in text
        plain = await server.client.get(f"/docs/{name}", headers={"accept-encoding": "identity"})
        assert (plain.status, plain.headers.get("content-encoding")) == (200, None)
        packed = await server.client.get(f"/docs/{name}", headers={"accept-encoding": "gzip"})
        assert await packed.read() == await plain.read()  # the client unpacks
    start = await (await server.client.get("/docs/start.js")).text()
    assert '"../api-doc/openapi.json"' in start


#: Of the files of the npm package swagger-ui-dist 5.35.0.
SWAGGER_UI = {
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
}


@pytest.mark.parametrize("name", SWAGGER_UI)
async def test_swagger_ui_is_unchanged(serve, name):
    server = await serve()
    reader = await server.exchange(
        f"GET /docs/{name} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = reader.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert hashlib.sha256(gzip.decompress(body)).hexdigest() == SWAGGER_UI[name]
