"""Reports of `scaling.plan` for people."""

from collections.abc import Iterable

_GB = 1e9
_QUICK = 0.1  # by how much of it a program of less effort may need less memory; of the large configs at most 0.06
_STATE = ("parameters", "optimizer", "average", "other_state", "padding")  # what a run keeps from step to step


def warnings(report: dict) -> list[str]:
    """What a reader must know about how a report was made."""
    found = []
    if report["compiler"] == "cpu":
        found.append(
            "memory and collectives are those of a program that the CPU's compiler made for as many fake devices, in "
            "place of the GPU's: it holds many bf16 activations as fp32, so that temporary memory is an upper bound"
        )
    elif report["effort"]:
        found.append(
            f"compiled with effort {report['effort']:g}; a run's is 0, whose program may need up to a tenth more memory"
        )
        if report["fits"] and report["hbm_bytes_per_chip"] > (1 - _QUICK) * report["hbm_bytes_of_chip"]:
            found.append(
                "a chip's memory is nearly full: plan once more with --effort 0, which makes the program of a run"
            )
    if report.get("uncounted"):
        found.append(f"not counted as often as they run: {', '.join(report['uncounted'][:4])}")
    return found


# Bytes that collectives over the batch axes move, by bytes of the parameters in fp32: weights that are gathered twice
# or three times and gradients that are added up make 1.4 to 1.7 in bf16, at most 5 in fp32.
_MOST_MOVED = 8


def rows_that_travel(report: dict, accumulate: int) -> list[str]:
    """A note on a train step that waits for more than its weights and gradients, or none.

    Args:
      accumulate: micro-batches, for each of which weights are gathered anew.
    """
    if "estimate" not in report or report["estimate"]["bound"] != "communication":
        return []
    axes = {"replica", "data", "fsdp"}
    moved = sum(c["bytes"] for c in report["collectives"] if set(c["axis"].split("+")) <= axes)
    times = moved / (4 * report["parameters"] * accumulate)
    if times <= _MOST_MOVED:
        return []
    return [
        f"collectives over replica, data and fsdp move {times:.0f} times the parameters, where gathering weights and "
        "adding up gradients takes 2 to 5: rows travel between chips that should stay; `mesh.constrain_batch` holds "
        "them"
    ]


def text(report: dict) -> str:
    """A report of one plan."""
    lines = [*_head(report), "", *memory_lines(report)]
    if "estimate" in report:
        lines += ["", *_flops(report), "", *collective_lines(report), "", *_estimate(report)]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, verdict(report)])


def verdict(report: dict, way_out: str = "") -> str:
    """way_out: of what does not fit."""
    needed, has = report["hbm_bytes_per_chip"], report["hbm_bytes_of_chip"]
    share = f"{needed / _GB:,.1f} GB of {has / _GB:,.0f} GB"
    if report["fits"]:
        return f"verdict: fits, {share} on each chip"
    of_step = (
        "mesh.fsdp divides the state, train.accumulate and remat the temporary memory, and --search tries them; "
        "optimizer.offload keeps moments with the hosts"
    )
    return f"verdict: does NOT fit, {share} on each chip; {way_out or of_step}"


def _head(r):
    unit = r["unit"]
    return [
        f"{r['name']} on {place(r)}",
        f"{r['parameters']:,} parameters; train.batch_size={r['batch_size']}, train.accumulate={r['accumulate']}: "
        f"{r[f'{unit}s_per_step']:,} {unit}s per step",
    ]


def place(r) -> str:
    """The pod of a report and the mesh over it."""
    slices = f"{r['slices']} slices of " if r["slices"] > 1 else ""
    return f"{slices}{r['topology']}: {r['chips']:,} chips, mesh {_mesh(r)}"


def _mesh(r) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in r["mesh"].items()) or "of one device"


def memory_lines(r) -> Iterable[str]:
    yield "memory of a chip, GB"
    for kind, count in r["memory"].items():
        if count:
            yield f"  {kind.replace('_', ' '):<16}{count / _GB:>10,.2f}"
    whole = sum(r["memory"].values()) if "loading_bytes_per_chip" in r else r["hbm_bytes_per_chip"]
    yield f"  {'all':<16}{whole / _GB:>10,.2f} of {r['hbm_bytes_of_chip'] / _GB:,.0f}"
    if waiting := r.get("host_bytes_per_chip"):
        yield f"  {'with its host':<16}{waiting / _GB:>10,.2f}, which a step fetches and puts back"


def _flops(r):
    unit = r["unit"]
    yield f"operations of matrix products and convolutions, GFLOP per {unit}"
    yield f"  {'model':<16}{r[f'flops_per_{unit}'] / 1e9:>10,.2f}"
    without = r["hardware_over_model_flops_without_remat"]
    yield (
        f"  {'hardware':<16}{r[f'hardware_flops_per_{unit}'] / 1e9:>10,.2f}, "
        f"{r['hardware_over_model_flops']:.2f} x the model's; {without:.2f} x without remat"
    )


def collective_lines(r, of: str = "a step") -> Iterable[str]:
    """What chips say to each other, and what of parameters that makes whole. of: what it is counted in."""
    rows = [(f"collectives of {of}", "axis", "count", "GB", "largest MB", "ms (estimate)")]
    rows += [
        (
            c["kind"],
            c["axis"],
            f"{c['count']:,}",
            f"{c['bytes'] / _GB:,.2f}",
            f"{c['largest'] / 1e6:,.1f}",
            f"{c['seconds'] * 1e3:,.1f}",
        )
        for c in r["collectives"]
    ]
    yield from columns(rows)
    for row in r["whole_parameters"]:
        yield (
            f"whole on a chip: {' or '.join(row['parameters'])}, {row['bytes'] / 1e6:,.0f} MB, by {row['count']:,} "
            f"{row['kind']} along {row['axis']}"
        )


def _estimate(r):
    e, unit = r["estimate"], r["unit"]
    names = [name for name in ("compute", "memory", "communication", "host") if f"{name}_seconds" in e]
    terms = ", ".join(f"{name} {e[f'{name}_seconds'] * 1e3:,.1f} ms" for name in names)
    yield f"estimate from the chip's figures, not a measurement: {terms}"
    yield (
        f"  a step takes at least {e['step_seconds'] * 1e3:,.1f} ms ({e['bound']}): at most "
        f"{e[f'{unit}s_per_second_per_chip']:,.1f} {unit}s/s/chip, MFU {e['mfu']:.2f}"
    )
    yield compiled(r)


def compiled(r) -> str:
    return (
        f"compiled in {r['compile_seconds']:,.0f} s ({r['compile_cpu_seconds']:,.0f} s of CPU) by the compiler for "
        f"{r['compiler'].upper()}s of jax {r['jax']}"
    )


def columns(rows) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(cells).rstrip()


def table(reports: list[dict], first: str = "pod") -> str:
    """Plans side by side, in Markdown. first: what the first column is, "pod" or "chosen"."""
    unit = reports[0]["unit"]
    names = [first, "chips", "mesh", "batch", "GB/chip (state)", "fits", f"GFLOP/{unit}", "hw/model (without remat)"]
    names += ["step ms*", "bound*", "MFU*", "compile s (CPU s)"]
    rows = [names, ["---"] * len(names), *(_row(r, first) for r in reports)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "\\* an estimate from the chip's figures, not a measurement"]
    return "\n".join([*lines, *growth(reports)] if first == "pod" else lines)


def growth(reports: list[dict]) -> list[str]:
    """What becomes of a chip's part as pods grow: a line for each kind of chip of which there are several pods with as
    much of the batch on every chip.
    """
    alike: dict[tuple, list[dict]] = {}
    for r in sorted((r for r in reports if "estimate" in r), key=lambda r: r["chips"]):
        alike.setdefault((r["topology"].partition(":")[0], r["batch_size"] / r["chips"]), []).append(r)
    return [_growth(kind, same[0], same[-1]) for (kind, _), same in alike.items() if len(same) > 1]


def _growth(kind, small, large):
    flops, held = (large[key] / small[key] - 1 for key in (f"flops_per_{small['unit']}", "hbm_bytes_per_chip"))
    return (
        f"{kind}, from {small['chips']:,} to {large['chips']:,} chips: FLOPs per {small['unit']} {flops:+.1%}, memory "
        f"of a chip {held:+.1%}"
    )


def _row(r, first):
    pod = f"{r['slices']} x {r['topology']}" if r["slices"] > 1 else r["topology"]
    chosen = ", ".join(f"{k}={v}" for k, v in r.get("chosen", {}).items())
    row = [pod if first == "pod" else chosen, f"{r['chips']:,}", _mesh(r), f"{r['batch_size']:,}"]
    state = sum(r["memory"].get(kind, 0) for kind in _STATE)
    row += [f"{r['hbm_bytes_per_chip'] / _GB:,.1f} ({state / _GB:,.1f})", "yes" if r["fits"] else "NO"]
    if "estimate" not in r:
        return [*row, *["-"] * 6]
    e = r["estimate"]
    return [
        *row,
        f"{r['flops_per_' + r['unit']] / 1e9:,.1f}",
        f"{r['hardware_over_model_flops']:.2f} ({r['hardware_over_model_flops_without_remat']:.2f})",
        f"{e['step_seconds'] * 1e3:,.0f}",
        e["bound"],
        f"{e['mfu']:.2f}",
        f"{r['compile_seconds']:,.0f} ({r['compile_cpu_seconds']:,.0f})",
    ]
