"""The report page stands alone, is well-formed, and shows what the workdirs hold: read again by parsers."""

import json
import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import cli, config, reporting
from ddt_jax.errors import UserError
from ddt_jax.evaluation import event_times, pictures, samples
from ddt_jax.io import atomic
from ddt_jax.scaling import points
from ddt_jax.training import goodput

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements of a page; refuses tags that do not close in order. elements: (tag, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open, self.text = [], [], ""
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def write_run(root, *, lr, loss=1.0):
    """The workdir of a tokenizer that seems to have trained and been evaluated, restarted once."""
    from tensorboardX.event_file_writer import EventFileWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    root.mkdir()
    s = config.load(str(ROOT / "configs" / "smoke.py"), (("optimizer.lr", str(lr)),))
    (root / "config.json").write_text(config.to_json(s))
    lines = [
        {"step": k, "loss": loss / k, "image_bits": 3.0, "learning_rate": lr, "bad_step": 0.0} for k in range(1, 31)
    ]
    lines[4]["loss"] = "nan"
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"step": 30, "n": 64, "psnr": 21.5, "odd_figure": 7, "psnr_by_tokens": {"2": 10.0, "4": 15.0, "8": 21.5}}
    results |= {"t2i_all_correct": 0.5, "t2i_all_correct_low": 0.4, "t2i_all_correct_high": 0.6, "t2i_all_correct_n": 9}
    results |= {"codebook_size": 64, "codebook_used_by_position": [5, 9], "codebook_perplexity_by_position": [3.5, 8.0]}
    (root / "results.json").write_text(json.dumps(results))
    (root / "timing.json").write_text('{"train_seconds": 83.2}')
    if root.name == "a":
        accounts = goodput.Goodput(root, 30, 0.0, lambda: {"training": 100.0, "waiting": 0.0, "compiling": 10.0})
        accounts._before = {"lost": 10.0}
        accounts.figures = {"mfu": 0.41, "images_per_second_per_chip": 256.0}
        accounts.write()
        for number, gigabytes in enumerate((2, 3)):
            beat = {"process": number, "peak_device_bytes": gigabytes << 30, "peak_host_bytes": 1 << 30}
            atomic.write_text(root / "heartbeats" / f"{number}.json", json.dumps(beat))
        atomic.write_text(root / "heartbeats" / "2.json", "{")  # damaged
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    rows = {
        f"{k} tokens\n{v} dB": np.roll(images, i + 1, 0) for i, (k, v) in enumerate(results["psnr_by_tokens"].items())
    }
    pictures.save_png(pictures.reconstruction_grid(images, rows), root / "reconstructions.png")
    asked = [samples.Sample(images[0], "a <red> disc & a bar", True), samples.Sample(images[1], "a frame", False)]
    samples.write(root / samples.FILE, {"text_to_image": asked, "image_to_text": [samples.Sample(images[2], "a bar")]})
    writer = EventFileWriter(str(root / "tensorboard"))
    for step, second in [(10, 100.0), (20, 105.0), (30, 110.0), (20, 145.0), (30, 150.0)]:
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="loss", simple_value=1.0)])
        writer.add_event(event_pb2.Event(wall_time=second, step=step, summary=summary))
    writer.close()
    return str(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page, its text, workdirs) of two runs, a sweep and a fit."""
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / "a", lr=0.1), write_run(root / "b", lr=0.2, loss=2.0)]
    (root / "fit").mkdir()
    (root / "fit" / "fit.json").write_text("{}")
    (root / "fit" / "fit.md").write_text(
        "# Scaling\n\n2 runs.\n\n| a | b |\n|---|---:|\n| x | 1.5 |\n\n- left out: y: why\n"
    )
    pictures.save_png(np.zeros((4, 4, 3), np.uint8), root / "fit" / "loss_flops.png")
    (root / "sweep").mkdir()
    lost = points.Point("arm", "lost", 5.0, 6.0, 7.0, {}, "diverged", "the loss ends at nan")
    (root / "sweep" / "sweep.json").write_text(json.dumps({"points": points.to_json([lost])}))
    out = root / "page.html"
    assert (
        cli.main(["report", *runs, str(root / "fit"), str(root / "sweep"), "--out", str(out), "--title", "Two <runs>"])
        == 0
    )
    text = out.read_text()
    return Page(text), text, runs


def test_the_page_asks_for_nothing_from_anywhere(made):
    page, text, _ = made
    assert not page.all("link") and not page.all("iframe") and not any("src" in s for s in page.all("script"))
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    assert not re.findall(r"""(?:url\(|@import|fetch\(|https?:)""", text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "img-src data:;" in policy


def test_the_page_is_laid_out_for_a_phone(made):
    page, text, _ = made
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all("width" not in svg and "viewbox" in svg for svg in page.all("svg"))  # they take the width there is
    widths = [int(w) for w in re.findall(r"[^-]width: (\d+)px", text)]
    assert not [w for w in widths if w > 320]
    tables = text.count("<table>")
    assert tables and text.count('<div class="table"><table>') == tables  # scroll in their own box


def test_every_chart_is_well_formed_and_within_its_frame(made):
    _, text, _ = made
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) >= 6
    for chart in map(xml.fromstring, charts):
        _, _, width, height = map(float, chart.get("viewBox").split())
        for line in chart.iter("polyline"):
            for pair in line.get("points").split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width and 0 <= y <= height
    (loss,) = [c for c in charts if 'aria-label="loss"' in c]
    assert loss.count("<polyline") == 4 and loss.count("×") == 2  # a gap and a cross in each, where it was no number


def test_links_lead_to_sections(made):
    page, _, _ = made
    ids = [e["id"] for _, e in page.elements if "id" in e]
    assert len(set(ids)) == len(ids) and {a["href"][1:] for a in page.all("a")} == set(ids)
    shown = "results sweeps curves speed samples progressive-reconstructions codebook scaling settings"
    assert ids == shown.split()


def test_sliders_go_over_all_numbers_of_tokens(made):
    page, text, _ = made
    boxes = re.findall(r'<div class="progressive">.*?</div></div>', text, re.DOTALL)
    assert len(boxes) == 2
    box = Page(boxes[0])
    (slider,) = box.all("input")
    layers = [image for image in box.all("img") if "data-label" in image]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    labels = [layer["data-label"] for layer in layers]
    assert labels == ["2 tokens: 10.0 dB", "4 tokens: 15.0 dB", "8 tokens: 21.5 dB"]
    assert len({layer["src"] for layer in layers}) == 3 and ["class" in layer for layer in layers] == [
        True,
        True,
        False,
    ]


def test_samples_carry_their_texts_and_marks(made):
    page, text, _ = made
    assert text.count("✓ right") == text.count("✗ wrong") == 2
    assert page.text.count("a <red> disc & a bar") == 2  # escaped in the file, whole for the reader
    assert page.text.count("50.0% (40.0% to 60.0%)") == 2 and "t2i all correct low" not in page.text
    assert "Loss that is no finite number in a, b." in page.text


def test_what_differs_what_failed_and_what_was_fitted_is_there(made):
    page, text, _ = made
    differing = text[text.index("What differs: ") : text.index("All settings")]
    assert "optimizer.lr" in differing and "0.2" in differing and "optimizer.warmup" not in differing
    assert "diverged" in page.text and "the loss ends at nan" in page.text
    assert "left out: y: why" in page.text and '<td class="n">1.5</td>' in text
    assert "bad step" not in page.text  # zero throughout


def test_speed_is_that_of_the_event_files(made):
    times = event_times.read(made[2][0])
    assert times == [(10, 100.0), (20, 105.0), (30, 110.0), (20, 145.0), (30, 150.0)]
    assert event_times.rates(times) == [(20, 2.0), (30, 2.0), (30, 2.0)]
    assert event_times.rates(times[:1]) == []


def test_goodput_and_memory_are_those_of_the_accounts_and_the_heartbeats(made):
    rows = re.findall(r"<tr>(.*?)</tr>", made[1], re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    a = ["2", "16", "256.0", "41.0%", "83.3%", "3.00", "1.00"]  # no column of tokens/s, which nobody has measured
    assert any(row[1:] == a and "a" in row[0] for row in cells)
    b = ["2", "16", *"–––––"]  # of an older version: neither accounts nor heartbeats
    assert any(row[1:] == b and "b" in row[0] for row in cells)
    kinds = ["0:10", "1:40", "0:10"]  # compiling, steps, lost
    assert [row[1:] for row in cells if row[1:] == kinds]


def test_a_torn_event_file_gives_what_is_whole(made, tmp_path):
    (file,) = (Path(made[2][0]) / "tensorboard").iterdir()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / file.name).write_bytes(file.read_bytes()[:-9])
    assert len(event_times.read(tmp_path)) == 4


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json(config.load(str(ROOT / "configs" / "smoke.py"))))
    found = reporting.report([str(tmp_path / "run")], str(tmp_path / "p.html"))
    page = Page((tmp_path / "p.html").read_text())
    assert found["runs"] == ["run"] and "0 of 30" in page.text


def test_clips_are_shown_moving_unless_they_are_large(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config.to_json(config.load(str(ROOT / "configs" / "smoke.py"))))
    (run / "samples.gif").write_bytes(b"GIF89a")
    (run / "samples.png").write_bytes(b"PNG")
    reporting.report([str(run)], str(tmp_path / "p.html"))
    text = (tmp_path / "p.html").read_text()
    assert '<details open><summary>Drawn</summary>\n<img class="sheet" src="data:image/gif;base64,R0lGODlh"' in text
    monkeypatch.setattr(reporting, "_MOVING_BYTES", 5)
    reporting.report([str(run)], str(tmp_path / "p.html"))
    assert "data:image/png;base64,UE5H" in (tmp_path / "p.html").read_text()


def test_what_is_no_run_is_refused_in_a_line(tmp_path, made):
    with pytest.raises(UserError, match="report: .* holds no run"):
        reporting.report([str(tmp_path)], str(tmp_path / "p.html"))
    with pytest.raises(UserError, match="is named twice"):
        reporting.report([made[2][0]] * 2, str(tmp_path / "p.html"))
