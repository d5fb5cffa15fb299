"""What Stable Diffusion draws from, made of SEED's codes: a safetensors file that a pipeline of diffusers takes.

    embeddings   float32 [N, 77, 768], CLIP's rows of a caption, for Stable Diffusion 1; or [N, 1, 1024], the vector of
                 an image, for Stable Diffusion 2.1 unCLIP
    codes        int32 [N, K], which they are made of

Legend: N images, B of them at once, K codes of one, M features, F their width.
"""

from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import settings
from ddt_jax.data.codes import CodesSource
from ddt_jax.errors import UserError
from ddt_jax.io import json_object, safetensors_file
from ddt_jax.tokenizers.seed import SEED

_DRAWS = {"text": ((77, 768), "Stable Diffusion 1"), "image": ((1, 1024), "Stable Diffusion 2.1 unCLIP")}
_BATCH = 64
_MOST_BYTES = 4e9  # of embeddings in one file, which lie in memory


def check(model: Any, workdir: str) -> str:
    """What draws from the features of a run's model.

    Raises:
      UserError: if it has none, or none that anything draws from.
    """
    if not isinstance(model, SEED):
        raise UserError(f"export: {workdir} holds no SEED of model.stage 'codes' or 'draw', which has embeddings")
    c, shape = model.config, model.target.shape
    if c.features != "clip":
        raise UserError(
            f"export: {workdir} has model.features={c.features!r}, of its own vision transformer, from which no Stable "
            "Diffusion draws; train model.stage='codes' with model.features='clip'"
        )
    wanted, draws = _DRAWS[c.clip.kind]
    if shape != wanted:
        raise UserError(
            f"export: the features of {workdir} are {shape[0]} x {shape[1]}; {draws} draws from "
            f"{wanted[0]} x {wanted[1]}: model.clip of its own CLIP"
        )
    return draws


def read_codes(path: str, tokenizer: str, c: settings.SEED) -> np.ndarray:
    """int32 [N, K] from a folder that `ddt-jax tokenize` wrote, or a report of `ddt-jax generate --json`.

    Args:
      tokenizer: fingerprint of the run's.

    Raises:
      UserError: if there are none, or another tokenizer made them.
    """
    if epath.Path(path).is_dir():
        source = CodesSource(path)
        found, rows = source.plan.tokenizer, [source[i]["codes"] for i in range(len(source))]
    else:
        found, rows = _of_report(path, c)
    if found != tokenizer:
        raise UserError(
            f"--codes: tokenizer {found[:8]}… made those in {path}, the run's is {tokenizer[:8]}…; name its codes"
        )
    if not rows:
        raise UserError(f"--codes: {path} holds no image")
    return np.concatenate(rows)


def _of_report(path: str, c: settings.SEED) -> tuple[str, list[np.ndarray]]:
    try:
        report = json_object.loads(epath.Path(path).read_text())
        found, rows = report["tokenizer"], [np.asarray(codes) for codes in report["codes"] if codes is not None]
        if not isinstance(found, str) or any(
            row.shape != (c.num_tokens,)
            or row.dtype.kind != "i"
            or row.min() < 0
            or row.max() >= c.quantizer.codebook_size
            for row in rows
        ):
            raise ValueError(f"not {c.num_tokens} codes below {c.quantizer.codebook_size}")
    except OSError as error:
        raise UserError(f"--codes: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--codes: {path} is neither a folder of `ddt-jax tokenize` nor a report of `ddt-jax generate --json` on "
            f"codes ({type(error).__name__}: {error})"
        ) from error
    return found, [row[None].astype(np.int32) for row in rows]


def embed(model: SEED, params, extra, codes_NK: np.ndarray) -> np.ndarray:
    """float32 [N, M, F].

    Raises:
      UserError: if they are more than one file takes.
    """
    n, (m, f) = len(codes_NK), model.target.shape
    if (size := 4 * n * m * f) > _MOST_BYTES:
        most = int(_MOST_BYTES / (4 * m * f))
        raise UserError(f"--codes: embeddings of {n:,} images are {size / 1e9:.1f} GB; name codes of at most {most:,}")
    run = jax.jit(model.features)
    made_NMF = np.empty((n, m, f), np.float32)
    for at in range(0, n, _BATCH):
        some_BK = codes_NK[at : at + _BATCH]
        filled_BK = np.concatenate([some_BK, np.repeat(some_BK[:1], min(n, _BATCH) - len(some_BK), axis=0)])
        made_NMF[at : at + _BATCH] = run(params, extra, filled_BK)[: len(some_BK)]
    return made_NMF


def save(path: str, embeddings_NMF: np.ndarray, codes_NK: np.ndarray, about: dict[str, str]) -> None:
    """See the module's docstring. about: goes into the header."""
    safetensors_file.save(path, {"embeddings": embeddings_NMF, "codes": codes_NK}, about)
