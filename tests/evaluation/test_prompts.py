"""Files as their authors publish them are read; a mistake is one line that names file, place and field.

The records below have the fields and the spelling of the published files.
"""

import json

import pytest

from ddt_jax.errors import UserError
from ddt_jax.evaluation import prompts
from ddt_jax.evaluation.prompts import Prompt, open_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a bear",
    },
]
TURNS = [
    {
        "input": "242679-input.png",
        "mask": "242679-mask1.png",
        "output": "242679-output1.png",
        "instruction": "Put a cat on the seat.",
    },
    {
        "input": "242679-output1.png",
        "mask": "242679-mask2.png",
        "output": "242679-output2.png",
        "instruction": "Have the cat wear a hat.",
    },
    {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "Remove the tree."},
]
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 42, "question": "How many dogs?", "question_id": 42001},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 42001,
            "image_id": 42,
            "question_type": "how many",
            "answer_type": "number",
            "multiple_choice_answer": "2",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(["2", "3"])],
        },
        {"question_id": 262148000, "image_id": 262148, "answers": [{"answer": "down"}]},
    ]
}
VQA_FILE, ANSWER_FILE = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def written(folder, name, content):
    """A file of text, or of JSON; a list of JSON lines when its name says so."""
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def with_images(folder, nested=True):
    for turn in TURNS:
        for key in ("input", "mask", "output"):
            place = folder / "images" / turn[key].split("-")[0] if nested else folder
            place.mkdir(parents=True, exist_ok=True)
            (place / turn[key]).touch()


def refused(path):
    """The one line that opening a file ends with, without the folder."""
    with pytest.raises(UserError) as caught:
        open_prompts(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("prompts: ")
    return message.removeprefix("prompts: ").replace(path.rpartition("/")[0] + "/", "")


def test_geneval_is_read_whole(tmp_path):
    found = open_prompts(written(tmp_path, "evaluation_metadata.jsonl", GENEVAL))
    assert found == [Prompt(r["prompt"], r["tag"], r) for r in GENEVAL]
    one = open_prompts(written(tmp_path, "one.jsonl", GENEVAL[:1]))
    assert one == found[:1]


@pytest.mark.parametrize("name", ["color_val.txt", "non_spatial.txt", "3d_spatial_train.txt", "complex_val_action.txt"])
def test_t2i_compbench_has_its_category_from_the_name(tmp_path, name):
    path = written(tmp_path, name, "a green bench and a blue bowl\r\na red car and a white sheep")
    task = name.split("_val")[0].split("_train")[0].removesuffix(".txt")
    assert [(p.text, p.task) for p in open_prompts(path)] == [
        ("a green bench and a blue bowl", task),
        ("a red car and a white sheep", task),
    ]


def test_plain_prompts_skip_blank_lines_and_remarks(tmp_path):
    path = written(tmp_path, "mine.txt", "\ufeff# mine\n\n a cat \n\t# not this\na dog with a # sign\n")
    assert open_prompts(path) == [
        Prompt("a cat", "prompt", {"line": 3}),
        Prompt("a dog with a # sign", "prompt", {"line": 5}),
    ]
    with pytest.raises(UserError, match="names no category"):
        prompts.t2i_compbench(path)


@pytest.mark.parametrize("nested", [True, False])
def test_magicbrush_turns_and_sessions_are_the_same(tmp_path, nested):
    with_images(tmp_path, nested)
    turns = open_prompts(written(tmp_path, "edit_turns.json", TURNS))
    sessions = open_prompts(written(tmp_path, "edit_sessions.json", {"242679": TURNS[:2], "7": TURNS[2:]}))
    assert turns == sessions
    folder = tmp_path / "images" / "242679" if nested else tmp_path
    assert turns[1].text == "Have the cat wear a hat." and turns[1].task == "editing"
    assert turns[1].meta == {
        "source": str(folder / "242679-output1.png"),
        "target": str(folder / "242679-output2.png"),
        "mask": str(folder / "242679-mask2.png"),
        "session": "242679",
        "turn": 2,
    }
    assert turns[2].meta["turn"] == 1


def test_vqa_finds_its_answers_by_number(tmp_path):
    questions = written(tmp_path, VQA_FILE, QUESTIONS)
    assert open_prompts(questions)[1] == Prompt(
        "How many dogs?", "vqa", {"question_id": 42001, "image_id": 42, "image": "COCO_val2014_000000000042.jpg"}
    )
    answers = written(tmp_path, ANSWER_FILE, ANNOTATIONS)
    where, how_many = open_prompts(questions)
    assert where.meta["answers"] == ["down"] and "answer_type" not in where.meta
    assert how_many.meta["answers"] == ["2", "3"] and how_many.meta["answer_type"] == "number"
    assert prompts.vqa(questions, answers) == [where, how_many]
    assert refused(answers) == f"{ANSWER_FILE} holds answers; name the file of questions, which finds them beside it"
    written(tmp_path, ANSWER_FILE, {"annotations": ANNOTATIONS["annotations"][1:]})
    assert refused(questions).startswith(f"{VQA_FILE} questions[1]: ")
    assert refused(questions).endswith("has no answers to question_id 42001")


COCO = {
    "info": {},
    "licenses": [],
    "images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 3, "file_name": "three.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A cat.\n"},
        {"image_id": 7, "id": 2, "caption": "one cat on a mat"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "split": s,
            "cocoid": n,
            "filename": f"{n}.jpg",
            "sentences": [{"raw": f"{s} {n}", "tokens": [s]}, {"raw": "a"}],
        }
        for n, s in ((1, "train"), (2, "test"), (3, "restval"), (4, "test"))
    ],
}


def test_coco_has_a_prompt_for_each_image_with_captions_and_all_of_them(tmp_path):
    (one,) = open_prompts(written(tmp_path, "captions_val2014.json", COCO))
    meta = {"image_id": 7, "image": "COCO_val2014_000000000007.jpg", "captions": ["A cat.", "one cat on a mat"]}
    assert one == Prompt("A cat.", "coco", meta)


def test_karpathys_test_split_is_read_and_the_others_by_name(tmp_path):
    path = written(tmp_path, "dataset_coco.json", KARPATHY)
    two, four = open_prompts(path)
    assert two == Prompt("test 2", "coco", {"image_id": 2, "image": "2.jpg", "captions": ["test 2", "a"]})
    assert four.meta["image_id"] == 4 and [p.text for p in prompts.karpathy(path, "restval")] == ["restval 3"]
    with pytest.raises(UserError, match="has no split val, but restval, test, train"):
        prompts.karpathy(path, "val")


def changed(record, **fields):
    """A record with other fields; None takes one away."""
    return {k: v for k, v in (record | fields).items() if v is not None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.jsonl", [GENEVAL[0], changed(GENEVAL[1], prompt=None)], "g.jsonl line 2 has no field prompt"),
        ("g.jsonl", [changed(GENEVAL[0], tag=None, tags="x")], "g.jsonl line 1 has no field tag; did you mean tags?"),
        ("g.jsonl", [GENEVAL[0], changed(GENEVAL[0], prompt=" ")], "g.jsonl line 2: field prompt is empty"),
        (
            "g.jsonl",
            [GENEVAL[2], changed(GENEVAL[1], exclude=[{"class": "clock", "count": "3"}])],
            "g.jsonl line 2 exclude[0]: field count is not a whole number but '3'",
        ),
        ("g.jsonl", [GENEVAL[0], [1]], "g.jsonl line 2 is not an object with the field prompt"),
        ("t.json", [changed(TURNS[0], instruction=None)], "t.json turn 1 has no field instruction"),
        ("t.json", {"7": [changed(TURNS[2], output=None)]}, "t.json session 7 turn 1 has no field output"),
        ("t.json", [TURNS[0] | {"input": "9-input.png"}], "t.json turn 1: there is no image images/9/9-input.png in "),
        ("q.json", changed(QUESTIONS, data_subtype=None), "q.json has no field data_subtype"),
        ("q.json", changed(QUESTIONS, questions=[{"question": "?"}]), "q.json questions[0] has no field question_id"),
        ("c.json", changed(COCO, images=[{"id": 7}]), "c.json images[0] has no field file_name"),
        ("c.json", changed(COCO, annotations=[{"image_id": 7}]), "c.json annotations[0] has no field caption"),
        ("k.json", {"images": [{"sentences": [], "split": "test"}]}, "k.json images[0]: field sentences is empty"),
        ("k.json", {"images": [{"sentences": [], "split": 3}]}, "k.json images[0]: field split is not a text but '3'"),
        ("x.json", {"a": 1}, "x.json is JSON of no known kind; wanted are GenEval's"),
        ("x.json", [], "x.json is JSON of no known kind"),
        ("x.json", '{\n"a": [1,\n', "x.json is not whole JSON (Expecting value: line 3"),
        ("x.txt", "# nothing\n\n", "x.txt holds no prompts"),
        ("x.txt", "", "x.txt holds no prompts"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, name, content, message):
    with_images(tmp_path)
    assert refused(written(tmp_path, name, content)).startswith(message)


def test_a_broken_line_of_geneval_is_named(tmp_path):
    good = json.dumps(GENEVAL[0])
    message = refused(written(tmp_path, "g.json", f"{good}\n\n{good[:-4]}\n"))
    assert message.startswith("g.json line 3 is not JSON (Unterminated string")


def test_a_text_may_hold_any_kind_of_line_separator(tmp_path):
    record = GENEVAL[0] | {"prompt": "one\u2028line"}
    path = written(tmp_path, "g.json", "\n".join(json.dumps(r, ensure_ascii=False) for r in (record, record)))
    assert [p.text for p in open_prompts(path)] == ["one\u2028line"] * 2


def test_what_is_no_file_is_said(tmp_path):
    written(tmp_path, "prompts.txt", "a cat")
    assert refused(str(tmp_path / "prompt.txt")) == "there is no file prompt.txt; did you mean prompts.txt?"
    assert refused(str(tmp_path / "none" / "x.txt")) == "there is no file x.txt"
    assert refused(str(tmp_path)).endswith("is a folder; name a file in it")
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    assert refused(str(tmp_path / "x.txt")) == "x.txt is not text in UTF-8"
