"""SEED's three stages, one after another: each begins with the run before it, evaluates, and codes can be written."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import exchange, experiment, judging, settings, tokenize
from ddt_jax.data.codes import CodesSource
from ddt_jax.errors import UserError
from ddt_jax.io import weights_folder

SMALL = settings.SEED(
    num_tokens=4,
    vision=settings.ViT(patch_size=8, depth=1, width=16, heads=2, mlp_width=16),
    qformer=settings.QFormer(depth=1, width=16, heads=2, mlp_width=16, norm="post"),
    text=settings.TextTower(vocab_size=300, length=24, depth=1, width=16, heads=2, mlp_width=16),
    contrast=settings.Contrast(width=8),
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16, normalize_input="none"),
    embedding_depth=1,
    features_depth=1,
    draw=settings.FlowHead(patch_size=8, depth=1, width=16, heads=2, diffusion=settings.RectifiedFlow(solver_steps=1)),
)


def of(stage, init_from=""):
    return settings.Experiment(
        name=stage,
        model=replace(SMALL, stage=stage),
        init_from=str(init_from),
        train=settings.Train(steps=2, batch_size=8, tensorboard=False),
        evaluate=settings.Evaluate(images=40, batch_size=16, pictures=2, probe_images=32, counterfactuals=0),
    )


@pytest.mark.slow
def test_each_stage_goes_on_from_the_one_before(tmp_path):
    align, codes, draw = (tmp_path / name for name in ("align", "codes", "draw"))
    experiment.train(of("align"), str(align))
    found = judging.evaluate(str(align))["results"]
    assert found["retrieval"].keys() == {"by_embedding"} and found["retrieval_images"] == 40

    names = {"qformer": "qformer.layernorm.weight", "seed-qformer": "Qformer.bert.embeddings.LayerNorm.weight"}
    trained = experiment.weights(experiment.restore(str(align))[1])["qformer"]
    for kind, name in names.items():
        exchange.EXPORTS[kind](str(align), str(tmp_path / kind))
        assert name in weights_folder.load(tmp_path / kind)
        begun = experiment.build(replace(of("align"), model=replace(SMALL, qformer_weights=str(tmp_path / kind))))
        jax.tree.map(np.testing.assert_array_equal, begun.starting_weights()["qformer"], trained)
    started = begun.init()
    jax.tree.map(np.testing.assert_array_equal, (started.params["qformer"], started.ema["qformer"]), (trained, trained))

    with pytest.raises(UserError, match="goes on from what another run has learned; set init_from"):
        experiment.train(of("codes"), str(codes))
    experiment.train(of("codes", align), str(codes))
    assert (codes / "text" / "tokenizer.model").read_bytes() == (align / "text" / "tokenizer.model").read_bytes()
    (_, first), (_, second) = experiment.restore(str(align)), experiment.restore(str(codes))
    for name in ("vision", "qformer", "text"):
        jax.tree.map(np.testing.assert_array_equal, experiment.weights(first)[name], second.params[name])
    found_later = judging.evaluate(str(codes))
    assert found_later["results"]["retrieval"]["by_embedding"] == found["retrieval"]["by_embedding"]
    assert found_later["results"]["retrieval"].keys() == {"by_embedding", "by_code", "by_shuffled_codes"}
    assert "codebook_used" in found_later["results"] and "Retrieval among 40" in found_later["table"]
    with pytest.raises(UserError, match="model.stage='codes', which draws nothing"):
        judging.reconstruct(str(codes), [])

    experiment.train(of("draw", codes), str(draw))
    results = judging.evaluate(str(draw))["results"]
    assert results["retrieval"] == found_later["results"]["retrieval"] and results["num_tokens"] == 4
    assert (draw / "reconstructions.png").exists() and "psnr" in results
    written = {}
    for run in (codes, draw):
        tokenize.tokenize(str(run), str(tmp_path / f"{run.name}_codes"), records=20)
        written[run] = CodesSource(str(tmp_path / f"{run.name}_codes"))
    assert written[codes].plan.tokenizer == written[draw].plan.tokenizer  # a decoder changes no code
    np.testing.assert_array_equal(written[codes].code_vectors(), written[draw].code_vectors())
    others = replace(of("draw", codes), model=replace(SMALL, stage="draw", causal=False))
    with pytest.raises(UserError, match="makes other codes than this run would; set as there: model.causal"):
        experiment.train(others, str(tmp_path / "other"))
