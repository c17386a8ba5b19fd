"""What is said of a result: a correct rewrite is no good quality, and noise says nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from snpc.report.quality_text import output_lines, quality_text, quality_warning, rewrite_text
from snpc.types import GRADE_LIMITS, Difference, Grade, Quality, Verdict

LOGITS = Difference("logits", 9.0, 0.8, 0.6, 0.345, "kl", 1.9, 0.8, 0.15, (0.24, 0.47))
CACHE = Difference("present", 1.0, 0.2, 0.9, 1.0)


def quality(*differences: Difference, random_inputs: bool = False) -> Quality:
    return Quality(differences, 64, True, "64 held-out samples of calib", random_inputs)


@pytest.mark.parametrize("metric", GRADE_LIMITS)
@pytest.mark.parametrize("grade, factor", [("good", 0.9), ("fair", 1.1), ("poor", 99.0)])
def test_the_grade_is_that_of_the_worst_output(metric: str, grade: Grade, factor: float) -> None:
    bad = replace(LOGITS, metric=metric, distance=GRADE_LIMITS[metric][0] * factor)
    fine = replace(bad, distance=0.0)
    assert fine.grade == "good" and quality(fine, bad, CACHE).grade == grade == quality(bad, fine).grade


def test_a_correct_rewrite_of_poor_quality() -> None:
    poor = quality(LOGITS)
    verdict = Verdict(("same inputs and outputs",), (replace(LOGITS, relative=4e-7),), poor, "16 samples of c", 1e-4)
    assert rewrite_text(verdict).startswith("rewrite: correct (sliced equals masked to 4.0e-07 relative")
    text = quality_text(poor)
    assert text == "quality: poor: outputs no longer resemble the original's"
    assert "verified" not in text + rewrite_text(verdict)
    assert "--target" in quality_warning(poor) and "finetune" in quality_warning(poor)


def test_good_quality_is_no_reason_to_warn() -> None:
    good = quality(replace(LOGITS, distance=0.01))
    assert quality_text(good).startswith("quality: good") and not quality_warning(good)


def test_noise_says_nothing_about_accuracy() -> None:
    little, much = (quality(replace(LOGITS, drift=d), random_inputs=True) for d in (0.02, 1.5))
    for noise in (little, much):
        assert noise.grade == "unknown"
        assert "says nothing about accuracy" in quality_text(noise)
    assert not quality_warning(little) and "even on random inputs" in quality_warning(much)


def test_outputs_that_were_not_compared() -> None:
    nothing = Quality((), 0, False, "nothing", False)
    assert nothing.grade == "unknown" and "not compared" in quality_text(nothing) and not quality_warning(nothing)


def test_a_metric_without_limits_has_no_grade() -> None:
    own = quality(replace(LOGITS, metric="iou"))
    assert own.grade == "unknown" and "no limits" in quality_text(own)


def test_every_judged_output_has_a_line_and_the_others_share_one() -> None:
    lines = list(output_lines(quality(LOGITS, CACHE, replace(CACHE, output="past", relative=0.3))))
    assert len(lines) == 2
    assert "same top entry in 34.5 % (24 to 47 %)" in lines[0] and "64 held-out samples of calib" in lines[0]
    assert "KL divergence 1.9 +- 0.3 nats" in lines[0] and "perplexity" not in lines[0]
    assert "2 outputs" in lines[1] and "0.3" in lines[1] and "top entry" not in lines[1]


def test_the_same_top_entry_is_said_of_classes_only() -> None:
    (line,) = output_lines(quality(replace(LOGITS, metric="relative", agreement=1.0)))
    assert "top entry" not in line


def test_tokens_have_a_perplexity() -> None:
    (line,) = output_lines(quality(replace(LOGITS, rows=256, distance=math.log(7.4))))
    assert "(perplexity x 7.4)" in line
