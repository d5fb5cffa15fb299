"""Puts the results of both halves of `make quickstart` into DIR/results.json and says where everything is.

    python tools/quickstart_results.py DIR

Reads DIR/tokenizer/results.json and DIR/transformer/results.json. What only one of them measures keeps its name;
what both do, such as `train_seconds`, is the tokenizer's, and `transformer_...` the other's.
"""

import json
import sys
from pathlib import Path

SHOWN = ("psnr", "scenes_all_correct", "t2i_all_correct", "t2i_count", "caption_all_correct")
PICTURES = ("tokenizer/reconstructions.png", "transformer/text_to_image.png", "transformer/image_to_text.png")


def together(tokenizer: dict, transformer: dict) -> dict:
    """One flat dictionary of the results of two runs."""
    renamed = {f"transformer_{name}" if name in tokenizer else name: value for name, value in transformer.items()}
    return {**tokenizer, **renamed}


def main(folder: Path) -> int:
    halves = [folder / name / "results.json" for name in ("tokenizer", "transformer")]
    missing = [str(path) for path in halves if not path.exists()]
    if missing:
        print(f"quickstart_results: {' and '.join(missing)} missing; run `ddt-jax evaluate` first", file=sys.stderr)
        return 2
    results = together(*(json.loads(path.read_text(encoding="utf-8")) for path in halves))
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n" + "  ".join(f"{name} {results[name]:.3g}" for name in SHOWN if name in results))
    print("\n".join([f"results  {path}", *(f"picture  {folder / name}" for name in PICTURES)]))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
