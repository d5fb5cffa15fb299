"""Reports of `scaling.generation` for people."""

from ddt_jax.scaling import plan_text

_GB = 1e9


def text(r: dict) -> str:
    lines = [*_head(r), "", *plan_text.memory_lines(r)]
    if "loading_bytes_per_chip" in r:
        lines.append(f"before that, while weights are restored: {r['loading_bytes_per_chip'] / _GB:,.2f} GB")
    if "estimate" in r:
        lines += ["", *_work(r), "", *plan_text.collective_lines(r, "all of it"), "", *_estimate(r)]
    lines += [f"note: {note}" for note in r["notes"]]
    return "\n".join([*lines, plan_text.verdict(r, "mesh.fsdp and mesh.tensor divide weights, --rows the cache")])


def _head(r):
    yield f"{r['name']}, --of {r['of']}, on {plan_text.place(r)}"
    answers = f"{r['answers']:,} {r['answer']}s at once"
    if r.get("unit") == "token":
        answers += f", of {r['tokens'] // r['answers']:,} tokens each"
    if "prompt_positions" in r:
        answers += f", behind prompts of {r['prompt_positions']:,} positions"
    yield f"{r['parameters']:,} parameters; {answers}"


def _work(r):
    unit = r["unit"]
    yield f"operations of matrix products and convolutions, GFLOP per {unit}"
    yield f"  {'hardware':<16}{r[f'hardware_flops_per_{unit}'] / 1e9:>10,.2f}"
    yield f"read and written in HBM, GB per {unit}, all chips together"
    yield f"  {'hardware':<16}{r[f'hbm_traffic_bytes_per_{unit}'] / _GB:>10,.3f}"


def _estimate(r):
    e, unit = r["estimate"], r["unit"]
    yield "estimate from the chip's figures, not a measurement"
    rows = [("part", "bound", "times", "compute ms", "memory ms", "communication ms")]
    for part in r["parts"]:
        terms = (f"{part[f'{term}_seconds'] * 1e3:,.3f}" for term in ("compute", "memory", "communication"))
        rows.append((part["part"], part["bound"], f"{part['times']:,}", *terms))
    yield from (f"  {line}" for line in plan_text.columns(rows))
    for p in (p for p in r["parts"] if p["times"] > 1):
        yield f"  a {p['part']} of every {r['answer']} takes at least {p['seconds'] * 1e3:,.2f} ms ({p['bound']})"
    each = e[f"seconds_per_{r['answer']}"]
    yield (
        f"  {r['answers']:,} {r['answer']}s take at least {e['seconds']:,.3f} s, {each:,.4f} s each: at most "
        f"{e[f'{unit}s_per_second_per_chip']:,.1f} {unit}s/s/chip"
    )
    yield plan_text.compiled(r)
