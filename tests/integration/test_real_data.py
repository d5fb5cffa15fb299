"""The same verbs on real files: CIFAR-10 from Parquet for training, from a WebDataset tar for evaluation."""

import json
from pathlib import Path

import pytest

from ddt_jax import cli

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.num_tokens": 8,
    "model.width": 32,
    "model.heads": 2,
    "model.decoder_depth": 1,
    "model.quantizer.codebook_size": 64,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every": 2,
    "evaluate.images": 32,
    "evaluate.batch_size": 16,
}


@pytest.mark.slow
def test_cifar10_trains_from_parquet_and_is_evaluated_from_parquet_and_tar(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DDT_JAX_DATA", str(data_dir))
    changes = [f"--config.{name}={value}" for name, value in SMALL.items()]
    config = str(ROOT / "configs" / "ddt_cifar10.py")
    run = ["--workdir", str(tmp_path / "run")]
    assert cli.main(["train", "--config", config, *run, *changes]) == 0
    assert cli.main(["evaluate", *run, "--json", str(tmp_path / "parquet.json")]) == 0
    tar = "--config.data.eval_source=webdataset:${DDT_JAX_DATA}/cifar10/test-*.tar"
    cache = f"--config.data.cache_dir={tmp_path}"
    assert cli.main(["evaluate", *run, tar, cache, "--json", str(tmp_path / "tar.json")]) == 0
    results = [json.loads((tmp_path / name).read_text()) for name in ("parquet.json", "tar.json")]
    assert all(r["n"] == 32 and 5 < r["psnr"] < 40 for r in results)
    assert results[0]["psnr"] != results[1]["psnr"]
