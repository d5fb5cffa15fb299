"""Tables hold what was found, and nothing of what was not."""

from ddt_jax.evaluation import tables

RESULTS = {
    "step": 1000,
    "n": 1024,
    "num_tokens": 16,
    "codebook_size": 512,
    "bits_per_image": 144.0,
    "psnr": 28.25,
    "psnr_by_tokens": {"2": 17.0, "16": 28.25},
    "psnr_shuffled_codes": 12.0,
    "psnr_wrong_image_codes": 10.0,
    "codebook_used": 500,
    "codebook_perplexity": 480.0,
    "scenes_all_correct": 0.96,
    "scenes_all_correct_interval": [0.95, 0.97],
}


def test_evaluation_says_what_was_found_and_what_was_left_out():
    more = {
        "lpips": 0.12345,
        "rfid": 3.25,
        "probe_linear_by_tokens": {"2": 0.25, "16": 0.5},
        "probe_knn_by_tokens": {"2": 0.125, "16": 0.4},
        "probe_linear_interval": [0.4, 0.6],
        "probe_linear": 0.5,
        "probe_images": 4096,
        "probe_test_images": 1000,
        "entropy_by_stride": {"1": 5.5, "2": 5.75},
        "entropy_uniform": 6.238,
        "counterfactual_nearer_b": {"first": 0.9},
        "left_out": ["a reason"],
    }
    table = tables.evaluation(RESULTS | more)
    for line in (
        "| 2 | 17.00 | – |",
        "| LPIPS | 0.1235 |",
        "| rFID | 3.250 |",
        "| scenes all correct | 96.0% (95.0% to 97.0%) |",
        "| 16 | 50.0% | 40.0% |",
        "| own | 5.500 |",
        "| stride 2 | 5.750 |",
        "| first third | 90.0% |",
        "- a reason",
    ):
        assert line in table.splitlines(), line
    assert "Class of 1,000 images" in table and "learned on 4,096 others" in table
    bare = tables.evaluation(RESULTS)
    assert not [word for word in ("LPIPS", "rFID", "Class", "order", "third", "Left out", "None") if word in bare]


def test_side_by_side_has_the_columns_that_any_run_has():
    other = {k: v for k, v in RESULTS.items() if k != "scenes_all_correct"} | {"rfid": 3.25, "step": 20_000}
    lines = tables.side_by_side({"a": RESULTS, "b": other}).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2], lines[3])]
    by_run = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    assert by_run[0]["rFID"] == "–" and by_run[1]["rFID"] == "3.250" and "LPIPS" not in cells[0]
    assert by_run[0]["scenes right"] == "96.0%" and by_run[1]["scenes right"] == "–"
    assert by_run[1]["step"] == "20,000" and by_run[0]["bits"] == "144" and by_run[0]["run"] == "a"
