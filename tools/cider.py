"""CIDEr-D of captions of MS-COCO's images.

    ddt-jax generate --workdir DIR --caption val2014/*.jpg --json said.json
    python tools/cider.py said.json --references dataset_coco.json

Captions are what `generate --json` writes, found by the names of files, or COCO's format for results: a list of
{"image_id", "caption"}. References are captions_val2014.json or Karpathy's dataset_coco.json, of which the split `test`
counts. Prints JSON. Papers give the figure times 100. How rare a word is follows from the images that were described:
only figures of all images of a split, "of" as many as "images", can be held against published ones.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed


def main(argv=None) -> int:
    from ddt_jax.errors import UserError

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("said", metavar="FILE", help="captions")
    parser.add_argument("--references", required=True, metavar="FILE", help="captions by people")
    options = parser.parse_args(argv)
    try:
        print(json.dumps(score(options.said, options.references), indent=2))
    except UserError as error:
        print(f"cider: {error}", file=sys.stderr)
        return 2
    return 0


def score(said: str, references: str) -> dict:
    """cider_d, images, of, left_out: the mean, over how many images, of how many that have references; how many images
    were described that have none.

    Raises:
      UserError: a file of no known kind, an image twice, or none that has references.
    """
    from ddt_jax.errors import UserError
    from ddt_jax.evaluation import cider, prompts

    people = prompts.open_prompts(references)
    if not people or "captions" not in people[0].meta:
        raise UserError(f"{references} holds no captions of COCO; name captions_val2014.json or dataset_coco.json")
    known = {key: p.meta["captions"] for p in people for key in (p.meta["image_id"], p.meta["image"])}
    described = read_said(said)
    captions = {image: text for image, text in described.items() if image in known}
    if not captions:
        raise UserError(f"{said} describes no image of {references}, but {next(iter(described))}; name the other split")
    ours = [cider.words(text) for text in captions.values()]
    theirs = [[cider.words(text) for text in known[image]] for image in captions]
    found = {"cider_d": float(cider.cider_d(ours, theirs).mean()), "images": len(ours), "of": len(people)}
    return found | {"left_out": len(described) - len(ours)}


def read_said(path: str) -> dict:
    """COCO's number of an image, or the name of its file, → its caption."""
    from ddt_jax.errors import UserError

    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    match tree:
        case {"captions": {**files}} if files:
            pairs = [(file.rpartition("/")[2], text) for file, text in files.items()]
        case [{"image_id": int(), "caption": str()}, *_]:
            pairs = [(record.get("image_id"), record.get("caption", "")) for record in tree]
        case _:
            raise UserError(f"{path} holds no captions: neither what `generate --json` writes nor COCO's results")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UserError(f"{path} describes an image more than once")
    return found


if __name__ == "__main__":
    sys.exit(main())
