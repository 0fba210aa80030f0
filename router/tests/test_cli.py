"""The command line: what it makes of flags, environment and machine, and how it says no."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bros_router import cli, tgi_flags
from bros_router.cli import Invocation, invocation
from bros_router.config import SchedulingConfig, ServerConfig
from bros_router.host import Host
from bros_router.lora_adapters import AdapterSource

GIB = 1024**3
CPU_HOST = Host(num_cores=4, free_memory_bytes=8 * GIB, num_gpus=0, has_gpu_selection=False)
GPU_HOST = Host(num_cores=16, free_memory_bytes=64 * GIB, num_gpus=4, has_gpu_selection=True)

LAUNCHER = [sys.executable, "-c", "from bros_router.__main__ import launch; launch()"]


def parse(*argv: str, **environment: str) -> Invocation:
    """What a command line asks for on a machine without GPUs."""
    seen: list[Invocation] = []

    def run(invocation: Invocation) -> int:
        seen.append(invocation)
        return 0

    result = CliRunner(env=only(environment)).invoke(cli.serve_command(run), argv)
    assert result.exit_code == 0, result.output
    return seen[0]


def refuse(*argv: str, **environment: str) -> str:
    """What the launcher answers to a command line that it refuses."""
    command = cli.serve_command(lambda invocation: pytest.fail("it was not refused"))
    result = CliRunner(env=only(environment)).invoke(command, argv)
    assert result.exit_code == 2, result.output
    return result.stderr


def only(environment: dict[str, str]) -> dict[str, str | None]:
    """An environment without the variables of ours that the tests' own may have."""
    options = {option.envvar for option in cli.serve_options() if isinstance(option.envvar, str)}
    others = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "LOG_LEVEL"}
    others |= {variable.name for variable in tgi_flags.VARIABLES} | {*tgi_flags.PREFIX_CACHING}
    others |= {
        "AIP_HTTP_PORT",
        "AIP_PREDICT_ROUTE",
        "AIP_HEALTH_ROUTE",
        "LOG_COLORIZE",
        "COMPUTE_TYPE",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
    }
    return dict.fromkeys(options | others) | environment


def test_nothing_given_is_a_server_with_the_demo_model():
    config = parse().config
    assert config.model.model_id is None
    assert (config.http.hostname, config.http.port) == ("0.0.0.0", 3000)
    assert (config.api, config.scheduling) == (ServerConfig().api, ServerConfig().scheduling)


def test_flags_of_a_tgi_deployment():
    asked = parse(
        *("--model-id", "org/model", "--revision", "refs/pr/2", "--dtype", "bfloat16"),
        *("-p", "8080", "--hostname", "127.0.0.1", "-g", "5", "--json-output"),
        *("--max-input-tokens", "1000", "--max-total-tokens", "1512", "--max-batch-prefill-tokens", "2048"),
        *("--max-concurrent-requests", "7", "--max-batch-size", "16", "--payload-limit", "100"),
        *("--cors-allow-origin", "https://a.example", "--cors-allow-origin", "https://b.example"),
        *("--api-key", "k", "--rope-scaling", "dynamic", "--rope-factor", "2", "--cuda-memory-fraction", "0.5"),
        *("--huggingface-hub-cache", "/data", "--tokenizer-config-path", "/t.json"),
        *("--otlp-endpoint", "http://collector:4317", "--otlp-service-name", "chat"),
    )
    config = asked.config
    assert (config.model.model_id, config.model.revision, config.model.dtype) == ("org/model", "refs/pr/2", "bfloat16")
    assert (config.http.hostname, config.http.port) == ("127.0.0.1", 8080)
    assert config.http.graceful_termination_timeout_s == 5
    assert (config.batch.max_input_tokens, config.batch.max_total_tokens) == (1000, 1512)
    assert (config.batch.max_batch_prefill_tokens, config.batch.max_batch_size) == (2048, 16)
    assert (config.api.max_concurrent_requests, config.api.payload_limit, config.api.api_key) == (7, 100, "k")
    assert config.api.cors_allow_origin == ("https://a.example", "https://b.example")
    assert (config.model.rope_scaling, config.model.rope_factor) == ("dynamic", 2.0)
    assert config.ranks.cuda_memory_fraction == 0.5
    assert (config.hub.cache_dir, config.model.tokenizer_config_path) == (Path("/data"), Path("/t.json"))
    assert config.log.json_output
    assert (config.trace.otlp_endpoint, config.trace.otlp_service_name) == ("http://collector:4317", "chat")
    assert asked.warnings == ()


def test_flags_of_a_server_for_both_classes():
    config = parse(
        *("--default-class", "be", "--slo-ttft-ms", "400", "--slo-tpot-ms", "0.5"),
        *("--max-concurrent-be-requests", "9", "--max-queued-rt-tokens", "100", "--max-queued-be-tokens", "200"),
        *("--scheduler", "edf", "--admission-policy", "relax", "--batch-size-control", "off"),
        *("--kv-preemption", "block", "--kv-host-memory", "1GiB", "--be-max-wait-s", "0", "--be-floor", "hard"),
        *("--static-be-requests", "3", "--priority-preemption", "full", "--profile-grid", "full"),
    ).config
    assert (config.api.default_class, config.api.slo_ttft_ms, config.api.slo_tpot_ms) == ("be", 400.0, 0.5)
    assert config.api.max_concurrent_be_requests == 9
    assert config.ranks.kv_host_memory_bytes == GIB
    assert config.scheduling == SchedulingConfig(
        scheduler="edf",
        admission_policy="relax",
        max_queued_rt_tokens=100,
        max_queued_be_tokens=200,
        kv_preemption="block",
        batch_size_control="off",
        be_max_wait_s=0.0,
        be_floor="hard",
        static_be_requests=3,
        priority_preemption="full",
        profile_grid="full",
    )
    assert parse(BROS_SCHEDULER="rr", BROS_SLO_TTFT_MS="250").config.scheduling.scheduler == "rr"


def test_environment_sets_what_the_command_line_does_not():
    config = parse(
        *("--port", "81"),
        PORT="80",
        MODEL_ID="org/model",
        MAX_TOTAL_TOKENS="100",
        JSON_OUTPUT="true",
        CORS_ALLOW_ORIGIN="https://a.example,https://b.example",
        BROS_BLOCK_SIZE="32",
        MAX_BEST_OF="",
    ).config
    assert (config.http.port, config.model.model_id, config.batch.max_total_tokens) == (81, "org/model", 100)
    assert config.log.json_output
    assert config.api.cors_allow_origin == ("https://a.example", "https://b.example")
    assert config.ranks.block_size == 32
    assert config.api.max_best_of == 2


def test_environment_that_has_no_flag():
    config = parse(
        HUGGING_FACE_HUB_TOKEN="old",
        HF_TOKEN="new",
        HF_HUB_OFFLINE="1",
        COMPUTE_TYPE="gpu+fast",
        LOG_LEVEL="warn,x=debug",
    ).config
    assert (config.hub.token, config.hub.is_offline) == ("new", True)
    assert config.http.compute_type == "gpu+fast"
    assert (config.log.level, config.log.colorize) == ("WARNING", None)
    assert parse(HF_API_TOKEN="api").config.hub.token == "api"
    assert parse(LOG_COLORIZE="0").config.log.colorize is False


@pytest.mark.parametrize(
    ("environment", "is_disabled"),
    [
        ({}, False),
        ({"PREFIX_CACHING": "1"}, False),
        ({"PREFIX_CACHING": "True"}, False),
        ({"PREFIX_CACHING": ""}, False),
        ({"PREFIX_CACHING": "0"}, True),
        ({"USE_PREFIX_CACHING": "false"}, True),
        ({"PREFIX_CACHING": "0", "BROS_DISABLE_PREFIX_CACHING": "false"}, False),
        ({"PREFIX_CACHING": "1", "BROS_DISABLE_PREFIX_CACHING": "true"}, True),
    ],
)
def test_tgis_variable_turns_the_prefix_cache_off_unless_our_flag_speaks(environment, is_disabled):
    assert parse(**environment).config.ranks.disable_prefix_caching is is_disabled


def test_variables_of_tgi_that_have_no_effect_get_a_warning():
    asked = parse(ATTENTION="paged", TGI_WIGGLE_ROOM="0.9", PREFILL_CHUNKING="0", MAX_IMAGE_FETCH_SIZE="1")
    assert [warning.split(" has no effect. ")[0] for warning in asked.warnings] == [
        "ATTENTION",
        "MAX_IMAGE_FETCH_SIZE",
        "PREFILL_CHUNKING",
        "TGI_WIGGLE_ROOM",
    ]
    assert parse(PREFILL_CHUNKING="1", USE_FLASH_ATTENTION="true", ATTENTION="").warnings == ()


def test_vertex_ai_says_where_it_asks():
    config = parse(
        "--port", "80", AIP_HTTP_PORT="8080", AIP_PREDICT_ROUTE="/predict", AIP_HEALTH_ROUTE="/v1/x:is_ok"
    ).config
    assert config.http.port == 8080
    assert (config.api.vertex_predict_route, config.api.vertex_health_route) == ("/predict", "/v1/x:is_ok")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AIP_HTTP_PORT", "http"),
        ("AIP_HTTP_PORT", "65536"),
        ("AIP_HTTP_PORT", "\u0663"),
        ("AIP_PREDICT_ROUTE", "predict"),
        ("AIP_PREDICT_ROUTE", "/{x}"),
        ("AIP_HEALTH_ROUTE", "/a b"),
        ("AIP_HEALTH_ROUTE", "/health\n"),
    ],
)
def test_what_is_no_port_and_no_path_is_refused(variable, value):
    assert variable in refuse(**{variable: value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 1024**2),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("2G", 2 * GIB),
        ("2GB", 2_000_000_000),
        ("0.5 GiB", GIB // 2),
        ("64k", 65536),
        ("100B", 100),
    ],
)
def test_sizes(text, expected):
    assert parse("--kv-cache-memory", text).config.ranks.kv_cache_memory_bytes == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "0", "1e9", "0.1"])
def test_what_is_no_size(text):
    assert "--kv-cache-memory" in refuse("--kv-cache-memory", text)


@pytest.mark.parametrize(
    ("given", "host", "num_shard"),
    [
        ({}, CPU_HOST, 1),
        ({}, GPU_HOST, 4),
        ({"num_shard": 2}, GPU_HOST, 2),
        ({"sharded": False}, GPU_HOST, 1),
        ({"sharded": False, "num_shard": 2}, GPU_HOST, 2),  # TGI's table: the number wins
        ({"sharded": True}, GPU_HOST, 4),
        ({"sharded": True, "num_shard": 3}, GPU_HOST, 3),
        ({"device": "cpu"}, GPU_HOST, 1),
        ({"device": "cpu", "num_shard": 8}, GPU_HOST, 8),
        ({"num_shard": 2}, CPU_HOST, 2),
    ],
)
def test_number_of_ranks(given, host, num_shard):
    assert invocation(given, {}, host).config.ranks.num_shard == num_shard


@pytest.mark.parametrize(
    ("given", "host", "step_tokens", "kv_bytes"),
    [
        ({}, CPU_HOST, 512, 2 * GIB),
        ({}, GPU_HOST, 4096, 0),
        ({"device": "cpu"}, GPU_HOST, 512, 16 * GIB),
        ({"max_batch_prefill_tokens": 100, "kv_cache_memory_bytes": GIB}, GPU_HOST, 100, GIB),
    ],
)
def test_defaults_that_depend_on_the_machine(given, host, step_tokens, kv_bytes):
    config = invocation(given, {}, host).config
    assert (config.batch.max_batch_prefill_tokens, config.ranks.kv_cache_memory_bytes) == (step_tokens, kv_bytes)


def test_rope_factor_alone_is_linear():
    assert parse("--rope-factor", "4").config.model.rope_scaling == "linear"


def test_old_name_of_max_input_tokens():
    assert parse("--max-input-length", "10").config.batch.max_input_tokens == 10


def test_name_of_a_container_is_no_address():
    asked = parse(HOSTNAME="5f2c0a9b1d3e")
    assert asked.config.http.hostname == "0.0.0.0"
    assert asked.warnings == ("--hostname 5f2c0a9b1d3e is not an IP address: listening on 0.0.0.0.",)
    assert parse(HOSTNAME="::1").config.http.hostname == "::1"


def test_private_folder_of_the_user_where_there_is_one(tmp_path):
    assert parse(XDG_RUNTIME_DIR=str(tmp_path)).config.runtime_base == tmp_path
    assert parse(XDG_RUNTIME_DIR=str(tmp_path / "missing")).config.runtime_base != tmp_path / "missing"


@pytest.mark.parametrize(
    "argv",
    [
        ["--trust-remote-code"],
        ["--waiting-served-ratio", "1.2"],
        ["--max-waiting-tokens", "20"],
        ["--max-batch-total-tokens", "16000"],
        ["--cuda-graphs", "1,2,4"],
        ["--disable-custom-kernels"],
        ["--prometheus-port", "9001"],
        ["--shard-uds-path", "/tmp/x"],
        ["--master-addr", "localhost"],
        ["--master-port", "29500"],
        ["--weights-cache-override", "/weights"],
        ["--usage-stats", "off"],
        ["--ngrok-authtoken", "x"],
        ["--ngrok-edge", "x"],
    ],
)
def test_flag_of_tgi_that_has_no_effect_starts_with_one_warning(argv):
    (warning,) = parse(*argv).warnings
    assert warning.startswith(f"{argv[0]} has no effect. ")


@pytest.mark.parametrize(
    "argv",
    [
        ["--quantize", "awq"],
        ["--kv-cache-dtype", "fp8_e5m2"],
        ["--ngrok"],
    ],
)
def test_flag_that_would_change_replies_is_refused(argv):
    assert f"{argv[0]} is refused. " in refuse(*argv)


def test_flags_of_what_is_told_and_marked():
    api = parse("--watermark-gamma", "0.25", "--enable-prefill-logprobs", WATERMARK_DELTA="-1.5").config.api
    assert (api.watermark_gamma, api.watermark_delta, api.enable_prefill_logprobs) == (0.25, -1.5, True)
    for argv in (["--watermark-gamma", "0"], ["--watermark-gamma", "1.5"], ["--max-top-n-tokens", "129"]):
        assert "is not in the range" in refuse(*argv)


def test_refusal_covers_the_environment_but_not_values_that_ask_for_nothing():
    assert "--quantize is refused. " in refuse(QUANTIZE="gptq")
    asked = parse(QUANTIZE="", ENABLE_PREFILL_LOGPROBS="false", NGROK="0", LORA_ADAPTERS="")
    assert asked.warnings == ()


def test_adapters_are_given_in_tgis_grammar():
    adapters = parse("--lora-adapters", "org/one, two=/adapters/two ,./three@main,four=/a=b@c@d").config.model.adapters
    assert adapters == (
        AdapterSource("org/one"),
        AdapterSource("two", Path("/adapters/two")),
        AdapterSource("./three", revision="main"),
        AdapterSource("four", Path("/a=b"), "c@d"),
    )
    assert parse(LORA_ADAPTERS="a@v1").config.model.adapters == (AdapterSource("a", revision="v1"),)
    assert parse(LORA_ADAPTERS="").config.model.adapters == ()
    assert parse("--lora-adapters", "").config.model.adapters == ()


@pytest.mark.parametrize("text", ["a,", ",", "=b", "@c", "a=", "a@", "a=@c", " "])
def test_what_is_no_list_of_adapters_is_refused(text):
    assert "is not an adapter such as id, id@revision or id=/path." in refuse("--lora-adapters", text)


def test_adapters_have_names_of_their_own():
    assert "--lora-adapters: 'a' is given twice." in refuse(LORA_ADAPTERS="a,b=/a,a@main")


def test_int8_is_the_one_method_of_quantisation():
    assert parse("--quantize", "int8").config.model.quantize == "int8"
    assert not parse(QUANTIZE="").config.model.quantize
    for method in ("bitsandbytes", "eetq", "gptq", "awq", "fp8", "INT8"):
        assert "--quantize is refused. " in refuse("--quantize", method)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--max-input-tokens", "10", "--max-total-tokens", "10"], "must be less than --max-total-tokens"),
        (["--max-input-tokens", "5", "--max-input-length", "5"], "are both set"),
        (["--max-total-tokens", "20", "--max-batch-total-tokens", "10"], "must not exceed --max-batch-total-tokens"),
        (
            ["--max-batch-prefill-tokens", "20", "--max-batch-total-tokens", "10"],
            "must not exceed --max-batch-total-tokens",
        ),
        (["--api-key-scope", "none"], "--api-key-scope"),
        (["--sharded", "true"], "one device is visible"),
        (["--sharded", "true", "--num-shard", "1"], "--num-shard is 1"),
        (["--num-shard", "0"], "--num-shard"),
        (["--validation-workers", "0"], "--validation-workers"),
        (["--max-batch-size", "0"], "--max-batch-size"),
        (["--block-size", "48"], "--block-size"),
        (["--api-key", ""], "--api-key"),
        (["--port", "65536"], "--port"),
        (["--port", "http"], "--port"),
        (["--dtype", "float8"], "--dtype"),
        (["--cuda-memory-fraction", "1.5"], "--cuda-memory-fraction"),
        (["--cuda-memory-fraction", "nan"], "--cuda-memory-fraction"),
        (["--rope-factor", "inf"], "--rope-factor"),
        (["--slo-ttft-ms", "0"], "--slo-ttft-ms"),
        (["--slo-tpot-ms", "inf"], "--slo-tpot-ms"),
        (["--default-class", "vip"], "--default-class"),
        (["--scheduler", "lifo"], "--scheduler"),
        (["--admission-policy", "drop"], "--admission-policy"),
        (["--max-concurrent-be-requests", "0"], "--max-concurrent-be-requests"),
        (["--max-queued-be-tokens", "0"], "--max-queued-be-tokens"),
        (["--kv-host-memory", "0"], "--kv-host-memory"),
        (["--be-max-wait-s", "nan"], "--be-max-wait-s"),
        (["--max-best-off", "2"], "--max-best-of"),
        (["--model-id"], "--model-id"),
        (["a-model"], "a-model"),
    ],
)
def test_mistake_is_answered_with_a_hint(argv, hint):
    assert hint in refuse(*argv)


@pytest.mark.parametrize(
    ("given", "host", "hint"),
    [
        ({"num_shard": 5}, GPU_HOST, "needs 5 GPUs and 4 can be seen"),
        ({"device": "cuda"}, CPU_HOST, "use --device cpu"),
    ],
)
def test_more_ranks_than_gpus(given, host, hint):
    with pytest.raises(click.UsageError, match=hint):
        invocation(given, {}, host)


@pytest.mark.parametrize("argv", [["--sharded", "true", "--num-shard", "1"], ["--no-such-flag"]])
def test_launcher_process_ends_with_status_2(argv):
    ended = subprocess.run([*LAUNCHER, *argv], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Usage: text-generation-launcher" in ended.stderr


def test_taken_port_ends_the_launcher_before_anything_slow(tmp_path):
    """No model is at that path: were it looked for first, the status would be 3."""
    from bros_router.listener import bind

    with bind("127.0.0.1", 0) as other:
        port = str(other.getsockname()[1])
        argv = ["--hostname", "127.0.0.1", "--port", port, "--model-id", str(tmp_path / "missing")]
        ended = subprocess.run([*LAUNCHER, *argv], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"Port {port} is taken: choose another with --port." in ended.stderr


def test_help_shows_every_flag_with_its_variable_and_loads_nothing_slow():
    code = (
        "import sys\nfrom bros_router.__main__ import launch\n"
        "try: launch()\nfinally: print(*({'torch', 'transformers', 'aiohttp', 'huggingface_hub'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    page = " ".join(shown.stdout.split())
    for option in cli.serve_options():
        assert max(option.opts, key=len) in page
        assert not option.envvar or f"[env: {option.envvar}]" in page
    assert shown.stdout.splitlines()[-1] == ""  # none of the slow modules


def test_bros_is_a_group_of_commands():
    shown = subprocess.run([sys.executable, "-m", "bros_router", "--help"], capture_output=True, text=True, timeout=60)
    assert [command in shown.stdout for command in ("serve", "download-weights", "env")] == [True] * 3


def test_environment_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    shown = subprocess.run([sys.executable, "-m", "bros_router", "env"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert "Python" in shown.stdout
    assert "torch 2." in shown.stdout
    assert "a-secret" not in shown.stdout


def test_download_of_a_model_that_cannot_be_had_ends_with_status_3(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "bros_router", "download-weights", "org/model"]
    ended = subprocess.run(
        [*command, "--huggingface-hub-cache", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 3
    assert "HF_HUB_OFFLINE is set" in ended.stderr
