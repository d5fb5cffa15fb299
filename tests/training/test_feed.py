"""What a model that is told labels asks of its data, before a run begins."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.tokenizers.base import make_tokenizer
from ddt_jax.training import feed

MODEL = settings.ACDiT(depth=1, width=16, heads=2, patch_size=8, block_size=4, codec=settings.IdentityCodec())
RUN = settings.Experiment(model=MODEL, data=settings.Data(source="scenes:train"), train=settings.Train(batch_size=8))


def check(classes, source="scenes:train"):
    s = replace(RUN, model=replace(MODEL, classes=classes), data=replace(RUN.data, source=source))
    opened = feed.ImageFeed(s, feed.open_images(s, s.data.source))
    opened.check(make_tokenizer(s.model, 32, 8), lambda: None)


def test_labels_are_part_of_a_batch_only_where_a_model_is_told_them():
    for classes in (0, 4):
        s = replace(RUN, model=replace(MODEL, classes=classes))
        shapes = feed.batch_shapes(s, make_tokenizer(s.model, 32, 8))
        assert ("label" in shapes) == bool(classes)
    assert shapes["label"] == ((8,), jnp.int32)
    assert "label" not in feed.batch_shapes(settings.Experiment(), make_tokenizer(settings.DDTTokenizer(), 32, 8))


def test_clips_and_captions_are_arrays_of_a_batch():
    model = replace(MODEL, heads=1, caption_bytes=176)
    s = replace(RUN, model=model, data=replace(RUN.data, source="moving_scenes:train", frames=4))
    shapes = feed.batch_shapes(s, make_tokenizer(model, 32, 8, 4))
    assert shapes["video"] == ((8, 4, 32, 32, 3), jnp.uint8) and shapes["caption_ids"] == ((8, 176), jnp.uint8)
    batch = feed.open_images(s, s.data.source).batch_at(0)
    assert "image" not in shapes and "image" not in batch
    for name in ("video", "caption_ids", "slot"):
        assert (batch[name].shape, batch[name].dtype) == shapes[name]
    with pytest.raises(UserError, match="holds images, not clips; set data.frames=0"):
        feed.open_images(s, "scenes:train")


def test_classes_are_held_against_the_source(tmp_path):
    check(4)
    check(100)
    check(0)
    with pytest.raises(UserError, match="scenes:train has 4 classes; set model.classes=4, not 3"):
        check(3)


def test_images_without_labels_are_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    check(0, f"folder:{tmp_path}")
    with pytest.raises(UserError, match="have no labels; set model.classes=0"):
        check(4, f"folder:{tmp_path}")


def test_a_run_that_goes_on_finds_as_much_to_learn_from_as_when_it_began(tmp_path):
    """Rows are drawn from numbers of records: with other records they would come in another order, unseen."""

    class Source(list):
        name = "tars"

    def of(count):
        return feed.ImageFeed(RUN, SimpleNamespace(source=Source(range(count))))

    feed.check_records(tmp_path, of(5))  # of an earlier version, which kept nothing
    of(1000).save(tmp_path)
    feed.check_records(tmp_path, of(1000))
    with pytest.raises(UserError, match="tars had 1,000 records when the run was begun and has 950 now; .* --force"):
        feed.check_records(tmp_path, of(950))
    notes = []
    feed.check_records(tmp_path, of(950), notes.append)
    assert notes == [
        "data: tars had 1,000 records when the run was begun and has 950 now; the rest of the run sees other rows"
    ]
    feed.check_records(tmp_path, of(950))  # which is what it goes on with
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="data.json is damaged .*; remove it to go on"):
        feed.check_records(tmp_path, of(950))
