"""`bros simulate`, as it is typed."""

import json

import msgspec
import pytest
from click.testing import CliRunner

from bros_router.simulation.command import simulate_command
from bros_router.simulation.hardware import HARDWARE, Measurement, profile

BRIEF = ["--duration", "4", "--warm-up", "1", "--rate", "3", "--be-requests", "6"]


def invoke(*arguments):
    return CliRunner().invoke(simulate_command(), [*BRIEF, *arguments])


def report(*arguments):
    result = invoke("--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_table_shows_both_classes():
    result = invoke("--scheduler", "priority")
    assert result.exit_code == 0
    assert "real-time requests offered" in result.stdout
    assert "best-effort tokens a second" in result.stdout


def test_json_says_what_was_simulated_and_what_came_of_it():
    said = report("--scheduler", "static", "--seed", "3", "--max-batch-prefill-tokens", "512", "--kv-share", "0.5")
    assert said["setup"]["policy"] == "static"
    assert said["setup"]["limits"]["max_batch_tokens"] == 512
    assert said["setup"]["num_kv_tokens"] == HARDWARE["opt-13b"].num_kv_tokens // 2
    assert said["summary"]["num_rt"] > 0
    assert said["summary"]["be_tokens_per_s"] > 0
    assert said["steps"]["num_steps"] > 0


def test_the_same_command_gives_the_same_figures():
    assert report("--noise", "0.1")["summary"] == report("--noise", "0.1")["summary"]
    assert report("--noise", "0.1")["summary"] != report("--noise", "0.1", "--seed", "1")["summary"]


@pytest.mark.parametrize("arrivals", ["poisson", "gamma2", "gamma4", "square", "wave", "burst"])
def test_every_arrival_process_runs(arrivals):
    assert report("--scheduler", "fcfs", "--arrivals", arrivals)["summary"]["num_rt"] >= 0


def test_features_can_be_switched_off():
    said = report("--without", "paces", "--without", "fills", "--batch-size-control", "off", "--kv-preemption", "block")
    assert said["setup"]["options"]["bros"]["paces"] is False
    assert said["setup"]["options"]["bros"]["fills"] is False
    assert said["setup"]["options"]["bros"]["chunks"] is True
    assert said["setup"]["options"]["preemption"] == "block"


def test_a_dump_replaces_the_closed_loop():
    said = report("--scheduler", "fcfs", "--be-dump", "5@2", "--be-dump", "3@2.5")
    assert sum(said["summary"]["be_endings"].values()) == 8


def test_replicas_share_the_rate():
    said = report("--scheduler", "fcfs", "--replicas", "3", "--dispatch", "round-robin")
    assert said["replicas"] == 3


def test_hardware_may_be_a_file_of_measured_steps(tmp_path):
    points = profile(HARDWARE["llama-3-8b"])
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode(Measurement("measured", 20_000, 0, 4096, points)))
    said = report("--hardware", str(path), "--scheduler", "fcfs", "--slo-scale", "5")
    assert said["hardware"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hardware", "abacus"], "abacus is none of opt-13b"),
        (["--be-dump", "many"], "200@30 is 200 requests 30 s after the start"),
        (["--scheduler", "magic"], "magic"),
        (["--kv-share", "0.001"], "practically no requests"),
    ],
)
def test_what_cannot_be_simulated_is_a_usage_error(arguments, complaint):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert complaint in result.output
