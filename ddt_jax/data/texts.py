"""Texts without images, as records for sequences."""

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, parse_spec
from ddt_jax.data.parquet import ParquetSource
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


class TextRecords:
    """A column of text in Parquet files. Picklable, like every source.

    Args:
      spec: `parquet:GLOB`, with `?caption=COLUMN` where the column has no usual name.
      records: only so many, from the first; 0 = all.
      retry_seconds: as `open_source`.

    Attributes:
      num_codes: 0. origin: what the order of formats is keyed by. cache_dir: where lengths are kept. identity: which
        texts these are, whatever they are called.

    Raises:
      UserError: the source cannot be opened, is no Parquet, or holds fewer than are asked for.
    """

    num_codes = 0

    def __init__(self, spec: str, cache_dir: str, records: int = 0, retry_seconds: float = Data.retry_seconds):
        kind, rest, options = parse_spec(files.expand(spec))
        if kind != "parquet" or options.keys() - {"caption", "cache_mb"}:
            raise UserError(f"data: texts are read from parquet:GLOB, or parquet:GLOB?caption=COLUMN, not from {spec}")
        self.source = ParquetSource(rest, **options, images=False, retry_seconds=retry_seconds)
        if not 0 <= records <= len(self.source):
            raise UserError(f"data: {spec} has {len(self.source):,} texts, not records={records:,}; 0 takes all")
        self.name = self.origin = self.source.name
        self.identity = files.identity(spec)
        self.cache_dir, self._count = cache_dir, records or len(self.source)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        """`caption`: the text; `images`: none. Raises BadRecord."""
        record = self.source[index]
        if "caption" not in record:
            raise BadRecord("no text")
        return {"caption": record["caption"], "images": []}

    def without_images(self, index):
        """The same. Raises BadRecord."""
        return self[index]
