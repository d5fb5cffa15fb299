"""What `ddt-jax plan` does: a config's train step, or what it answers, compiled for pods that are not there.

    ddt-jax plan --config configs/ddt_llama_8b.py --topology v5p:8x8x8

The step, its state and its mesh are those of `experiment.build`; the data is never opened, and no weights are read. Of
answers, `planning_answers`.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.scaling import generation_text, model_flops, plan, plan_text, topology
from ddt_jax.scaling.topology import Topology

# What `--search` tries of each, unless it is told; meshes are what is left of these after the pod's size.
SEARCHED = {"fsdp": "8,32,128,512", "tensor": "1,4", "remat": "full,dots_attention", "accumulate": "1,4"}


@dataclass(frozen=True)
class Request:
    """Attributes:
    rows: of a micro-batch on each part of the mesh that takes rows; 0: what train.batch_size says.
    effort: of the compiler, as `plan.Step`; by default the least, which plans in a quarter to half of the time.
    of: "train", or a key of `planning_answers.ANSWERS`; prompt: tokens of a text that is drawn.
    """

    config: str
    overrides: tuple[tuple[str, str], ...] = ()
    mesh: str = ""
    rows: int = 0
    effort: float = -1.0
    of: str = "train"
    prompt: int = 64


def run(args, overrides: tuple[tuple[str, str], ...]) -> tuple[dict, str]:
    """(report, text for people) of the verb. args: of the command line."""
    if args.rows < 0:
        raise UserError(f"--rows must be at least 1, got {args.rows}")
    if args.prompt < 0:
        raise UserError(f"--prompt must be at least 0, got {args.prompt}")
    if not -1 <= args.effort <= 1:
        raise UserError(f"--effort must lie in [-1, 1], got {args.effort:g}")
    request = Request(args.config, overrides, args.mesh, args.rows, args.effort)
    pods = [topology.parse(text, args.slices) for text in args.topology.split(",")]

    def note(line):
        print(f"plan: {line}", file=sys.stderr, flush=True)

    if args.of != "train":
        if args.search is not None:
            raise UserError(f"--search: it looks for meshes of train steps; leave it out with --of {args.of}")
        asked = replace(request, of=args.of, prompt=args.prompt)
        result = plan_all(asked, pods, note)
        return result, "\n\n".join(map(generation_text.text, result.get("plans", [result])))
    if args.search is None:
        result = plan_all(request, pods, note)
        return result, plan_text.table(result["plans"]) if "plans" in result else plan_text.text(result)
    if len(pods) > 1 or args.mesh:
        raise UserError("--search: takes one --topology and makes meshes itself; leave --mesh out, name fsdp=N,N here")
    result = search(request, pods[0], args.search, note)
    return result, plan_text.table(result["found"], "chosen")


def plan_all(request: Request, pods: list[Topology], note: Callable[[str], None]) -> dict:
    """One report, or {"plans": [...]} for several pods. note: is told what comes next."""
    reports = []
    for pod in pods:
        if len(pods) > 1:
            note(f"{pod} ({len(reports) + 1} of {len(pods)})")
        reports.append(plan_one(request, pod, topology.devices(pod)))
    return reports[0] if len(reports) == 1 else {"plans": reports}


def plan_one(request: Request, pod: Topology, devices: list) -> dict:
    """The report of `scaling.plan`, or of answers, with "config", "settings" and "notes"."""
    if request.of != "train":
        return _plan_answers(request, pod, devices)
    s, notes = prepare(request, pod, len(devices))
    found = plan.report(replace(step(s, devices), effort=request.effort), pod)
    notes += plan_text.warnings(found) + plan_text.rows_that_travel(found, s.train.accumulate)
    return {
        "config": request.config,
        "name": s.name,
        "settings": [f"{key}={value}" for key, value in request.overrides],
        "batch_size": s.train.batch_size,
        "accumulate": s.train.accumulate,
        **found,
        "notes": notes,
    }


def _plan_answers(request: Request, pod: Topology, devices: list) -> dict:
    """Of a run on one chip, as `ddt-jax generate` answers, or over the mesh that is asked for."""
    from ddt_jax import planning_answers

    s = _settings(request, pod)
    if not request.mesh:
        s, devices = replace(s, mesh=settings.Mesh()), devices[:1]
    asked = planning_answers.Asked(request.of, request.rows, request.prompt, request.effort)
    found, notes = planning_answers.report(s, asked, pod, devices)
    return {
        "config": request.config,
        "name": s.name,
        "settings": [f"{key}={value}" for key, value in request.overrides],
        **found,
        "notes": notes + plan_text.warnings(found),
    }


def search(request: Request, pod: Topology, wanted: list[str], note: Callable[[str], None]) -> dict:
    """{"found": [...]}, reports of all combinations, the fastest estimate of those that fit first.

    Args:
      wanted: "name=value,value" of SEARCHED.

    Raises:
      UserError: if nothing of it can be laid over this pod.
    """
    choices = _choices(wanted)
    devices = topology.devices(pod)
    asked = {}  # by settings, as several choices may come to the same
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        try:
            tried = _chosen(request, chosen)
            asked.setdefault(prepare(tried, pod, len(devices))[0], (tried, chosen))
        except UserError as error:
            refused = error
    found = []
    for number, (tried, chosen) in enumerate(asked.values()):
        note(f"{number + 1} of {len(asked)}: {', '.join(f'{k}={v}' for k, v in chosen.items())}")
        try:
            found.append({"chosen": chosen, **plan_one(tried, pod, devices)})
        except UserError as error:  # before anything is compiled: a mesh that does not fit, or no accumulation
            refused = error
            note(f"left out: {error}")
    if not found:
        raise refused
    seconds = lambda r: r["estimate"]["step_seconds"] / r[f"{r['unit']}s_per_step"] if "estimate" in r else np.inf  # noqa: E731
    return {"found": sorted(found, key=lambda r: (not r["fits"], seconds(r)))}


def _choices(wanted: list[str]) -> dict[str, list[str]]:
    texts = dict(SEARCHED)
    for text in wanted:
        name, equals, values = text.partition("=")
        if name not in SEARCHED or not equals:
            raise UserError(f"--search {text}: write NAME=VALUE,VALUE; names are {', '.join(SEARCHED)}")
        texts[name] = values
    return {name: text.split(",") for name, text in texts.items()}


def _chosen(request: Request, chosen: dict[str, str]) -> Request:
    s = config.load(request.config, request.overrides)
    where = _remat_setting(s)
    changes = [("train.accumulate", chosen["accumulate"])]
    if where:
        value = chosen["remat"]
        changes.append((where, value if isinstance(_get(s, where), str) else str(value != "none")))
    mesh = f"data=-1,fsdp={chosen['fsdp']},tensor={chosen['tensor']}"
    return replace(request, overrides=(*request.overrides, *changes), mesh=mesh)


def _remat_setting(s: settings.Experiment) -> str:
    """The name of the setting that says what blocks compute again; "" if the model has none."""
    if isinstance(s.model, settings.Multimodal):
        return "model.transformer.remat"
    return "model.remat" if hasattr(s.model, "remat") else ""


def _get(s, dotted):
    for name in dotted.split("."):
        s = getattr(s, name)
    return s


def prepare(request: Request, pod: Topology, devices: int) -> tuple[settings.Experiment, list[str]]:
    """The settings of a run on a pod, and what had to be assumed for it.

    Raises:
      UserError: for a mesh that does not fit, or sizes that only data would tell.
    """
    s, notes = _settings(request, pod), []
    parts = _parts(s.mesh, devices)
    if request.rows:
        return _with_batch(s, request.rows * parts * s.train.accumulate), notes
    micro = parts * s.train.accumulate
    if s.train.batch_size % micro:
        rows = -(-s.train.batch_size // micro) * micro
        notes.append(
            f"train.batch_size={s.train.batch_size} does not divide over {parts} parts of the mesh x "
            f"train.accumulate={s.train.accumulate}, and training would refuse it; planned with {rows}"
        )
        s = _with_batch(s, rows)
    return s, notes


def _settings(request: Request, pod: Topology) -> settings.Experiment:
    """Without what only data would tell. Raises UserError for sizes that are not set."""
    pairs = tuple((f"mesh.{name}", size) for name, size in _pairs(request.mesh))
    s = config.load(request.config, (*request.overrides, *pairs))
    if pod.slices > 1 and s.mesh.replica == 1:
        s = replace(s, mesh=replace(s.mesh, replica=pod.slices))
    return _without_data(s)


def _pairs(mesh: str) -> list[tuple[str, str]]:
    names = [f for f in settings.Mesh.__dataclass_fields__]
    found = []
    for text in filter(None, mesh.split(",")):
        name, equals, size = text.strip().partition("=")
        if name not in names or not equals:
            raise UserError(f"--mesh {text}: write AXIS=SIZE; axes are {', '.join(names)}")
        found.append((name, size))
    return found


def _parts(mesh: settings.Mesh, devices: int) -> int:
    """Parts into which a batch is cut. A mesh that does not fit is refused where it is made."""
    sizes = [getattr(mesh, name) for name in settings.Mesh.__dataclass_fields__]
    whole = max(devices // int(np.prod([n for n in sizes if n > 0])), 1)
    return int(np.prod([n if n > 0 else whole for n in (mesh.replica, mesh.data, mesh.fsdp)]))


def _with_batch(s, rows):
    return replace(s, train=replace(s.train, batch_size=rows))


def _without_data(s: settings.Experiment) -> settings.Experiment:
    """Weights of a frozen codec need not be there; sizes that codes and texts decide have to be set."""
    m = s.model
    if isinstance(m, settings.Multimodal):
        image = m.image
        codes = isinstance(image, settings.CodeImages)
        needed = {"model.transformer.vocab_size": m.transformer.vocab_size}
        if codes:
            needed |= {"model.image.num_tokens": image.num_tokens, "model.image.codebook_size": image.codebook_size}
            needed |= {"model.image.code_width": image.code_width} if image.code_vectors else {}
        missing = [f"--config.{name}=N" for name, size in needed.items() if not size]
        if missing:
            raise UserError(f"plan: a run takes these sizes from its data, a plan has none; add {' '.join(missing)}")
        return s if codes else replace(s, model=replace(m, image=replace(image, codec=_any_weights(image.codec))))
    if hasattr(m, "codec"):
        s = replace(s, model=replace(m, codec=_any_weights(m.codec)))
    return s


def _any_weights(codec):
    return replace(codec, random_weights=not codec.weights) if isinstance(codec, settings.VAECodec) else codec


def step(s: settings.Experiment, devices: list) -> plan.Step:
    """What is compiled for settings that `prepare` made. Raises UserError as `experiment.build`."""
    from ddt_jax import experiment

    built = experiment.build(s, devices)
    once = model_flops.without_remat(s)
    make = experiment.build, experiment.abstract_batch, devices[:1]
    plain = model_flops.traced(once, *make)
    again = model_flops.traced(s, *make) - plain if s != once else 0.0
    rows, share = isinstance(s.model, settings.Multimodal), _attention_share(s, built)
    if rows and s.model.transformer.remat in ("full", "dots") and devices[0].platform == "tpu":
        again -= model_flops.attention(s, 2, (1 - share) * s.sequences.context**2)  # tiles that the kernel skips again
    return plan.Step(
        built.step,
        built.abstract,
        experiment.abstract_batch(built),
        built.mesh,
        unit="token" if rows else "image",
        units=s.train.batch_size * (s.sequences.context if rows else 1),
        model_flops=plain - model_flops.behind(s),
        repeated_flops=again,
        attention_share=share,
    )


def _attention_share(s: settings.Experiment, built) -> float:
    """Of all pairs of a row and a key; with context, the mean of a row's parts, of which later ones see more keys."""
    from ddt_jax.nn import attention_tpu

    parts = built.mesh.shape["context"]
    if not isinstance(s.model, settings.Multimodal) or s.model.whole_prompts or s.sequences.context // parts % 128:
        return 1.0
    image, ahead = s.model.image, 0
    if getattr(image, "attention", "") == "bidirectional":
        ahead = (image.block_size or built.model.form.rows) - 1
    return attention_tpu.planned_share(s.sequences.context, s.sequences.context, ahead, parts)
