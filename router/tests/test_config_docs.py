"""docs/flags.md says what the code does, flag by flag, and forgets none of TGI's."""

import re
from collections.abc import Iterable
from pathlib import Path

from bros_router import tgi_flags
from bros_router.flag_options import SectionOption, serve_options
from bros_shard.exit_codes import ExitCode

PAGE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()

#: Every flag of TGI's launcher (3.3), by the names that deployments use.
TGI_FLAGS = """
    model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype trust-remote-code
    max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens max-input-length
    max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens
    max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr master-port
    huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma watermark-delta ngrok
    ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env max-client-batch-size lora-adapters
    usage-stats payload-limit enable-prefill-logprobs graceful-termination-timeout
"""


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names(option: SectionOption) -> str:
    return ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))


def variable(option: SectionOption) -> str:
    return f"`{option.envvar}`" if option.envvar else "–"


def test_supported_flags():
    foreign = {flag.name for flag in (*tgi_flags.ACCEPTED, *tgi_flags.REFUSED)}
    expected = [
        [names(option), variable(option), option.default_text or "–", option.help]
        for option in serve_options()
        if option.name not in foreign
    ]
    assert rows("Supported") == expected


def foreign_rows(flags: Iterable[tgi_flags.ForeignFlag]) -> list[list[str]]:
    return [[f"`{foreign.flag.option}`", f"`{foreign.flag.variable}`", foreign.reason] for foreign in flags]


def test_flags_without_effect():
    assert rows("Accepted, without effect") == foreign_rows(tgi_flags.ACCEPTED)


def test_refused_flags():
    assert rows("Refused") == foreign_rows(tgi_flags.REFUSED)


def test_variables_without_effect():
    table = PAGE.split("get a warning:\n")[1].split("\n## ")[0].strip().splitlines()[2:]
    expected = [f"| `{variable.name}` | {variable.reason} |" for variable in tgi_flags.VARIABLES]
    assert table == expected


def test_exit_statuses():
    assert [int(row[0]) for row in rows("Exit status")] == list(ExitCode)


def test_every_flag_of_tgi_has_an_answer():
    known = {max(option.opts, key=len).removeprefix("--") for option in serve_options()}
    assert set(TGI_FLAGS.split()) <= known
