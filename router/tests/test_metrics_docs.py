"""docs/metrics.md lists every series, with its type and what the page at /metrics says of it."""

from pathlib import Path

from bros_router.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_every_series_is_listed():
    metrics = Metrics()
    metrics.request_validated(1, 1, max_input_tokens=100, max_total_tokens=200)  # those that the model shapes
    expected = set()
    for family in metrics._registry.collect():
        is_suffixed = family.type == "counter" and not family.name.startswith("tgi_")
        expected.add((f"`{family.name}{'_total' if is_suffixed else ''}`", family.type, family.documentation))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(expected)
    assert {(name, kind, meaning) for name, kind, _, meaning in rows} == expected
