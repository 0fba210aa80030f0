"""The two classes on one live server: what each is promised holds while the other does its worst."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import pytest

#: A few hundred tokens, so little that real-time prompts must take blocks from best-effort sequences.
NUM_SLOTS = 640
NUM_BE_TOKENS = 60
RT_PREEMPTIONS = 'bros_preemptions_total{class="rt"}'
BLOCKS_COPIED_IN = 'bros_kv_blocks_copied_total{direction="in"}'


def generate(server, prompt: str, num_tokens: int, **headers: str) -> str:
    """Greedy text of exactly `num_tokens` tokens."""
    parameters = {"max_new_tokens": num_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/generate",
        json.dumps({"inputs": prompt, "parameters": parameters}).encode(),
        {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["generated_text"]


@pytest.fixture(scope="module")
def small_server(launch):
    """Two blocks short of everything: 40 blocks of 16 slots, and a host pool of as many."""
    flags = ("--dtype", "float32", "--block-size", "16", "--kv-slots-limit", str(NUM_SLOTS))
    return launch(*flags, "--max-total-tokens", "320", "--kv-host-memory", "32MiB").wait_until_ready()


def test_best_effort_text_is_the_same_however_often_it_is_preempted(server, small_server):
    prompts = [f"def function_{number}(value, other):\n" * 4 for number in range(8)]
    expected = [generate(server, prompt, NUM_BE_TOKENS) for prompt in prompts]
    num_rt_preemptions = small_server.metric(RT_PREEMPTIONS)
    with concurrent.futures.ThreadPoolExecutor(40) as threads:
        batch = [
            threads.submit(generate, small_server, prompt, NUM_BE_TOKENS, x_request_class="be") for prompt in prompts
        ]
        while not all(job.done() for job in batch):
            chats = [
                threads.submit(generate, small_server, f"class Chat{number}:\n" * 12, 4, x_slo_ttft_ms="2000")
                for number in range(6)
            ]
            assert len({chat.result() for chat in chats}) >= 1
        assert [job.result() for job in batch] == expected
    assert small_server.metric('bros_preemptions_total{class="be"}') > 0
    assert small_server.metric('bros_kv_blocks_copied_total{direction="out"}') > 0
    assert small_server.metric(BLOCKS_COPIED_IN) > 0
    assert small_server.metric(RT_PREEMPTIONS) == num_rt_preemptions


def test_chats_that_outgrow_the_memory_together_end_with_the_same_text(server, small_server):
    prompts = [f"class Number{number}:\n" * 8 for number in range(8)]
    expected = [generate(server, prompt, 100) for prompt in prompts]
    num_preemptions, num_restored = (small_server.metric(name) for name in (RT_PREEMPTIONS, BLOCKS_COPIED_IN))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda prompt: generate(small_server, prompt, 100), prompts)) == expected
    assert small_server.metric(RT_PREEMPTIONS) > num_preemptions
    assert small_server.metric(BLOCKS_COPIED_IN) > num_restored


def test_chat_that_cannot_wait_is_run_in_the_middle_of_a_step(server, launch):
    long_steps = launch("--dtype", "float32", "--max-batch-prefill-tokens", "2048").wait_until_ready()
    batch = [f"def function_{number}(value, other):\n" * 60 for number in range(12)]
    chat = "class Chat:\n"
    expected = [generate(server, prompt, 4) for prompt in [*batch, chat]]
    with concurrent.futures.ThreadPoolExecutor(len(batch)) as threads:
        for _ in range(40):
            jobs = [threads.submit(generate, long_steps, prompt, 4, x_request_class="be") for prompt in batch]
            while not all(job.done() for job in jobs):
                assert generate(long_steps, chat, 4, x_slo_ttft_ms="60", x_slo_tpot_ms="1000") == expected[-1]
            assert [job.result() for job in jobs] == expected[:-1]
            if long_steps.metric("bros_steps_interrupted_total") > 0:
                return
    pytest.fail("no step was interrupted")


def test_batch_dump_never_makes_a_chat_answer_429(launch):
    server = launch("--max-concurrent-requests", "2", "--max-concurrent-be-requests", "200").wait_until_ready()

    def send(number: int) -> int:
        try:
            generate(server, f"def batch_{number}", 8, x_request_class="be")
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    with concurrent.futures.ThreadPoolExecutor(260) as threads:
        batch = [threads.submit(send, number) for number in range(250)]
        chats = [generate(server, f"def chat_{number}", 4) for number in range(20)]
        statuses = [job.result() for job in batch]
    assert len(chats) == 20
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 200


def test_reply_says_which_class_and_targets_were_used(server):
    def headers_for(**headers: str) -> dict[str, str]:
        request = urllib.request.Request(
            f"{server.url}/generate",
            b'{"inputs": "def", "parameters": {"max_new_tokens": 1, "priority": "be"}}',
            {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return {name.lower(): value for name, value in reply.headers.items() if name.lower().startswith("x-")}

    assert headers_for()["x-request-class"] == "be"
    assert headers_for(x_request_class="rt")["x-request-class"] == "rt"
    used = headers_for(x_slo_ttft_ms="750", x_slo_tpot_ms="80.5")
    assert (used["x-request-class"], used["x-slo-ttft-ms"], used["x-slo-tpot-ms"]) == ("rt", "750", "80.5")


def test_request_ends_at_its_deadline_and_the_next_is_served(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate(server, "def late", 400, x_request_deadline_ms="30")
    body = json.load(caught.value)
    # 429 if nothing of it had run, 424 if something had.
    assert (caught.value.code, body["error_type"]) in ((424, "generation"), (429, "overloaded"))
    assert generate(server, "def next", 4)


def test_text_is_the_same_under_every_policy(server, launch):
    flags = ("--dtype", "float32", "--kv-cache-memory", "64MiB")
    others = {policy: launch(*flags, "--scheduler", policy) for policy in ("fcfs", "tgi", "bros-paper")}
    prompts = [f"class Number{number}:" for number in range(6)]
    expected = [generate(server, prompt, 20) for prompt in prompts]
    for policy, other in others.items():
        other.wait_until_ready()
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            texts = [
                threads.submit(generate, other, prompt, 20, x_request_class="be" if number % 2 else "rt")
                for number, prompt in enumerate(prompts)
            ]
        assert [text.result() for text in texts] == expected, policy
        other.process.kill()
