"""`ddt-jax fit`: scaling laws of runs, from files of figures, sweeps and workdirs."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from ddt_jax import experiment, ledger
from ddt_jax.errors import UserError
from ddt_jax.evaluation import scaling_plots
from ddt_jax.io import atomic
from ddt_jax.scaling import fits, points
from ddt_jax.scaling.points import Point


def fit(
    sources: Sequence[str],
    to: str,
    *,
    metrics: Sequence[str] = ("loss",),
    keep: Sequence[str] = (),
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fits what the runs allow, and writes TO/fit.json, fit.md, points.csv and plots.

    Args:
      sources: files of runs (.csv, .json), folders of sweeps, workdirs; FAMILY=DIR calls a run's family something else
        than its config does.
      keep: outlier rules, "fid<=100".

    Returns:
      "study", as `fits.study`; "table", Markdown; "written".

    Raises:
      UserError: as `gather` and `fits.study`, a rule is none, or TO cannot be written.
    """
    if draws < 100:
        raise UserError(f"fit: --draws {draws} are too few for intervals; take 100 or more")
    rules = [points.rule(text) for text in keep]
    runs = gather(sources)
    study = fits.study(runs, metrics, rules=rules, draws=draws, seed=seed)
    table, folder = fits.markdown(study), epath.Path(to)
    try:
        written = [
            atomic.write_text(folder / "fit.json", json.dumps(study, indent=2, allow_nan=False) + "\n"),
            atomic.write_text(folder / "fit.md", table),
            atomic.write_text(folder / "points.csv", points.to_csv(runs)),
            *scaling_plots.draw(study, folder),
        ]
    except OSError as error:
        raise UserError(f"fit: cannot write to {to}: {error.strerror or error}") from error
    return {"study": study, "table": table, "written": [str(path) for path in written]}


def gather(sources: Sequence[str]) -> list[Point]:
    """The runs of files, sweeps and workdirs, in their order.

    Raises:
      UserError: a source is none of these, or two runs of a family have one name.
    """
    found: list[Point] = []
    for source in sources:
        before, equals, after = source.partition("=")
        family, path = (before, after) if equals and not epath.Path(source).exists() else ("", source)
        place = epath.Path(path)
        if (place / points.SWEEP_FILE).exists():
            of = points.read(str(place / points.SWEEP_FILE))
        elif (place / "config.json").exists():
            of = [ledger.point(family or experiment.saved_settings(path).name, path)]
        elif place.is_dir():
            raise UserError(f"fit: {path} is neither a sweep ({points.SWEEP_FILE}) nor a workdir (config.json)")
        else:
            of = points.read(path)
        found += of
    names = [(point.family, point.run) for point in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"fit: {twice[0]} has two runs called {twice[1]}; name every run once")
    return found
