"""The line of figures after an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_offload.generation import GenerationOutput


def bytes_text(count: float) -> str:
    """A number of bytes for people: "512 B", "1.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def figures_line(output: GenerationOutput) -> str:
    """What a run took; figures that it has none of are left out."""
    stats = output.stats
    seconds = stats["prefill_s"]
    read = stats.get("prefilled_tokens", output.prompt_tokens)
    before = f"{read:,} new of " if read < output.prompt_tokens else ""
    parts = [f"prompt {before}{output.prompt_tokens:,} tokens in {seconds:.2f} s"]
    if seconds > 0:
        parts[0] += f" ({read / seconds:,.0f} tokens/s)"
    parts.append(f"{len(output.token_ids):,} new tokens")
    if stats.get("decode_ms_per_token") is not None:
        parts[-1] += f" at {stats['decode_ms_per_token']:.1f} ms/token"
    if (stats.get("first_steps_s") or 0) > 1:
        parts[-1] += f" after the first two steps' {stats['first_steps_s']:.1f} s"
    if output.finish_reason == "length":
        parts[-1] += ", cut at the limit"
    if stats.get("h2d_bytes_per_token") is not None:
        parts.append(f"{bytes_text(stats['h2d_bytes_per_token'])}/token from the host")
    if stats.get("hot_set_hit_rate") is not None:
        parts.append(f"hot set hits {100 * stats['hot_set_hit_rate']:.0f} %")
    if stats.get("stall_ms_per_token") is not None:
        parts.append(f"waiting for rows {stats['stall_ms_per_token']:.1f} ms/token")
    if stats.get("gpu_peak_bytes"):
        parts.append(f"GPU peak {bytes_text(stats['gpu_peak_bytes'])}")
    if stats.get("host_kv_bytes"):
        parts.append(f"KV cache on the host {bytes_text(stats['host_kv_bytes'])}")
    if stats.get("disk_kv_bytes"):
        parts.append(f"KV cache in files {bytes_text(stats['disk_kv_bytes'])}")
    return "; ".join(parts)


def monitor_line(monitor: dict[str, Any]) -> str:
    """What the monitor saw: means over the layers that it compared."""
    layers = sum(mass is not None for mass in monitor["layers"]["attention_mass"])
    parts = [
        f"attention mass {monitor['attention_mass']:.3f} (at most {monitor['best_mass']:.3f} with as many tokens)",
        f"output error {monitor['output_error']:.3f}",
    ]
    if monitor["selection_recall"] is not None:
        parts.append(f"recall of the selection {monitor['selection_recall']:.3f}")
    parts.append(f"{monitor['comparisons']} comparisons of {layers} layers in {monitor['seconds']:.2f} s")
    return f"monitor: {'; '.join(parts)}"
