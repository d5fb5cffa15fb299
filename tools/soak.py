"""Long measurements, run by hand; each leaves its figures in docs/soak/NAME.json for good.

    python tools/soak.py quickstart               configs/quickstart.py for seeds 0, 1, 2, against its gates
    python tools/soak.py whole_way                `make quickstart`, against its gates
    python tools/soak.py edits                    configs/llama_edits.py, from its tokenizer on
    python tools/soak.py spatial_codes            configs/llama_spatial_scenes.py, from its tokenizer on
    python tools/soak.py seed_codes               configs/seed_llama_scenes.py, from its tokenizer's stages on
    python tools/soak.py scenes                   configs/ddt_scenes.py, then its renderer, against the gates
    python tools/soak.py spatial                  configs/spatial_scenes.py, at the bits of configs/ddt_scenes.py
    python tools/soak.py transfusion              configs/transfusion_scenes.py and three variants; --arms linear is one
    python tools/soak.py acdit_blocks             configs/acdit_scenes.py with blocks of 1, 4, 16 and 64 tokens
    python tools/soak.py acdit_clips              configs/acdit_moving_scenes.py; --arms frames is another variant
    python tools/soak.py seed                     configs/seed_scenes.py: retrieval by embedding and by code
    python tools/soak.py seed_causal --seeds 0,1,2    its first stage, causal against bidirectional queries
    python tools/soak.py seed_free                transformers on codes of both, which may draw what is no image
    python tools/soak.py text_beside_images --seeds 0,1,2    what learning images costs real text
    python tools/soak.py cifar10 --minutes 10     training on the real files, against PCA on the same images
    python tools/soak.py cifar10_device           the same in bfloat16 on an accelerator, its speed, a stand-in for rFID
    python tools/soak.py kill --kills 50          a run that is killed again and again, against an undisturbed one
    python tools/soak.py saves                    what checkpoints cost: time beside the steps, memory over 200 of them
    python tools/soak.py schedules --seeds 0,1    token schedules and time samplers against each other
    .venv-tpu/bin/python tools/soak.py selftok_tpu    the released tokenizer's step, compiled for 8 TPU chips

A record holds the commit (and whether the checkout differed from it), the resolved config, seeds, machine, date,
command line, wall seconds, every figure and every gate. What a document states must be in such a record, or in a test.
Nothing else should run on the machine meanwhile. Ctrl-C stops the measurement and writes nothing.
"""

import argparse
import datetime
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))
import soak_runs as programs  # noqa: E402
from soak_acdit import acdit_blocks, acdit_clips  # noqa: E402
from soak_cifar10 import cifar10, cifar10_device  # noqa: E402
from soak_codes import edits, seed_codes, spatial_codes, text_beside_images, whole_way  # noqa: E402
from soak_gates import note  # noqa: E402
from soak_kill import kill  # noqa: E402
from soak_saves import saves  # noqa: E402
from soak_scenes import quickstart, scenes, schedules, spatial, transfusion  # noqa: E402
from soak_seed import seed, seed_causal, seed_free  # noqa: E402
from soak_tpu import selftok_tpu  # noqa: E402

MEASUREMENTS: dict[str, Callable] = {
    "quickstart": quickstart,
    "whole_way": whole_way,
    "edits": edits,
    "spatial_codes": spatial_codes,
    "seed_codes": seed_codes,
    "scenes": scenes,
    "spatial": spatial,
    "transfusion": transfusion,
    "acdit_blocks": acdit_blocks,
    "acdit_clips": acdit_clips,
    "seed": seed,
    "seed_causal": seed_causal,
    "seed_free": seed_free,
    "text_beside_images": text_beside_images,
    "cifar10": cifar10,
    "cifar10_device": cifar10_device,
    "kill": kill,
    "saves": saves,
    "schedules": schedules,
    "selftok_tpu": selftok_tpu,
}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.NAME.NAME=VALUE changes a setting of the config, for a trial; the record keeps it.",
    )
    parser.add_argument("name", choices=MEASUREMENTS, help="which measurement")
    parser.add_argument("--seeds", default="", metavar="N,N", help="seeds of the runs (quickstart: 0,1,2; others: 0)")
    parser.add_argument(
        "--minutes", type=float, default=10, help="cifar10, cifar10_device: wall time of training, start-up included"
    )
    parser.add_argument(
        "--arms", default="", metavar="NAME,NAME", help="transfusion, acdit_blocks, acdit_clips: variants"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="WORKDIR",
        help="whole_way, edits, spatial_codes: this one, trained before; seed_codes: its stage codes; seed_free: what "
        "seed_causal has kept; text_beside_images: the folder of `make quickstart`",
    )
    parser.add_argument("--kills", type=int, default=50, help="kill: how many (default: 50)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak", metavar="DIR", help="where NAME.json goes")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the runs in this new folder (else they are removed)"
    )
    options, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.") or "=" not in text]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep {options.keep} exists already; give a new folder")
    if options.tokenizer and not options.tokenizer.is_dir():
        parser.error(f"--tokenizer {options.tokenizer}: no such folder; give the workdir of a trained tokenizer")
    options.overrides = rest
    options.seeds = [int(n) for n in (options.seeds or ("0,1,2" if options.name == "quickstart" else "0")).split(",")]
    return options


def without_folders(argv: list[str]) -> list[str]:
    """Arguments without folders: where files of one machine went tells nobody how to make figures again."""
    names = ("--out", "--keep", "--tokenizer")
    before = ["", *argv]
    return [
        text
        for text, previous in zip(argv, before, strict=False)
        if text.partition("=")[0] not in names and previous not in names
    ]


def measured(name: str, command: str, options, measure: Callable) -> int:
    """Runs a measurement, writes its record, and returns the exit code.

    Args:
      command: the line that makes the figures again.
      options: out, keep, overrides, and what the measurement wants.
      measure: (options, folder) → config, seeds, results, gates.
    """
    changed = programs.git("status", "--porcelain").splitlines()
    if changed:
        note(f"{len(changed)} files differ from the commit, as the record will say; to publish a figure, commit first")
    record = {
        "name": name,
        "commit": programs.git("rev-parse", "HEAD") or None,
        "dirty": bool(changed),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": programs.machine(),
    }
    began = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    try:
        found = measure(options, folder)
    except programs.Failed as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    record |= {
        **found,
        "overrides": options.overrides,
        "settings": programs.dump_config(found["config"], options),
        "wall_seconds": round(time.monotonic() - began, 1),
        "passed": all(check["passed"] for check in found["gates"]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = sum(not check["passed"] for check in record["gates"])
    note(f"{path}: {len(record['gates']) - missed} gates passed, {missed} missed, {record['wall_seconds']:.0f} s")
    return 0 if record["passed"] else 1


def main(argv=None) -> int:
    options = parse(argv)
    arguments = " ".join(without_folders(sys.argv[1:] if argv is None else argv))
    return measured(options.name, f"python tools/soak.py {arguments}", options, MEASUREMENTS[options.name])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run that is going on ends as well
    sys.exit(main())
