"""Runs in OpenVINO GenAI's environment: `python openvino_process.py FOLDER THREADS`.

Reads lines of JSON, `[prompts, num_new_tokens]`, from standard input. To each it answers with a line
`[sent_s, token_s, seconds]`: when all prompts were sent, when each token of each came, both by `time.perf_counter`, and
how long all took. The first line, before any was read, says that it is ready. It imports nothing of this project.
"""

import json
import sys
import time

import numpy
import openvino
import openvino_genai


def generate(
    pipeline: openvino_genai.ContinuousBatchingPipeline, prompts: list[list[int]], num_new_tokens: int
) -> tuple[float, list[list[float]], float]:
    """All prompts at once, greedily, to the last token of each."""
    config = openvino_genai.GenerationConfig(max_new_tokens=num_new_tokens, ignore_eos=True, do_sample=False)
    token_s: list[list[float]] = [[] for _ in prompts]
    sent_s = time.perf_counter()
    handles = [
        pipeline.add_request(number, openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
        for number, prompt in enumerate(prompts)
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now_s = time.perf_counter()
        for handle, times in zip(handles, token_s, strict=True):
            while handle.can_read():
                for output in handle.read().values():
                    times += [now_s] * len(output.generated_ids)
    return sent_s, token_s, time.perf_counter() - sent_s


def main() -> None:
    """Load the model; answer until the input ends."""
    folder, num_threads = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": int(num_threads),
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(pipeline, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
