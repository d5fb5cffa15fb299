"""The file that Stable Diffusion draws from: what it holds, which codes it is made of, and what is refused."""

import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.data.codes import CodesWriter, Plan
from ddt_jax.errors import UserError
from ddt_jax.interop import stable_diffusion
from ddt_jax.io import safetensors_file
from ddt_jax.nn.params import split
from ddt_jax.tokenizers.base import make_tokenizer

UNCLIP = settings.SEED(
    stage="draw",
    num_tokens=3,
    vision=settings.ViT(patch_size=4, depth=1, width=4, heads=1, mlp_width=4),
    qformer=settings.QFormer(depth=1, width=4, heads=1, mlp_width=4),
    quantizer=settings.Quantizer(code_dim=2, codebook_size=16, normalize_input="none"),
    embedding_depth=1,
    features="clip",
    clip=settings.CLIPImage(),
    features_depth=1,
    draw=settings.FlowHead(depth=1, width=4, heads=1),
)
CODES = np.random.default_rng(0).integers(0, 16, (5, 3), np.int32)
CODES[4] = CODES[0]  # in a batch that is filled up


def model_of(**changed):
    return make_tokenizer(replace(UNCLIP, **changed), 8, 4)


@pytest.fixture(scope="module")
def made():
    """Embeddings of random parameters, made two at a time."""
    model = model_of()
    boxed, extra = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), split(boxed)[0])
    extra = {"codebook": model.codes.init(jax.random.key(1))[1]["codebook"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_diffusion, "_BATCH", 2)
        return stable_diffusion.embed(model, params, extra, CODES)


def test_each_image_has_an_embedding_of_its_codes(made):
    assert made.shape == (5, 1, 1024) and made.dtype == np.float32
    np.testing.assert_allclose(made[4], made[0], atol=1e-5)
    assert np.abs(made[0] - made[1]).max() > 1e-2


def test_a_file_comes_back(made, tmp_path):
    stable_diffusion.save(str(tmp_path / "e.safetensors"), made, CODES, {"tokenizer": "t", "for": "x"})
    found = safetensors_file.load(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(found["embeddings"], made)
    np.testing.assert_array_equal(found["codes"], CODES)


def test_what_nothing_draws_from_is_refused():
    assert stable_diffusion.check(model_of(), "run") == "Stable Diffusion 2.1 unCLIP"
    assert stable_diffusion.check(model_of(clip=settings.CLIPText()), "run") == "Stable Diffusion 1"
    with pytest.raises(UserError, match="run has model.features='pooled', of its own vision transformer"):
        stable_diffusion.check(model_of(features="pooled"), "run")
    with pytest.raises(UserError, match="of run are 1 x 512; Stable Diffusion 2.1 unCLIP draws from 1 x 1024"):
        stable_diffusion.check(model_of(clip=settings.CLIPImage(width=512)), "run")
    with pytest.raises(UserError, match="of run are 12 x 768; Stable Diffusion 1 draws from 77 x 768"):
        stable_diffusion.check(model_of(clip=settings.CLIPText(length=12)), "run")
    with pytest.raises(UserError, match="run holds no SEED of model.stage 'codes' or 'draw'"):
        stable_diffusion.check(model_of(stage="align"), "run")
    many = np.broadcast_to(CODES[:1], (2_000_000, 3))
    with pytest.raises(UserError, match=r"of 2,000,000 images are 8.2 GB; name codes of at most 976,562"):
        stable_diffusion.embed(model_of(), {}, {}, many)


def test_codes_are_read_from_a_folder_or_a_report_and_from_no_other_tokenizer(tmp_path):
    plan = Plan("t" * 64, 3, 16, 8, "none", False, "scenes:train", 3, 8)
    writer = CodesWriter(tmp_path / "codes", plan)
    writer.write(0, [{"codes": CODES[:2], "index": 0}, {"codes": CODES[2:3], "index": 1}])
    writer.complete()
    read = stable_diffusion.read_codes
    np.testing.assert_array_equal(read(str(tmp_path / "codes"), "t" * 64, UNCLIP), CODES[:3])
    with pytest.raises(UserError, match="tokenizer tttttttt… made those in .*, the run's is uuuuuuuu…"):
        read(str(tmp_path / "codes"), "u" * 64, UNCLIP)
    assert asdict(plan)["num_tokens"] == UNCLIP.num_tokens

    path = tmp_path / "drawn.json"
    path.write_text(json.dumps({"tokenizer": "t", "codes": [CODES[0].tolist(), None, CODES[1].tolist()]}))
    np.testing.assert_array_equal(read(str(path), "t", UNCLIP), CODES[:2])  # an answer that is no image is left out
    path.write_text(json.dumps({"tokenizer": "t", "codes": [None]}))
    with pytest.raises(UserError, match="holds no image"):
        read(str(path), "t", UNCLIP)
    for wrong in ([[1, 2]], [[1, 2, 16]], [[1, 2, -1]], [[1, 2, 0.5]], [[1, [2], 3]], [[1, 2, 10**30]], "abc", 3):
        path.write_text(json.dumps({"tokenizer": "t", "codes": wrong}))
        with pytest.raises(UserError, match="is neither a folder of `ddt-jax tokenize` nor a report of") as error:
            read(str(path), "t", UNCLIP)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        read(str(tmp_path / "nowhere.json"), "t", UNCLIP)
