"""What the comparison with peers computes; the peers themselves are not installed here."""

import csv
from pathlib import Path

import pytest

from bros_benchmarks.checkpoint import SMOLLM2_135M
from bros_benchmarks.load import Load, Timeline
from bros_benchmarks.peers.bros import Bros
from bros_benchmarks.peers.engine import EngineError
from bros_benchmarks.peers.floor import Floor, Machine
from bros_benchmarks.peers.openvino import OpenVino
from bros_benchmarks.peers.report import PREFILL, Record, draw, ratio_table, speed_table, write_csv
from bros_benchmarks.peers.server_process import free_port, process, wait_until_healthy
from bros_benchmarks.peers.turn import Turn
from bros_benchmarks.peers.vllm import Vllm


def floor(bandwidth: float = 1e9, peak: float = 1e9) -> Floor:
    return Floor(SMOLLM2_135M, Machine(bandwidth, peak))


def test_a_lone_decode_reads_every_weight_and_its_context_once() -> None:
    # 134,479,872 weights in matrices, tied embeddings counted once; 2 * 30 * 3 * 64 numbers of keys and values a token.
    endless = floor(peak=1e30)
    assert endless.step_s(1, 0) == pytest.approx(2 * 134_479_872 / 1e9)
    assert endless.step_s(1, 100) - endless.step_s(1, 0) == pytest.approx(100 * 23_040 / 1e9)


def test_many_decodes_multiply_longer_than_they_read() -> None:
    assert floor().step_s(1, 0) == pytest.approx(2 * 134_479_872 / 1e9)
    assert floor(peak=1e8).step_s(8, 0) == pytest.approx(8 * 2 * 134_479_872 / 1e8)


def test_a_prompt_costs_its_products_one_row_of_logits_and_the_keys_that_each_token_sees() -> None:
    # 106,168,320 weights in layers. Keys seen: 1 + 2 = 3; twice 64 * 9 * 2 operations for each, in 30 layers.
    assert floor().prefill_s(2) * 1e9 == pytest.approx(2 * (2 * 106_168_320 + 576 * 49_152) + 3 * 4 * 576 * 30)


def test_output_of_the_floor_is_all_tokens_in_the_time_of_prompts_and_steps() -> None:
    machine = floor(27.5e9, 350e9)
    seconds = 4 * machine.prefill_s(128) + machine.step_s(4, 129) + machine.step_s(4, 130)
    assert machine.tokens_per_s(4, 128, 3) == pytest.approx(12 / seconds)


def turn(seconds: float, prefill: float) -> Turn:
    """One client, two tokens."""
    return Turn(prefill, {1: Load([Timeline(0.0, [seconds / 2, seconds])], seconds)}, 0.25)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """The machine is twice as fast in the second round, and vLLM has no third."""
    made = Record([Bros(), Vllm(tmp_path), OpenVino(tmp_path, "int8")], [1])
    for number, (ours_s, theirs_s) in enumerate([(1.0, 1.5), (0.5, 1.0)]):
        made.turns["bros", number] = turn(ours_s, 100 / ours_s)
        made.turns["vLLM", number] = turn(theirs_s, 100 / theirs_s)
    made.turns["bros", 2] = turn(0.1, 1000.0)
    made.floors = {number: floor(27.5e9, 350e9) for number in range(3)}
    made.failures = {"vLLM": "round 3: gone", "OpenVINO GenAI, int8": "no compiler"}
    return made


def test_ratios_are_taken_within_rounds_in_which_both_took_part(record: Record) -> None:
    assert record.ratio("bros", "vLLM", PREFILL.of_turn) == pytest.approx((1.5 + 2.0) / 2)
    assert record.ratio("bros", "OpenVINO GenAI, int8", PREFILL.of_turn) is None
    assert record.median("bros", PREFILL.of_turn) == pytest.approx(200.0)


def test_tables_tell_who_failed_and_why(record: Record) -> None:
    engines = list(speed_table(record).columns[0].cells)
    assert engines[:4] == ["bros", "vLLM", "vLLM: round 3: gone", "OpenVINO GenAI, int8: no compiler"]
    ratios = ratio_table(record)
    assert list(ratios.columns[0].cells) == ["bros / vLLM", "bros / floor", "vLLM / floor"]
    assert next(iter(ratios.columns[1].cells)) == "1.75"


def test_every_turn_is_in_the_csv_and_a_figure_is_drawn(record: Record, tmp_path: Path) -> None:
    write_csv(record, tmp_path / "peers.csv")
    with (tmp_path / "peers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["round"]) for row in rows if row["engine"] != "floor"] == [
        *(("bros", "0"), ("vLLM", "0"), ("bros", "1"), ("vLLM", "1"), ("bros", "2"))
    ]
    assert rows[1]["tokens_per_s"] == "1.33" and rows[1]["other_load"] == "0.250"
    draw(record, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(["sh", "-c", "echo no such model; exit 1"], {"PATH": "/usr/bin:/bin"}, log) as child:
        child.wait()
        with pytest.raises(EngineError, match="no such model"):
            wait_until_healthy(child, f"http://127.0.0.1:{free_port()}/health", log)


def test_what_a_server_started_ends_with_it(tmp_path: Path) -> None:
    # The grandchild holds the other end of the pipe.
    with process(
        ["sh", "-c", "sleep 1000 & echo up; wait"], {"PATH": "/usr/bin:/bin"}, tmp_path / "log", talks=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
    with child.stdout:
        assert child.stdout.read() == ""  # the end, since nobody holds it any more
