"""`ddt-jax plan --of generate` and `--of caption`: what `ddt-jax generate` runs, compiled for a pod that is not there.

The programs and their arguments are those of `multimodal.answers` and `multimodal.diffusion_answers`; prompts are made
up, weights are abstract.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone, documents
from ddt_jax.multimodal.answers import Answerer, Call
from ddt_jax.multimodal.diffusion_answers import DiffusionAnswerer
from ddt_jax.multimodal.documents import Image
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import SPECIAL, Vocabulary
from ddt_jax.nn.decoder import head_dim
from ddt_jax.scaling import generation, memory, plan
from ddt_jax.scaling.generation import Answers, Stage
from ddt_jax.scaling.topology import Topology
from ddt_jax.speaking import BATCH

ANSWERS = {"generate": "image", "caption": "text"}  # what --of asks for → what answers it


@dataclass(frozen=True)
class Asked:
    """Attributes:
    of: a key of ANSWERS.
    rows: prompts at once on each part of the mesh; 0: as many as `ddt-jax generate` takes at once, over all of it.
    prompt: tokens of a text that is drawn.
    effort: of the compiler.
    """

    of: str
    rows: int = 0
    prompt: int = 64
    effort: float = -1.0


def report(s: settings.Experiment, asked: Asked, pod: Topology, devices: list) -> tuple[dict, list[str]]:
    """(the report of `scaling.generation` and where it is of, what a reader must know about it).

    Args:
      s: with all sizes set; its mesh is that of the plan.

    Raises:
      UserError: the model answers no prompts, or a prompt does not fit its context.
    """
    check(s, asked.of)
    plain = _for_decoding(s)
    built = experiment.build(plain, devices, to_train=False)
    if (parts := built.mesh.shape[meshes.CONTEXT]) > 1:
        raise UserError(f"plan: --of {asked.of} has no rows to split over context={parts}; leave it out of --mesh")
    parts = meshes.row_parts(built.mesh)
    rows, notes = asked.rows * parts or -(-BATCH // parts) * parts, []
    if not asked.rows and rows != BATCH:
        notes.append(f"{BATCH} prompts do not divide over {parts} parts of the mesh; planned with {rows}")
    if built.mesh.size > 1:
        notes.append(
            f"`ddt-jax generate` takes one chip; this is its program with weights and prompts over {built.mesh.size}"
        )
    if asked.of == "caption":
        notes.append("a text ends where the model ends it; planned are texts that are as long as they may be")
    elif s.model.image.kind == "codes":
        notes.append("what makes pictures of codes, the run's image tokenizer, is not part of this plan")
    found = plan.where(built.mesh, pod, built.abstract.params, asked.effort)
    found |= {"of": asked.of, "answer": ANSWERS[asked.of], "answers": rows}
    answerer = _answerer(built, rows)
    weights = _weights(answerer)
    try:
        planned, spent = _planned(built, answerer, asked, _restored(s, devices) + weights)
    except plan.Refused as error:
        return found | {"fits": False, "hbm_bytes_per_chip": error.needed, "memory": {"parameters": weights}}, notes
    found |= {"unit": planned.unit, f"{planned.unit}s": planned.units, "prompt_positions": planned.prompt}
    return found | spent | generation.measured(planned, pod), notes


def check(s: settings.Experiment, of: str) -> None:
    """Raises UserError if the settings' model answers no prompts."""
    if not isinstance(s.model, settings.Multimodal):
        raise UserError(
            f"plan: --of {of} plans what multimodal transformers answer (model.kind=multimodal: codes, Transfusion, "
            f"blocks), not model.kind={s.model.kind}; of that there is --of train"
        )


def _for_decoding(s: settings.Experiment) -> settings.Experiment:
    """Settings of the transformer that `backbone.for_decoding` makes of a run's, and that keeps abstract arrays as they
    are: its layers are unrolled, its low-rank updates merged, and maps of code vectors are in its tables.
    """
    t, image = s.model.transformer, s.model.image
    t = backbone.decoder(t)
    if image.kind == "codes" and not image.code_places:
        image = replace(image, code_vectors=False)
    return replace(s, model=replace(s.model, transformer=t, image=image))


def _restored(s: settings.Experiment, devices: list) -> int:
    """Bytes of a chip of the state that `ddt-jax generate` restores, and lets go when it has made weights of it."""
    state = experiment.evaluated(experiment.build(s, devices, to_train=False).abstract)
    return sum(memory.of_arguments(state, {}).values())


def _answerer(built: experiment.Built, rows: int) -> Answerer | DiffusionAnswerer:
    """Of abstract weights."""
    s, abstract = built.settings, built.abstract
    codes = s.model.image.kind == "codes"
    make = Answerer if codes else DiffusionAnswerer
    form = ImageForm("codes", s.model.image.num_tokens) if codes else built.model.form
    sizes = {"context": s.sequences.context, "batch": rows}
    return make(built.model, abstract.params, abstract.extra, _vocabulary(s.model), form, **sizes)


def _planned(built: experiment.Built, answerer, asked: Asked, loading: int) -> tuple[Answers, dict]:
    """(compiled programs, the seconds that it took)."""
    s, rows = built.settings, answerer.batch
    codes, draws = isinstance(answerer, Answerer), asked.of == "generate"
    text = np.zeros(asked.prompt, np.int32)
    given = [documents.text_to_image(text, Image()) if draws else documents.image_to_text([], Image())] * rows
    how = given, s.evaluate.text_to_image if draws else s.evaluate.image_to_text, range(rows)
    compiler = _Compiler(built.mesh, asked.effort)
    held = {"parameters": _weights(answerer)}
    if codes:
        call = next(answerer.image_calls(*how, free=s.evaluate.free_images) if draws else answerer.text_calls(*how))
        _, _, *from_host = call.arguments
        found, width = compiler.shapes(call), from_host[0].ids_BP.shape[1]
        held["batch"] = _host_bytes(from_host)
        slots = width + found.tokens_BN.shape[1], head_dim(s.model.transformer)
        stages = [Stage("prompts", compiler.compile(call), held, "token", slots)]
    else:
        _, prefill, then = next(answerer.image_calls(*how) if draws else answerer.text_calls(*how))
        width, batch = prefill.arguments[1]["tokens"].shape[1], {"batch": _host_bytes(prefill.arguments[1])}
        stages = [Stage("prompts", compiler.compile(prefill), held | batch, makes="cache")]
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            compiler.shapes(prefill),
            stages[0].compiled.output_shardings,
        )
        call = then(state)
        found = compiler.shapes(call)[1]
        turn = "token" if not draws else "block" if s.model.image.block_size else "step"
        held |= {"cache": memory.of_tree(state), "batch": _host_bytes(call.arguments[2:])}
        stages.append(Stage(ANSWERS[asked.of], compiler.compile(call), held, turn))
    by_token = codes or not draws
    planned = Answers(
        stages,
        built.mesh,
        built.abstract.params,
        loading,
        prompt=width,
        answer=ANSWERS[asked.of],
        answers=rows,
        unit="token" if by_token else "image",
        units=found.tokens_BN.size if by_token else rows,
    )
    return planned, compiler.spent


def _weights(answerer) -> int:
    """Bytes of a chip of what answers are computed with."""
    return memory.of_tree([x for x in jax.tree.leaves(answerer.weights) if isinstance(x, jax.ShapeDtypeStruct)])


def _vocabulary(m: settings.Multimodal) -> Vocabulary:
    """One of the model's size."""
    codes = m.image.codebook_size if m.image.kind == "codes" else 0
    texts = m.transformer.vocab_size - codes - len(SPECIAL)
    if texts < 1:
        raise UserError(
            f"plan: model.transformer.vocab_size={m.transformer.vocab_size} leaves no id for text beside {codes} codes "
            f"and {len(SPECIAL)} marks; set a larger one"
        )
    return Vocabulary.extend(texts, codes)


def _host_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if isinstance(x, np.ndarray))


class _Compiler:
    """Compiles calls for a mesh. spent: seconds up to now, as `plan.compile_program`."""

    def __init__(self, mesh, effort: float):
        self._mesh, self._effort = mesh, effort
        self.spent: dict[str, float] = {}

    def compile(self, call: Call):
        compiled, spent = plan.compile_program(call.program, call.arguments, self._mesh, self._effort)
        self.spent = {name: self.spent.get(name, 0.0) + seconds for name, seconds in spent.items()}
        return compiled

    def shapes(self, call: Call):
        """What it makes, as ShapeDtypeStructs."""
        with jax.set_mesh(self._mesh):
            return call.program.eval_shape(*call.arguments)
