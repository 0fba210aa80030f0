"""What the simulator is told of a live server."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from bros_benchmarks.evaluation.recorded_server import RecordedStep, ServerLog
from bros_benchmarks.evaluation.validate import client_delay_s
from bros_router.request import RequestClass
from bros_router.simulation.record import RequestRecord
from bros_router.simulation.workload import TraceRequest
from bros_shard.protocol import StepShape


def test_the_delay_of_clients_is_there_and_back_by_one_clock():
    # By the server's clock the trace starts at 100; requests take 3 ms to the scheduler, tokens 7 ms from it.
    committed_s = [100.5, 100.6, 100.7, 100.8]
    log = ServerLog([RecordedStep(StepShape(), 0.1, value) for value in committed_s], [100.403, 100.453])
    offered = {0.4: (0.507, 0.607), 0.45: (0.707, 0.807)}
    records = [
        RequestRecord(TraceRequest(offered_s, RequestClass.RT, 8, 2), offered_s, token_s=array("d", token_s))
        for offered_s, token_s in offered.items()
    ]
    records.append(RequestRecord(TraceRequest(0.0, RequestClass.BE, 8, 1), 0.0, token_s=array("d", (0.55,))))
    assert client_delay_s(log, records, 100.0) == pytest.approx(0.010)


def test_a_log_is_read_as_it_was_written(tmp_path):
    log = ServerLog([RecordedStep(StepShape(num_decode_sequences=3), 0.02, 5.0)], [1.0])
    path = tmp_path / "server.json"
    path.write_bytes(msgspec.json.encode(log))
    assert ServerLog.read(path) == log
