"""Codes of scenes without a tokenizer: the codes are random, the captions are those of the scenes."""

import numpy as np
import pytest

from ddt_jax.data import scenes
from ddt_jax.data.codes import CodesSource, CodesWriter, Plan
from ddt_jax.tokenizers.text import train_sentencepiece

TOKENS, CODES = 16, 512


def caption(index):
    scene = scenes.sample_scene("train", index)
    return scenes.caption_of(scene, scenes.Stream(index))


@pytest.fixture(scope="session")
def text():
    return train_sentencepiece([caption(i) for i in range(2000)], 512)


@pytest.fixture(scope="session")
def write_codes():
    """(folder, records, shard_records) → the folder's source; a record lacks only its codes."""

    def write(folder, records, shard_records=100):
        plan = Plan("f" * 64, TOKENS, CODES, 32, "coarse_to_fine", False, "scenes:train", len(records), shard_records)
        writer = CodesWriter(folder, plan)
        for shard in range(plan.shards):
            chosen = plan.shard_range(shard)
            codes = (np.random.default_rng(i).integers(0, CODES, (records[i].get("images", 1), TOKENS)) for i in chosen)
            kept = ({k: v for k, v in records[i].items() if k != "images"} | {"index": i} for i in chosen)
            writer.write(shard, (record | {"codes": c} for record, c in zip(kept, codes, strict=True)))
        writer.complete()
        return CodesSource(str(folder))

    return write


@pytest.fixture(scope="session")
def scenes_codes(write_codes, tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes"), [{"caption": caption(i)} for i in range(6000)], 3000)


@pytest.fixture(scope="session")
def own_codes(write_codes, tmp_path_factory):
    """Records with documents of their own, and some that lack a caption."""
    records = []
    for i in range(60):
        turns = [["USER", [0, "make it red"]], ["ASSISTANT", [1]], ["USER", ["how many?"]], ["ASSISTANT", ["two"]]]
        own = ({"turns": turns}, {"parts": ["first", 1, "then", 0, "end"]}, {})[i % 3]
        records.append({"images": 2, **own, **({"caption": caption(i)} if i % 4 else {})})
    return write_codes(tmp_path_factory.mktemp("own"), records)
