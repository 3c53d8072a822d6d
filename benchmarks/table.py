"""`python -m benchmarks.table`: write the measured table of the README from the newest line of each benchmark's results."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def newest(name: str) -> dict[str, object] | None:
    """The last line of a benchmark's results."""
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return json.loads(path.read_text().splitlines()[-1]) if path.is_file() else None


def table() -> str:
    """Markdown, from committed lines only."""
    lines = []
    campaign, demo = newest("campaign_digits"), newest("demo")
    if campaign:
        lines += _campaign(campaign)
    if demo:
        shown = f"{demo['wall_seconds']} s, {demo['peak_memory_mb']} MB at peak ({demo['machine']}; commit {demo['commit']})"
        lines += ["", f"`make demo` after installation, candidates built anew: {shown}."]
    return "\n".join(lines)


def _campaign(record: dict[str, object]) -> list[str]:
    def column(key: str) -> list[float]:
        values = record[key]
        assert isinstance(values, list)
        return values

    pooled = record["shared_minus_pooled"]
    assert isinstance(pooled, dict)
    titles = ["total epsilon", "campaign", "best candidate, known for free", "fine-tune all, jointly accounted"]
    titles += ["random candidate", "CPU, against fine-tune all"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    keys = ("accuracy", "oracle", "fine_tune_all", "random")
    for at, epsilon in enumerate(column("epsilon")):
        shown = " | ".join(f"{column(key)[at]:.3f}" for key in keys)
        lines.append(f"| {epsilon:g} | {shown} | {column('cost_ratio')[at]:.2f} |")
    differences = ", ".join(f"{value:+.3f} at epsilon {epsilon}" for epsilon, value in pooled.items())
    where = f"{record['command']}; commit {record['commit']}; {record['machine']}"
    lines += ["", f"Held-out accuracy, means of {record['seeds']} partitions ({where})."]
    lines += [f"Shared noise by secure sum, less pooled DP-SGD by Opacus with the same noise: {differences}."]
    bearing = record["shared_minus_pooled_one_colluder"]
    assert isinstance(bearing, dict)
    prices = ", ".join(f"{value:+.3f} at epsilon {epsilon}" for epsilon, value in bearing.items())
    lines += [f"With shares that bear one colluding site, as the plan asks: {prices}."]
    return lines


def rewritten(readme: str) -> str:
    """The README with the table between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text()))
    print(table())
