"""The arms of `soak.py schedules`, and how they are put in order."""

import itertools

# Variants of configs/schedule_ablation.py and what the published ablation gives for them, dB at 512 tokens on ImageNet
# (Selftok, table of time samplers and token schedules); the weighted ones are in no paper.
ARMS = {
    "uniform_custom": 21.86,
    "uniform_uniform": 21.10,
    "uniform_logit_normal": 20.78,
    "logit_normal_custom": 20.98,
    "logit_normal_uniform": 19.89,
    "logit_normal_logit_normal": 20.08,
    "uniform_custom_weighted": None,
    "uniform_uniform_weighted": None,
}


def ordering(psnr: dict[str, list[float]]) -> dict:
    """Arms from best to worst by mean PSNR, each with its spread over seeds, beside the published ones."""
    mean = {arm: sum(values) / len(values) for arm, values in psnr.items()}
    best = sorted(mean, key=mean.get, reverse=True)
    published = [arm for arm in ARMS if ARMS[arm] is not None]
    pairs = list(itertools.combinations(published, 2))
    agree = sum((mean[a] > mean[b]) == (ARMS[a] > ARMS[b]) for a, b in pairs)
    rows = [
        {"arm": arm, "psnr": round(mean[arm], 3), "from": min(psnr[arm]), "to": max(psnr[arm]), "published": ARMS[arm]}
        for arm in best
    ]
    return {"ordering": rows, "pairs_in_published_order": agree, "pairs": len(pairs)}
