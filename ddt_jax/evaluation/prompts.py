"""Files of prompts that others evaluate with, read from the user's disk into one small record each.

`open_prompts` tells by the content which kind a file is. Fields that are named here must be there; more may be, and
`meta` keeps them. Nothing is downloaded, and no image is opened.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ddt_jax.data import fields, files
from ddt_jax.data.base import did_you_mean
from ddt_jax.errors import UserError

T2I_COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")
_COMPBENCH_NAME = re.compile(rf"({'|'.join(T2I_COMPBENCH)})(_(train|val)\w*)?\.txt")
KINDS = (
    "GenEval's JSON lines, MagicBrush's turns or sessions, questions of VQA v2, captions of COCO, or one prompt a line"
)


@dataclass(frozen=True)
class Prompt:
    """One thing to ask of a model.

    Attributes:
      text: the prompt, the instruction or the question.
      task: what figures are grouped by.
      meta: what judging the answer needs.
    """

    text: str
    task: str
    meta: dict[str, Any] = field(default_factory=dict)


def open_prompts(path: str) -> list[Prompt]:
    """Reads any of the files below, told by its content; of plain text, by the name of the file too.

    Raises:
      UserError: no such file, none of the kinds, or a record that lacks a field.
    """
    path = files.expand(str(path))
    text = _text(path)
    if not text.lstrip().startswith(("{", "[")):
        name = path.rpartition("/")[2]
        return t2i_compbench(path) if _COMPBENCH_NAME.fullmatch(name) else plain(path)
    try:
        tree = json.loads(text)
    except ValueError as error:
        if _is_object(text.lstrip().partition("\n")[0]):
            return geneval(path)
        raise _damaged(path, error) from None
    match tree:
        case {"prompt": _} | {"tag": _}:  # a single line
            return geneval(path)
        case {"questions": _}:
            return vqa(path)
        case {"images": _, "annotations": _}:
            return coco(path)
        case {"images": [{"sentences": _}, *_]}:
            return karpathy(path)
        case {"annotations": _}:
            raise UserError(f"prompts: {path} holds answers; name the file of questions, which finds them beside it")
        case [{"instruction": _}, *_] | [{"input": _}, *_]:
            return magicbrush(path)
        case dict() if tree and all(isinstance(turns, list) for turns in tree.values()):
            return magicbrush(path)
    raise UserError(f"prompts: {path} is JSON of no known kind; wanted are {KINDS}")


def plain(path: str, task: str = "prompt") -> list[Prompt]:
    """A prompt on each line. Blank lines and lines that begin with # are left out. `meta` has the line."""
    stripped = ((n, line.strip()) for n, line in enumerate(_lines(path), 1))
    return _some(path, [Prompt(line, task, {"line": n}) for n, line in stripped if line and line[0] != "#"])


def t2i_compbench(path: str) -> list[Prompt]:
    """T2I-CompBench (arXiv 2307.06350): CATEGORY.txt, CATEGORY_train.txt or CATEGORY_val.txt, a prompt on each line.

    The task is the category, which only the name of the file tells.

    Raises:
      UserError: a name of no category.
    """
    found = _COMPBENCH_NAME.fullmatch(path.rpartition("/")[2])
    if not found:
        raise UserError(f"prompts: {path} names no category of T2I-CompBench, as color_val.txt does")
    return plain(path, found[1])


def geneval(path: str) -> list[Prompt]:
    """GenEval (arXiv 2310.11513): evaluation_metadata.jsonl, an object on each line.

    Fields: `prompt`; `tag`, which becomes the task (single_object, two_object, counting, colors, position, color_attr);
    `include`, a list of {"class", "count"} and, where asked for, "color" or "position" [relation, number of the other];
    `exclude`, a list of {"class", "count"}, only with counting. `meta` is the whole object.
    """
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"prompts: {where} is not JSON ({error})") from None
        prompt, tag = _field(record, "prompt", str, where), _field(record, "tag", str, where)
        for name in ("include", "exclude") if "exclude" in record else ("include",):
            for i, wanted in enumerate(_field(record, name, list, where)):
                _field(wanted, "class", str, f"{where} {name}[{i}]")
                _field(wanted, "count", int, f"{where} {name}[{i}]")
        prompts.append(Prompt(prompt, tag, record))
    return _some(path, prompts)


def magicbrush(path: str) -> list[Prompt]:
    """MagicBrush (arXiv 2306.10012): edit_turns.json, a list of turns, or edit_sessions.json, {session: list of turns}.

    Fields of a turn: `input`, `output`, names of images; `instruction`; mostly `mask`. Images lie in
    images/SESSION/NAME beside the file, where SESSION is what stands before the first "-" of a name, or beside the
    file itself. The task is "editing". `meta` has `source`, `target` and perhaps `mask`, paths; `session`; `turn`, its
    number in the session, from 1.

    Raises:
      UserError: also where an image is not there.
    """
    tree = _json(path)
    prompts, seen = [], Counter()
    for where, session, record in _turns(path, tree):
        names = {"source": _field(record, "input", str, where), "target": _field(record, "output", str, where)}
        if "mask" in record:
            names["mask"] = _field(record, "mask", str, where)
        session = session or names["source"].partition("-")[0]
        seen[session] += 1
        images = {key: _image(path, session, name, where) for key, name in names.items()}
        meta = {**images, "session": session, "turn": seen[session]}
        prompts.append(Prompt(_field(record, "instruction", str, where), "editing", meta))
    return _some(path, prompts)


def vqa(questions: str, annotations: str | None = None) -> list[Prompt]:
    """VQA v2 (arXiv 1612.00837): v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json.

    Fields: `data_subtype` (val2014), `questions`, a list of {"question", "question_id", "image_id"}; `annotations`, a
    list of {"question_id", "answers"} with answers a list of {"answer"}, mostly with `multiple_choice_answer`,
    `answer_type` and `question_type`. The task is "vqa". `meta` has `question_id`, `image_id`, `image` (COCO's name of
    the file), and with annotations `answers`, a list of str, and the other three.

    Args:
      questions: path.
      annotations: path; by default the file of that name beside the questions, if there is one.

    Raises:
      UserError: also where a question has no answers although there are annotations.
    """
    answers = {}
    if annotations is None:
        folder, slash, name = questions.rpartition("/")
        beside = folder + slash + name.replace("OpenEnded_", "").replace("questions", "annotations")
        annotations = beside if beside != questions and files.path_of(beside).exists() else None
    if annotations is not None:
        for i, record in enumerate(_field(_json(annotations), "annotations", list, annotations)):
            where = f"{annotations} annotations[{i}]"
            given = _field(record, "answers", list, where)
            said = [_field(answer, "answer", str, f"{where} answers[{j}]") for j, answer in enumerate(given)]
            also = {k: record[k] for k in ("multiple_choice_answer", "answer_type", "question_type") if k in record}
            answers[_field(record, "question_id", int, where)] = {"answers": said, **also}
    tree, prompts = _json(questions), []
    subset = _field(tree, "data_subtype", str, questions)
    for i, record in enumerate(_field(tree, "questions", list, questions)):
        where = f"{questions} questions[{i}]"
        number, image = _field(record, "question_id", int, where), _field(record, "image_id", int, where)
        if annotations is not None and number not in answers:
            raise UserError(f"prompts: {where}: {annotations} has no answers to question_id {number}")
        meta = {"question_id": number, "image_id": image, "image": f"COCO_{subset}_{image:012d}.jpg"}
        prompts.append(Prompt(_field(record, "question", str, where), "vqa", meta | answers.get(number, {})))
    return _some(questions, prompts)


def coco(path: str) -> list[Prompt]:
    """MS-COCO's captions (arXiv 1504.00325): captions_val2014.json and its like.

    Fields: `images`, a list of {"id", "file_name"}; `annotations`, a list of {"image_id", "caption"}. A prompt for each
    image that has captions: the first of them. The task is "coco". `meta` has `image_id`, `image`, the name of its
    file, and `captions`, all of them.
    """
    tree, captions = _json(path), {}
    for i, record in enumerate(_field(tree, "annotations", list, path)):
        where = f"{path} annotations[{i}]"
        captions.setdefault(_field(record, "image_id", int, where), []).append(_field(record, "caption", str, where))
    prompts = []
    for i, record in enumerate(_field(tree, "images", list, path)):
        where = f"{path} images[{i}]"
        number, name = _field(record, "id", int, where), _field(record, "file_name", str, where)
        if number in captions:
            prompts.append(_of_image(number, name, captions[number]))
    return _some(path, prompts)


def karpathy(path: str, split: str = "test") -> list[Prompt]:
    """Karpathy's splits of MS-COCO (arXiv 1412.2306): dataset_coco.json, of which captions are mostly judged on `test`.

    Fields: `images`, a list of {"split", "cocoid", "filename", "sentences"} with sentences a list of {"raw"}. Prompts
    are as of `coco`.

    Raises:
      UserError: also for a split that no image is in.
    """
    prompts, splits = [], set()
    for i, record in enumerate(_field(_json(path), "images", list, path)):
        where = f"{path} images[{i}]"
        splits.add(_field(record, "split", str, where))
        if record["split"] == split:
            if not (said := _field(record, "sentences", list, where)):
                raise UserError(f"prompts: {where}: field sentences is empty")
            captions = [_field(one, "raw", str, f"{where} sentences[{j}]") for j, one in enumerate(said)]
            number, name = _field(record, "cocoid", int, where), _field(record, "filename", str, where)
            prompts.append(_of_image(number, name, captions))
    if not prompts:
        raise UserError(f"prompts: {path} has no split {split}, but {', '.join(sorted(splits))}")
    return prompts


def _of_image(number: int, name: str, captions: list[str]) -> Prompt:
    captions = [caption.strip() for caption in captions]
    return Prompt(captions[0], "coco", {"image_id": number, "image": name, "captions": captions})


def _turns(path: str, tree: Any) -> Iterator[tuple[str, str, Any]]:
    """(where, session or "", turn) of all turns."""
    sessions = {"": tree} if isinstance(tree, list) else tree
    if not isinstance(sessions, dict):
        raise UserError(f"prompts: {path} is neither a list of turns nor sessions of them")
    for session, turns in sessions.items():
        if not isinstance(turns, list):
            raise UserError(f"prompts: {path} session {session} is not a list of turns")
        for i, record in enumerate(turns):
            yield f"{path} {f'session {session} ' if session else ''}turn {i + 1}", session, record


def _image(path: str, session: str, name: str, where: str) -> str:
    folder = files.path_of(path).parent
    for image in (folder / "images" / session / name, folder / name):
        if image.exists():
            return str(image)
    raise UserError(f"prompts: {where}: there is no image images/{session}/{name} in {folder}")


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    """`fields.field` that says something."""
    value = fields.field(record, name, kind, f"prompts: {where}")
    if kind is str and not value.strip():
        raise UserError(f"prompts: {where}: field {name} is empty")
    return value


def _some(path: str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompts; wanted are {KINDS}")
    return prompts


def _text(path: str) -> str:
    where = files.path_of(path)
    try:
        if not where.exists():
            folder = where.parent
            near = did_you_mean(where.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
            raise UserError(f"prompts: there is no file {path}{near}")
        if where.is_dir():
            raise UserError(f"prompts: {path} is a folder; name a file in it")
        return where.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"prompts: {path} is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"prompts: cannot read {path}: {error.strerror or error}") from None
    except ImportError as error:
        raise files.remote_error(path, error) from None


def _lines(path: str) -> list[str]:
    return _text(path).split("\n")  # not splitlines: JSON may hold U+2028 and the like inside a text


def _json(path: str) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: ValueError) -> UserError:
    return UserError(f"prompts: {path} is not whole JSON ({error})")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
