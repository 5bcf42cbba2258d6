"""What a person sees: the bar or its lines, the final table, the figures."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image as pictures
from matplotlib.ft2font import FT2Font
from rich.console import Console

from experiments.omni import evaluation, figures, font
from experiments.omni.language import LANGUAGES
from experiments.omni.tasks import Example
from ftrain.modules.packing import Target
from ftrain.run import progress

METRICS = {"loss": 2.0, "loss/text": 1.5, "loss/image": 0.5, "tokens_per_s": 12_345.0, "mfu": 0.25, "peak_bytes": 2**28}
INK = np.ones((8, 8, 1), np.float32)


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def test_without_a_terminal_there_are_plain_lines_with_every_number():
    plain = console(terminal=False)
    with progress.Report(100, every=50, console=plain) as report:
        for step in range(1, 101):
            report.update({"step": step, **METRICS})
        report.say("[not markup]")
    first, last, said = plain.file.getvalue().splitlines()
    assert re.fullmatch(
        r"step 50/100  loss 2\.000  text 1\.500  image 0\.500  12,345 tok/s  MFU 25\.0%  peak 256 MiB  left \d:\d\d",
        first,
    )
    assert last.startswith("step 100/100")
    assert last.endswith("left 0:00")
    assert said == "[not markup]"


def test_on_a_terminal_there_is_one_bar():
    terminal = console(terminal=True)
    with progress.Report(10, first=4, console=terminal) as report:
        for step in range(5, 11):
            report.update({"step": step, **METRICS})
    shown = terminal.file.getvalue()
    assert "10/10" in shown
    assert "12,345 tok/s" in shown
    assert "\x1b[" in shown


def test_a_term_that_is_absent_is_not_shown():
    plain = console(terminal=False)
    with progress.Report(1, console=plain) as report:
        report.update({"step": 1, "loss": 1.0, "mfu": None})
    assert plain.file.getvalue().strip() == "step 1/1  loss 1.000  left 0:00"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3_599.6, "1:00:00"), (36_000, "10:00:00")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_report_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="first=5 must lie in"):
        progress.Report(4, first=5)


def test_the_final_table_says_which_goals_are_met():
    plain = console(terminal=False)
    plain.print(
        evaluation.accuracy_table(
            {"image_to_text": 0.97, "video_to_text": 0.9, "arithmetic": 0.5},
            counts={"image_to_text": 359, "video_to_text": 359, "arithmetic": 100},
            goals={"image_to_text": 0.95, "video_to_text": 0.95},
        )
    )
    rows = {line.split()[1]: line for line in plain.file.getvalue().splitlines() if "_to_" in line or "arith" in line}
    assert "97.0%" in rows["image_to_text"]
    assert ">= 95% met" in rows["image_to_text"]
    assert "missed" in rows["video_to_text"]
    assert ">=" not in rows["arithmetic"]


def answers():
    video, mel = np.stack([INK[..., :]] * 3), np.random.default_rng(0).normal(size=(56, 40))
    told = Example("video_to_text", (), (), ("三", "左"), 3, (("text", "zh: 看"), ("video", video)))
    drawn = Example("audio_to_image", (), (), (), 4, (("text", "en: draw"), ("audio", mel)))
    spoken = Example("text_to_audio", (Target("audio", mel),), (), (), 3, (("text", "zh: 说 trois"),), spoken=5)
    return {
        "video_to_text": [figures.Answer(told, "三 左"), figures.Answer(told, "三 右")],
        "audio_to_image": [figures.Answer(drawn, image_HWC=INK, recognised=4)],
        "text_to_audio": [figures.Answer(spoken, mel_FM=mel, wave_S=np.zeros(7_168), recognised=53)],
    }


def test_an_answer_is_right_if_all_its_words_are_or_the_judge_knows_what_was_made():
    right, wrong = answers()["video_to_text"]
    assert right.right
    assert not wrong.right
    (spoken,) = answers()["text_to_audio"]
    assert spoken.right
    assert spoken.told == "sounds like zh: 三"
    other = replace(spoken, recognised=33)
    assert not other.right
    assert other.told == "sounds like es: tres, truth: zh: 三"
    (drawn,) = answers()["audio_to_image"]
    assert drawn.right
    assert not figures.Answer(drawn.example, image_HWC=INK, recognised=5).right


def test_samples_are_one_picture_without_missing_letters(tmp_path, recwarn):
    figures.samples(answers(), {4: INK}, tmp_path / "samples.png", title="tiny, run 1")
    picture = pictures.imread(tmp_path / "samples.png")
    assert picture.shape[0] == picture.shape[1] * 3 // 2 + 44  # three rows of two, and the head line: 0.4 inches
    assert picture[..., :3].std() > 0.05
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]


def test_the_font_has_the_letters_of_all_words_and_is_asked_for_by_name():
    letters = {letter for language in LANGUAGES for word in language.words for letter in word}
    assert len(letters) > 50
    assert letters <= {chr(code) for code in FT2Font(str(font.find())).get_charmap()}
    with pytest.raises(ValueError, match=r"the font Noto Sans SC .* `pip install zhplot`"):
        font.find("no_such_package")


def test_samples_need_answers(tmp_path):
    with pytest.raises(ValueError, match="'video_to_text': 0"):
        figures.samples({"video_to_text": []}, {}, tmp_path / "samples.png", title="tiny, run 1")


def test_curves_leave_out_what_is_missing_or_not_finite(tmp_path):
    rows = [{"step": i, "loss": 2.0 / i, "lr": 1e-3, "tokens_per_s": 10.0 * i} for i in range(1, 30)]
    rows[5]["loss"] = float("nan")
    rows[7]["loss/image"] = 1.0
    figures.curves(rows, tmp_path / "curves.png", title="tiny, run 1")
    assert pictures.imread(tmp_path / "curves.png")[..., :3].std() > 0.02
    with pytest.raises(ValueError, match="no metrics"):
        figures.curves([], tmp_path / "curves.png", title="tiny, run 1")


def test_the_average_is_of_the_neighbours_that_a_step_has_and_lags_behind_none():
    values = np.random.default_rng(0).normal(size=60)
    found = figures.smoothed(values)
    assert found[0] == pytest.approx(values[:11].mean())
    assert found[30] == pytest.approx(values[20:41].mean())
    assert found[-1] == pytest.approx(values[-11:].mean())
    line = figures.smoothed(np.arange(60.0))
    np.testing.assert_allclose(line[10:-10], np.arange(60.0)[10:-10])


def test_figures_are_the_same_picture_each_time(tmp_path):
    for name in ("one.png", "two.png"):
        figures.samples(answers(), {4: INK}, tmp_path / name, title="tiny, run 1")
    np.testing.assert_array_equal(pictures.imread(tmp_path / "one.png"), pictures.imread(tmp_path / "two.png"))
