"""`ddt-jax report`: runs, and fits of them, on one HTML page that needs nothing else."""

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from ddt_jax.errors import UserError
from ddt_jax.evaluation import event_times, page, pictures, samples, svg
from ddt_jax.io import atomic
from ddt_jax.scaling import points
from ddt_jax.training import goodput, heartbeat
from ddt_jax.training.checkpoint import saved_config
from ddt_jax.training.progress import duration
from ddt_jax.training.speed import RATE
from ddt_jax.training.writers import METRICS_FILE, read_metrics

# Curves that are shown at once; the others are folded away. A name belongs to the first group with one of its words.
_GROUPS = {
    "Held-out figures": ("eval/",),
    "Loss and its terms": ("loss", "next_token", "diffusion", "flow", "pixel", "commitment", "lpips", "kl"),
    "By modality": ("text_", "image_", "codebook_"),
    "Speed and goodput": ("per_second", "goodput", "mfu", "seconds"),
}
# Key figures of results.json, and what they are.
_FIGURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "FID of decoded images",
    "scenes_all_correct": "scenes decoded right",
    "codebook_perplexity": "codebook perplexity",
    "diffusion": "diffusion loss, squared error",
    "image_bits": "bits per image code",
    "plain_perplexity": "text perplexity",
    "t2i_all_correct": "pictures of captions right",
    "t2i_fid": "FID of pictures of captions",
    "caption_all_correct": "captions of pictures right",
    "edit_all_correct": "edits right",
    "probe_linear": "classes, linear probe",
    "probe_knn": "classes, nearest neighbours",
}
# What curves are in.
_UNITS = {
    "next_token": "nats per token",
    "text_nll": "nats per token",
    "image_bits": "bits per code",
    "text_accuracy": "share of tokens",
    "image_accuracy": "share of codes",
    "codebook_perplexity": "codes",
    "commitment": "squared distance",
    "diffusion": "squared error",
    "flow": "squared error",
    "mse": "squared error",
    "psnr": "dB",
}
_MEASURED = {RATE.format(unit): "{:,.1f}" for unit in ("token", "image")} | {"mfu": "{:.1%}", "goodput": "{:.1%}"}
_MOVING_BYTES = 4 << 20  # of a sheet of clips that a page takes
_MANY = 30  # settings that differ, from which they are folded away
_ENDS = ("_low", "_high", "_n")  # of names that belong to a figure
_SHEETS = {
    "text_to_image": "Pictures of held-out captions",
    "image_to_text": "Captions of held-out pictures",
    "editing": "Edits: before, drawn, wanted",
    "generated": "Drawn by `generate`",
    "samples": "Drawn",
    "counterfactuals": "A's codes with some of B's in their place",
}


@dataclass(frozen=True)
class _Run:
    """What a page shows of a workdir."""

    workdir: str
    name: str
    index: int
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    times: list[tuple[int, float]]
    seconds: float | None = None
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def report(sources: Sequence[str], out: str, title: str = "") -> dict[str, Any]:
    """Writes the page.

    Args:
      sources: workdirs, and folders that `ddt-jax fit` and `ddt-jax sweep` have written.
      out: the .html file.

    Returns:
      "runs", their names; "written"; "bytes".

    Raises:
      UserError: a source is none of these, is named twice, its files are no JSON, or the page cannot be written.
    """
    if len(set(sources)) < len(sources):
        raise UserError(f"report: {next(s for s in sources if list(sources).count(s) > 1)} is named twice")
    fits = [s for s in sources if (epath.Path(s) / "fit.json").exists()]
    sweeps = [s for s in sources if (epath.Path(s) / points.SWEEP_FILE).exists()]
    workdirs = [s for s in sources if s not in (*fits, *sweeps)]
    runs = [_read(w, name, i) for i, (w, name) in enumerate(zip(workdirs, _names(workdirs), strict=True))]
    sections = [
        ("Results", _results(runs)),
        ("Sweeps", "".join(map(_sweep, sweeps))),
        ("Curves", _curves(runs)),
        ("Speed", _speed(runs)),
        ("Samples", "".join(map(_samples, runs))),
        ("Progressive reconstructions", "".join(map(_progressive, runs))),
        ("Codebook", _codebook(runs)),
        ("Scaling", "".join(map(_fit, fits))),
        ("Settings", _settings(runs)),
    ]
    written = time.strftime("%d %B %Y, %H:%M")
    chips = "".join(f"<span>{_chip(run)}{escape(run.name)}</span>" for run in runs)
    lead = f'<p class="faint">{escape(written)}</p>'
    legend = f'<div class="runs">{chips}</div>' if runs else ""
    text = page.page(title or ", ".join(run.name for run in runs) or "Scaling", lead, sections, legend)
    try:
        atomic.write_text(out, text)
    except OSError as error:
        raise UserError(f"report: cannot write {out}: {error.strerror or error}") from error
    return {"runs": [run.name for run in runs], "written": out, "bytes": len(text.encode())}


def _names(workdirs) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [str(w).rstrip("/").split("/") for w in workdirs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(map(str, workdirs))


def _read(workdir, name, index) -> _Run:
    root = epath.Path(workdir)
    tree = saved_config(workdir, "report")
    log = root / METRICS_FILE
    metrics = read_metrics(log) if log.exists() else []
    series: dict[str, list[tuple[float, float]]] = {}
    for record in metrics:
        for key, value in record.items():
            if key != "step":
                series.setdefault(key, []).append((float(record["step"]), float(value)))
    timing, results = _json(root / "timing.json"), _json(root / "results.json")
    seconds, times = timing.get("train_seconds"), event_times.read(workdir)
    return _Run(str(workdir), name, index, tree, metrics, results, times, seconds, series)


def _json(path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"report: {path} is no JSON ({error}); make it again, or take it away") from error


def _chip(run) -> str:
    return f'<span class="chip" style="background:{svg.colour(run.index)}"></span>'


def _results(runs) -> str:
    """Key figures first, all others folded."""
    if not runs:
        return ""

    def rows(names):
        return [
            [_FIGURES.get(name, name.replace("_", " ")), *(_figure(run.results, name) for run in runs)]
            for name in names
        ]

    header = ["", *(run.name for run in runs)]
    plain = {k for run in runs for k, v in run.results.items() if isinstance(v, int | float)}
    plain -= {f"{name}{end}" for name in plain for end in _ENDS}  # part of their figure's own row
    known = [name for name in _FIGURES if name in plain]
    about = [
        ["config", *(f"{run.config.get('name', '')} ({run.config['model']['kind']})" for run in runs)],
        ["steps", *(_steps(run) for run in runs)],
        ["training", *("–" if run.seconds is None else duration(run.seconds) for run in runs)],
    ]
    bad = [run.name for run in runs if any(not np.isfinite(y) for _, y in run.series.get("loss", ()))]
    warning = f'<p class="wrong">Loss that is no finite number in {escape(", ".join(bad))}.</p>' if bad else ""
    others = page.table(header, rows(sorted(plain - set(known)))) if plain - set(known) else ""
    return warning + page.table(header, [*about, *rows(known)]) + page.folded("Other figures", others, not known)


def _steps(run) -> str:
    done, wanted = run.metrics[-1]["step"] if run.metrics else 0, run.config["train"]["steps"]
    done = max(done, run.results.get("step", 0))
    return f"{done:,}" if done >= wanted else f"{done:,} of {wanted:,}"


def _figure(results, name) -> str:
    """A figure, with its interval where it has one."""
    value = results.get(name)
    if not isinstance(value, int | float):
        return "–"
    low, high = results.get(f"{name}_interval") or (results.get(f"{name}_low"), results.get(f"{name}_high"))
    if low is not None and high is not None and 0 <= low <= high <= 1:
        return f"{value:.1%} ({low:.1%} to {high:.1%})"
    bounds = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + bounds


def _curves(runs) -> str:
    names = sorted({name for run in runs for name in run.series})
    groups: dict[str, list[str]] = {heading: [] for heading in (*_GROUPS, "")}
    for name in names:
        moved = any(y != 0 for run in runs for _, y in run.series.get(name, ()))
        heading = next((h for h, words in _GROUPS.items() if any(word in name for word in words)), "")
        if moved:
            groups[heading].append(name)
    parts = []
    for heading, members in groups.items():
        members.sort(key=lambda name: name != "loss")
        charts = [_chart(runs, name) for name in members]
        if heading:
            parts.append(f"<h3>{heading}</h3>\n{page.flow(charts)}" if any(charts) else "")
        else:
            parts.append(page.folded("Everything else that was logged", page.flow(charts)))
    return "\n".join(parts)


def _chart(runs, name) -> str:
    shown = [svg.Curve(run.name, run.index, run.series[name]) for run in runs if name in run.series]
    bare = name.rpartition("/")[2]
    unit = _UNITS.get(bare) or _UNITS.get(bare.partition("_")[0], "")
    return svg.curves(name.replace("_", " ") + (f", {unit}" if unit else ""), shown)


def _speed(runs) -> str:
    """Steps per second by the event files; what process 0 has measured, and where the time went, by its accounts."""
    curves, rows, times = [], [], []
    for run in runs:
        points, accounts = event_times.rates(run.times), goodput.read(run.workdir)
        if not points and not accounts:
            continue
        curves.append(svg.Curve(run.name, run.index, points))
        usual = float(np.median([rate for _, rate in points])) if points else None
        beats = heartbeat.read(run.workdir)
        cells = [_or_dash(usual, "{:.3g}"), _or_dash(usual and usual * run.config["train"]["batch_size"], "{:,.0f}")]
        cells += [_or_dash(accounts.get(name), text) for name, text in _MEASURED.items()]
        for name in ("peak_device_bytes", "peak_host_bytes"):
            cells.append(_or_dash(max((beat.get(name, 0) for beat in beats), default=0) / 2**30, "{:.2f}"))
        rows.append([run.name, *cells])
        seconds = accounts.get("seconds", {})
        times.append([run.name, *(duration(seconds[k]) if k in seconds else "–" for k in goodput.KINDS)])
    if not rows:
        return ""
    text = '<p class="faint">Goodput: of all time, over all restarts, that of steps which counted. Lost: what was done '
    text += "after a checkpoint from which a run went on. Memory: the fullest process.</p>"
    header = ["run", "steps/s", "examples/s", "tokens/s/chip", "images/s/chip", "MFU", "goodput"]
    table = _filled([*header, "GiB of a device", "GiB of a host"], rows)
    spent = _filled(["time in", *goodput.KINDS], times)
    return page.flow([svg.curves("steps per second", curves)]) + table + (spent + text if spent else "")


def _filled(header, rows) -> str:
    """A table without the columns that have nothing but dashes."""
    kept = [0, *(i for i in range(1, len(header)) if any(row[i] != "–" for row in rows))]
    return page.table([header[i] for i in kept], [[row[i] for i in kept] for row in rows]) if len(kept) > 1 else ""


def _or_dash(value, text) -> str:
    return text.format(value) if value else "–"


def _samples(run) -> str:
    root, parts = epath.Path(run.workdir), []
    singly = _json(root / samples.FILE)
    for name, heading in _SHEETS.items():
        if of := singly.get(name):
            marks = [s["right"] for s in of if s["right"] is not None]
            share = f": {sum(marks)} of {len(marks)} shown are right" if marks else ""
            shown = page.samples([(s["picture"], s["text"], s["right"]) for s in of])
            parts.append(f"<h4>{heading}{share}</h4>{shown}")
        elif path := _sheet(root, name):
            body = f'<img class="sheet" src="{_uri(path)}" alt="{heading}">'
            parts.append(page.folded(heading, body, name == "samples"))
    return f"<h3>{_chip(run)}{escape(run.name)}</h3>\n{''.join(parts)}" if parts else ""


def _sheet(root, name):
    """The file of a sheet: one that moves, where there is one that is not too large, else the PNG, else None."""
    moving, still = root / f"{name}.gif", root / f"{name}.png"
    if moving.exists() and moving.stat().length <= _MOVING_BYTES:
        return moving
    return still if still.exists() else None


def _uri(path) -> str:
    kind = "gif" if path.suffix == ".gif" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _progressive(run) -> str:
    path, by_tokens = epath.Path(run.workdir) / "reconstructions.png", run.results.get("psnr_by_tokens")
    if not by_tokens or not path.exists():
        return ""
    sheet = np.asarray(Image.open(BytesIO(path.read_bytes())).convert("RGB"))
    rows = pictures.rows_of(sheet, 1 + len(by_tokens))
    if not rows:  # of another version
        body = f'<img class="sheet" src="{_uri(path)}" alt="reconstructions">'
    else:
        labels = [f"{count} tokens: {value:.1f} dB" for count, value in by_tokens.items()]
        layers = list(zip(labels, map(samples.data_uri, rows[1:]), strict=True))
        body = page.progressive(samples.data_uri(rows[0]), layers)
    line = [(float(count), value) for count, value in by_tokens.items()]
    chart = svg.curves("PSNR (dB) by tokens shown", [svg.Curve(run.name, run.index, line)], "tokens")
    return f"<h3>{_chip(run)}{escape(run.name)}</h3>\n{body}\n{page.flow([chart])}"


def _codebook(runs) -> str:
    charts = []
    for run in runs:
        r = run.results
        if "codebook_used_by_position" in r:
            used, perplexity = r["codebook_used_by_position"], r["codebook_perplexity_by_position"]
            most = min(r["codebook_size"], r["n"])
            chart = svg.bars("codes seen, perplexity", used, perplexity, most, "position of the token", run.index)
            charts.append(f"<p>{_chip(run)}{escape(run.name)}</p>{chart}")
    note = '<p class="faint">Pale: different codes that a position has shown; strong: their perplexity. The dotted '
    note += "line is what they can reach, all codes or as many as there were images.</p>"
    return page.flow(charts) + note if charts else ""


def _fit(folder) -> str:
    root = epath.Path(folder)
    plots = "".join(f'<p><img class="sheet" src="{_uri(p)}" alt="{p.stem}"></p>' for p in sorted(root.glob("*.png")))
    text = (root / "fit.md").read_text()
    return f"<h3>{escape(str(folder))}</h3>\n{plots}\n{page.markdown(text)}"


def _sweep(folder) -> str:
    rows = []
    for p in _json(epath.Path(folder) / points.SWEEP_FILE)["points"]:
        loss = p["metrics"].get("loss")
        figures = [f"{p['params']:,.0f}", f"{p['flops']:.3g}", "–" if loss is None else f"{float(loss):.4g}"]
        rows.append([p["run"], p["status"], *figures, p["why"]])
    table = page.table(["run", "state", "parameters", "FLOPs", "loss", ""], rows)
    return f"<h3>{escape(str(folder))}</h3>\n{table}"


def _settings(runs) -> str:
    if not runs:
        return ""
    flat = [_flat(run.config) for run in runs]
    names = sorted(set().union(*flat))
    header = ["setting", *(run.name for run in runs)]

    def table(chosen):
        return page.table(header, [[name, *(_value(tree.get(name)) for tree in flat)] for name in chosen])

    differing = [name for name in names if len({_value(tree.get(name)) for tree in flat}) > 1]
    few = len(differing) <= _MANY  # two kinds of models differ in nearly all
    first = page.folded(f"What differs: {len(differing)} settings", table(differing), few) if differing else ""
    return first + page.folded("All settings", table(names))


def _flat(tree, prefix="") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _value(value) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
