"""Runs on disk: every request in plain compressed CSV, and beside it exactly how the run was made."""

from __future__ import annotations

import csv
import gzip
import os
import platform
import subprocess
from array import array
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec

from bros_benchmarks.evaluation.live_load import SentRecord
from bros_router.about import server_version
from bros_router.request import RequestClass
from bros_router.simulation.record import Ending, RequestRecord
from bros_router.simulation.workload import TraceRequest

_COLUMNS: Final = (
    "class", "num_prompt_tokens", "num_output_tokens", "ttft_target_s", "tpot_target_s",
    "offered_s", "sent_s", "ending", "error_type", "was_relegated", "token_s",
)  # fmt: skip
_LIBRARIES: Final = ("torch", "transformers", "aiohttp", "msgspec", "numpy", "pyzmq", "uvloop")


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One line a request. Times are seconds from the start of the trace; an empty field is a value there was not."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for record in records:
            request = record.request
            sent_s, error_type = (record.sent_s, record.error_type) if isinstance(record, SentRecord) else (None, "")
            writer.writerow(
                (
                    *(request.request_class.value, request.num_prompt_tokens, request.num_output_tokens),
                    *(request.ttft_s, request.tpot_s, record.offered_s, sent_s, record.ending.value, error_type),
                    *(int(record.was_relegated), " ".join(f"{time_s:.6f}" for time_s in record.token_s)),
                )
            )


def read_records(path: Path) -> list[SentRecord]:
    """What `write_records` wrote; times of tokens are rounded to microseconds."""
    with gzip.open(path, "rt", newline="") as file:
        return [_record(row) for row in csv.DictReader(file)]


def _record(row: Mapping[str, str]) -> SentRecord:
    offered_s = float(row["offered_s"])
    request = TraceRequest(
        offered_s,
        RequestClass(row["class"]),
        int(row["num_prompt_tokens"]),
        int(row["num_output_tokens"]),
        _optional(row["ttft_target_s"]),
        _optional(row["tpot_target_s"]),
    )
    return SentRecord(
        request,
        offered_s,
        ending=Ending(row["ending"]),
        token_s=array("d", map(float, row["token_s"].split())),
        was_relegated=row["was_relegated"] == "1",
        sent_s=_optional(row["sent_s"]),
        error_type=row["error_type"],
    )


def _optional(text: str) -> float | None:
    return float(text) if text else None


def write_json(path: Path, value: Any) -> None:
    """Plain JSON, written whole or not at all: a run that was stopped leaves no half file to be taken for a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return msgspec.json.decode(path.read_bytes())


def describe_machine() -> dict[str, Any]:
    """What a figure depends on beside its flags: versions, processor, cores, and how busy the machine was before."""
    return {
        "bros": server_version(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{library: version(library) for library in _LIBRARIES},
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    """Of the checkout that this file lies in, `-dirty` where it was changed; empty where there is none."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()
