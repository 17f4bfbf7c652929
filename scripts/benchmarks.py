"""Prints what `ds-offload bench --json` and `run --json` gave as rows of a table: `scripts/benchmarks.py FILE...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Figures beside the time, where a row has them.
EXTRAS = {
    "hit_rate": "hits {:.3f}",
    "prefetch_recall": "recall {:.3f}",
    "speedup_vs_floor": "{:.1f} x the floor",
    "speedup_vs_sdpa": "{:.1f} x SDPA",
    "h2d_bytes_per_token": "{:,.0f} bytes/token",
    "link_busy_ms": "link busy {:.2f} ms",
    "stall_ms": "waiting {:.2f} ms",
    "tokens_per_s": "{:,.0f} tokens/s",
    "cpu_use": "{:.2f} cores",
    "stored_s": "all stored after {:.2f} s",
    "gpu_peak_bytes": "GPU peak {:,.0f}",
}


def print_run(name: str, result: dict[str, Any]) -> None:
    """One row of a run: its times, and the plan beside what was measured."""
    stats = result["stats"]
    peak, planned, pinned = (
        (stats[key] or 0) / 2**30 for key in ("gpu_peak_bytes", "gpu_planned_bytes", "host_pinned_bytes")
    )
    prompt, prefill = result["prompt_tokens"], stats["prefill_s"]
    print(
        f"| {name} | {prompt:,} tokens in {prefill:.2f} s, {prompt / prefill:,.0f} tokens/s "
        f"| {stats['decode_ms_per_token']:.1f} ms/token | GPU {peak:.2f} GiB, planned {planned:.2f} "
        f"| host {pinned:.2f} GiB pinned | {result['config']['kv_dtype']} |"
    )


def main() -> None:
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        if "stats" in result:
            print_run(Path(name).stem, result)
            continue
        limits = ", ".join(
            f"{key.removesuffix('_bytes_per_s')} {n / 1e9:.1f} GB/s" for key, n in result["limits"].items()
        )
        print(f"{Path(name).stem}: {result['device']}; commit {result['commit']}; {limits}")
        for row in result["rows"]:
            spread = f"{row['median']:.4g} [{row['p20']:.4g}, {row['p80']:.4g}] {row['unit']}"
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f} x its limit"
            extras = [text.format(row[key]) for key, text in EXTRAS.items() if row.get(key)]
            print(f"| {row['name']} | {spread} | {ratio} | {'; '.join(extras)} |")
        for note in result["notes"]:
            print(note)


if __name__ == "__main__":
    main()
