"""`python -m benchmarks.table`: write the measured table of the README from the newest line of each benchmark's results."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
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
    for name, section in SECTIONS.items():
        record = newest(name)
        if record:
            lines += ["", *section(record)]
    return "\n".join(lines)


def _secure_sum(record: Record) -> list[str]:
    lines = ["| secure sum, CPU seconds of one round | Urna | Flower SecAgg+ functions | ratio |", "|---|---|---|---|"]
    wanted = [("client", *one) for one in ((10**7, 10, 0, 32), (10**7, 10, 0, 16), (10**7, 32, 0, 32), (10**8, 10, 0, 32))]
    wanted += [("server", *one) for one in ((10**7, 10, 0, 32), (10**6, 32, 3, 32), (10**6, 100, 10, 32))]
    for role, size, num_sites, dropped, bits in wanted:
        for case in _dicts(record["cases"]):
            if [case[key] for key in ("d", "n", "dropped", "ring_bits")] == [size, num_sites, dropped, bits]:
                what = f"{role}, {size:.0e} numbers of {bits} bits, {num_sites} sites" + (
                    f", {dropped} dropped" if dropped else ""
                )
                cells = (
                    f"{case[f'{role}_seconds']:.3f}",
                    f"{case[f'flower_{role}_seconds']:.3f}",
                    f"{case[f'{role}_ratio']:.1f}",
                )
                lines.append(f"| {what.replace('e+0', 'e')} | {' | '.join(cells)} |")
    share, loop = record["mask_loop_gb_per_second"], record["aes_ctr_gb_per_second"]
    peak, bytes_up = next(
        (case["client_peak_over_upload"], case["upload_ratio"])
        for case in _dicts(record["cases"])
        if (case["d"], case["n"], case["dropped"], case["ring_bits"]) == (10**7, 10, 0, 32)
    )
    lines += [
        "",
        f"Two exchanges a round instead of four; at 1e7 numbers and 10 sites {bytes_up:.2f} of the bytes up, and a peak at",
    ]
    lines += [f"the site of {peak:.2f} uploads. Masks are added at {share} GB/s; AES-256-CTR alone, in cache: {loop} GB/s"]
    lines += [f"(medians; {_where(record)})."]
    return lines


def _server_memory(record: Record) -> list[str]:
    sizes = ", ".join(map(str, _list(record["num_sites"])))
    ours, theirs = (", ".join(f"{value:.0f}" for value in _list(record[key])) for key in ("peak_mb", "fedavg_peak_mb"))
    what = f"Memory of the server for {sizes} replies of {record['reply_mb']:.0f} MB: {ours} MB; Flower's FedAvg {theirs} MB"
    return [f"{what} ({_where(record)})."]


def _scale(record: Record) -> list[str]:
    parts = [
        f"{one['n']} sites: {one['site_upload_seconds'] * 1000:.1f} ms a site, {one['server_seconds']:.2f} s at the server"
        for one in _dicts(record["rounds"])
    ]
    return [f"One round of 1e5 numbers, 5 % dropped, CPU: {'; '.join(parts)} ({_where(record)})."]


def _overhead(record: Record) -> list[str]:
    rows = [
        f"{one['plain_seconds']:.2f} s plain, {one['secure_seconds']:.2f} s secure ({one['ratio']:.2f} times)"
        for one in (record["work"], record["idle"])
    ]
    return [f"A round of FedAvg on Flower's simulation: {'; without work at the sites: '.join(rows)} ({_where(record)})."]


def _site_message(record: Record) -> list[str]:
    ours, stock = record["ours"], record["stock"]
    part = f"{ours['site_seconds']:.2f} s at Urna's runner, {stock['site_seconds']:.2f} s where stock Flower starts a process"
    whole = f"{ours['exchange_seconds']:.1f} s and {stock['exchange_seconds']:.1f} s"
    lines = [f"One message at a site, median of {record['messages']}: {part} for it ({record['ratio']:g} times)."]
    lines += [f"The whole exchange, as the operator sees it: {whole} ({_where(record)})."]
    return lines


def _ledger(record: Record) -> list[str]:
    epsilons = ", ".join(f"{value:.2f} s ({name})" for name, value in record["epsilon_seconds"].items())
    written, floor = record["reserve_per_second"], record["sqlite_per_second"]
    lines = [f"A site's ledger: {written:.0f} reservations a second, on disk and anchored (plain SQLite inserts: {floor:.0f})."]
    lines += [
        f"Epsilon of {record['rows']} releases: {epsilons}; {record['bytes_per_release']} bytes a release beside its reply"
    ]
    lines += [f"({_where(record)})."]
    return lines


def _dp_step(record: Record) -> list[str]:
    lines = ["| a training step, DP / non-private | engine | time | ceiling | memory | Opacus hooks | Opacus ghost |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for case in _dicts(record["cases"]):
        peers = [case[f"opacus_{one}"]["time_ratio"] for one in ("hooks", "ghost")]
        cells = [f"{case['model']}, {case['mode']}", case["engine"], f"{case['time_ratio']:.2f}", f"{case['ceiling']:g}"]
        cells += [f"{case['memory_ratio']:.2f}", *("-" if one is None else f"{one:.2f}" for one in peers)]
        lines.append(f"| {' | '.join(cells)} |")
    noise = max(_dicts(record["cases"]), key=lambda case: case["trained"])
    lines += ["", f"Physical batches of {record['batch']} on {record['device']}, medians; memory above the built model."]
    lines += [f"Noise for {noise['trained'] / 1e6:.1f} million weights, once a logical batch: {noise['noise_seconds']:.2f} s;"]
    lines += [f"with it, at {record['logical_batch']} records: {noise['time_ratio_256']:.2f} ({_where(record)})."]
    return lines


def _dp_accuracy(record: Record) -> list[str]:
    def shown(tuning: str) -> str:
        parts = [
            f"{100 * row['accuracy']:.1f} {'non-private' if row['epsilon'] is None else 'at ' + format(row['epsilon'], 'g')}"
            for row in _dicts(record["methods"])
            if row["tuning"] == tuning
        ]
        return ", ".join(parts)

    data = record["data"]
    what = f"MiniLM on {data['records']} docstrings of the standard library, {len(data['classes'])} modules, accuracy in %"
    return [
        f"{what}: head {shown('head')} (epsilon, {len(record['seed'])} splits);",
        f"LoRA {shown('lora')}, {100 * record['lora_minus_head']:+.1f} against the head on the same split.",
        f"Learning rates and rounds were chosen on other splits of the same docstrings ({_where(record)}).",
    ]


def _feature_cache(record: Record) -> list[str]:
    before, after, model = record["epoch_seconds_uncached"], record["epoch_seconds_cached"], record["model"]
    what = f"An epoch of head training, {model['layers']} layers of {model['width']}, {record['records']} records"
    return [f"{what}: {before:.1f} s, on kept features {after:.2f} s ({record['speed_up']:.0f} times; {_where(record)})."]


def _noise(record: Record) -> list[str]:
    speed = record["per_second"]["urna_normal"] / 1e6
    ratios = f"{record['ratio_numpy']:g} times numpy's generator, {record['ratio_torch64']:g} times torch's in float64"
    return [f"{speed:.0f} million normals a second from AES-256-CTR: {ratios} ({_where(record)})."]


SECTIONS = {
    "secure_sum": _secure_sum,
    "server_memory": _server_memory,
    "secure_sum_scale": _scale,
    "round_overhead": _overhead,
    "site_message": _site_message,
    "ledger": _ledger,
    "dp_step": _dp_step,
    "dp_accuracy": _dp_accuracy,
    "feature_cache": _feature_cache,
    "noise": _noise,
}


def _where(record: Record) -> str:
    return f"{record['command']}; commit {record['commit']}; {record['machine']}"


def _list(value: object) -> list[float]:
    assert isinstance(value, list)
    return value


def _dicts(value: object) -> list[dict[str, Any]]:
    assert isinstance(value, list)
    return value


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
    lines += [f"Shared noise by secure sum, less pooled DP-SGD by Opacus at the same epsilon: {differences}."]
    lines += ["(One of the five sites may drop out, so a sum of all has 1.12 times the pool's noise; 1.29 if one may collude.)"]
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
