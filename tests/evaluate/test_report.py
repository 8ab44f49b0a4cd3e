"""The report: pictures that show the summary's numbers, and a page that needs nothing else and trusts no answer."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from helpers.eval_cases import EVIL, SWEPT, headers_of, plan_of, records_of

from hf_longctx import ConfigError
from hf_longctx.evaluate.figures import by_position, costs, figures, heat_maps, tradeoff
from hf_longctx.evaluate.page import write_report
from hf_longctx.evaluate.summary import summarize
from hf_longctx.io import plots


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *one) for one in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, summary, the page's text) of a report."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "depth-of-an-earlier-run.png").write_bytes(b"old")
    plan = plan_of(SWEPT)
    records = records_of(plan)
    summary = summarize(plan, records)
    write_report(folder, summary, headers_of(plan, processes=2), records)
    return folder, summary, (folder / "index.html").read_text("utf-8")


def test_the_pictures_are_there_and_in_the_page(written):
    folder, _, text = written
    names = {"depth-needle", "depth-key-value-questions-2", "accuracy-kv", "costs", "perplexity-position"}
    assert {path.stem for path in folder.glob("*.png")} == names, "common_words has no depth, and nothing old is left"
    inline = [base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(inline) == sorted(path.read_bytes() for path in folder.glob("*.png"))
    assert all(data.startswith(b"\x89PNG") for data in inline)


def test_the_page_needs_nothing_else_and_runs_nothing(written):
    page = Page(written[2])
    assert not {"script", "link", "iframe", "object", "svg"} & set(page.tags)
    assert all(value.startswith("data:image/png") for _, name, value in page.attributes if name in ("src", "href"))
    assert {name for _, name, _ in page.attributes} == {
        "lang",
        "charset",
        "name",
        "content",
        "class",
        "src",
        "alt",
        "width",
    }
    assert "url(" not in written[2] and "@import" not in written[2]
    said = "".join(page.text)
    assert said.count(EVIL) > 10, "answers, the model's name and notes are shown as they are"
    assert "an & answer" in said


def test_the_tables_have_the_figures(written):
    _, summary, text = written
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in text.split("<tr>")]
    cell = summary.by_task[0].cells["patched"]
    (found,) = (row for row in rows if row[:3] == ["needle", "512", "patched"])
    lost = cell.difference
    assert found[3:7] == [
        "6",
        f"{cell.accuracy:.3f}",
        f"{lost.difference:+.3f} worse",
        f"{lost.low:+.3f} to {lost.high:+.3f}",
    ]
    nll = cell.nll_difference
    assert found[7:11] == ["0.000", "0.100", "+0.050", f"{nll.low:+.3f} to {nll.high:+.3f}"]
    assert found[11:] == ["80.0%", "0.1", "0.26", "50%", "256", "3"]
    assert ["dense", "1.404"] in rows, "exp(20 / 59) of the two windows"
    at = rows.index(["position", "tokens", *SWEPT])
    assert rows[at + 1] == ["0-256", "510", *["7.105"] * 5], "exp(500 / 255), of both windows"
    assert rows[at + 2] == ["256-512", "50", "7.389", "9.025", "11.02", "13.46", "16.44"], "exp(100 / 50), of one"
    assert sum(row[:1] == ["needle"] and len(row) == 3 + len(SWEPT) for row in rows) == 9, "by length and depth"
    assert "Several processes ran at once" in text


def test_a_heat_map_shows_the_accuracies(written):
    _, summary, _ = written
    rows = [row for row in summary.by_depth if row.task == "needle"]
    figure = heat_maps("needle", rows, summary.variants)
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == list(SWEPT)
    for axes in maps:
        want = [[row.cells[axes.get_title()].accuracy for row in rows if row.depth == depth] for depth in (0, 0.5, 1)]
        assert axes.images[0].get_array().tolist() == want
        assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for line in want for value in line]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "2048", "16k"]


def test_the_trade_off_has_a_panel_per_length_with_a_curve_through_every_variant(written):
    _, summary, _ = written
    every = tradeoff(summary).axes
    assert [axes.get_title() for axes in every] == ["512 tokens", "2048 tokens", "16k tokens"]
    for axes, row in zip(every, summary.by_length, strict=True):
        (curve,) = (one for one in axes.lines if len(one.get_xdata()) == len(SWEPT) and one.get_linestyle() == "-")
        want = sorted((100 * cell.cache_share, cell.accuracy) for cell in row.cells.values())
        assert list(zip(*curve.get_data(), strict=True)) == want
        assert {text.get_text() for text in axes.texts} == {"dense", "patched", "16", "32", "128"}
        assert axes.get_xlim()[1] > 100


def test_the_trade_off_draws_the_intervals_around_dense(written):
    _, summary, _ = written
    for axes, row in zip(tradeoff(summary).axes, summary.by_length, strict=True):
        (container,) = axes.containers
        drawn = {round(one[0, 0], 6): tuple(one[:, 1]) for one in container.lines[2][0].get_segments()}
        for name, cell in row.cells.items():
            lost, dense = cell.difference, row.cells["dense"].accuracy
            want = (cell.accuracy,) * 2 if lost is None else (dense + lost.low, dense + lost.high)
            assert drawn[round(100 * cell.cache_share, 6)] == pytest.approx(want), name


@pytest.mark.parametrize(
    ("scores", "low", "high"), [((1.0, 1.0), 0.9, 1.02), ((0.95, 0.9), 0.85, 1.02), ((1, 0), -0.5, 1.2)]
)
def test_the_axis_of_the_accuracy_is_fitted_to_the_data(scores, low, high):
    plan = plan_of(tasks="needle", text=False)
    of = dict(zip(("dense", "patched"), scores, strict=True))
    records = [record | {"score": of[record["variant"]]} for record in records_of(plan)]
    begin, end = tradeoff(summarize(plan, records)).axes[0].get_ylim()
    assert low < begin < min(scores) and max(scores) < end < high


CROWDED = ("dense", "patched", *(f"retrieval_fraction=0.{i}" for i in range(1, 10)))


@pytest.mark.parametrize("names", [("dense", "patched"), SWEPT, CROWDED], ids=len)
def test_the_names_on_a_curve_cover_no_other_name_and_no_point(names):
    plan = plan_of(names, tasks="needle", text=False)
    records = records_of(plan)
    figure = tradeoff(summarize(plan, records))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == len(names)
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        (curve,) = (one for one in axes.lines if len(one.get_xdata()) == len(names) and one.get_linestyle() == "-")
        assert not any(box.contains(*at) for at in axes.transData.transform(curve.get_xydata()) for box in boxes)
        assert all(axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1) for box in boxes)


def test_the_costs_are_those_of_the_lengths(written):
    _, summary, _ = written
    figure = costs(summary)
    for axes, name in zip(figure.axes, ("cache_bytes", "prefill_s", "decode_ms"), strict=True):
        scale = 1e-6 if name == "cache_bytes" else 1
        for line, variant in zip(axes.lines, SWEPT, strict=True):
            assert line.get_label() == variant
            want = [scale * getattr(row.cells[variant], name) for row in summary.by_length]
            assert list(line.get_ydata()) == pytest.approx(want)
        assert axes.get_xscale() == "log", "512 to 16384 on a straight axis would hide the short ones"


def test_nothing_overlaps(written):
    """Titles, labels and legends of every picture stay inside it and apart."""
    _, summary, _ = written
    for name, _, figure in figures(summary):
        figure.draw_without_rendering()
        whole = figure.bbox
        for axes in figure.axes:
            boxes = [axes.title, axes.xaxis.label, axes.yaxis.label]
            boxes = [one.get_window_extent() for one in boxes if one.get_text()]
            assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes), name
        inner = [axes.get_tightbbox() for axes in figure.axes]
        apart = [a.overlaps(b) for i, a in enumerate(inner) for b in inner[:i]]
        assert not any(apart), name


def test_the_loss_by_position_has_a_line_per_variant(written):
    (axes,) = by_position(written[1]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0-256", "256-512"]
    found = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert found == {name: [500 / 255, 2 + 0.2 * v] for v, name in enumerate(SWEPT)}
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-", "-", "-", "-"]


def test_records_of_before_there_were_positions_have_a_perplexity_alone(tmp_path):
    plan = plan_of(tasks="common_words")
    records = records_of(plan)
    del records[-1]["by_position"]
    summary = summarize(plan, records)
    assert summary.perplexity_by_position == () and summary.perplexity == summarize(plan, records_of(plan)).perplexity
    write_report(tmp_path, summary, headers_of(plan), records)
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "Perplexity of the text" in text and "by position" not in text
    assert not (tmp_path / "perplexity-position.png").exists()


def test_without_a_perplexity_text_or_a_depth(tmp_path):
    plan = plan_of(tasks="common_words", text=False)
    records = records_of(plan)
    summary = summarize(plan, records)
    assert summary.perplexity == {} and [row.depth for row in summary.by_depth] == [None] * 3
    write_report(tmp_path, summary, headers_of(plan), records)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "accuracy-kv.png", "costs.png"}
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "Perplexity" not in text and "Several processes" not in text
    Page(text)


def test_a_task_of_many_questions_and_long_answers_makes_no_huge_page(tmp_path):
    plan = plan_of(tasks="needle", text=False)
    many = {"outputs": ["x" * 5000] * 500, "expected": [["y" * 3000] * 40] * 500, "questions": ["z" * 9000] * 500}
    records = [record | many for record in records_of(plan)]
    write_report(tmp_path, summarize(plan, records), headers_of(plan), records)
    text = (tmp_path / "index.html").read_text("utf-8")
    rows = [row.partition("</tr>")[0] for row in text.partition("<h2>What was said")[2].split("<tr>") if "xxx" in row]
    assert len(rows) == 2 * len(plan.cases) * 24 == 2 * 18 * 24 and max(map(len, rows)) < 2000
    assert "at most 24 questions" in text


def test_answers_of_one_token_have_no_decode_time():
    plan = plan_of(text=False)
    records = [record | {"decode_ms": None} for record in records_of(plan)]
    summary = summarize(plan, records)
    assert summary.overall.cells["dense"].decode_ms is None
    assert [len(axes.lines) for axes in costs(summary).axes] == [2, 2, 0]


def test_no_matplotlib_is_said_at_the_start(tmp_path, monkeypatch):
    from hf_longctx.evaluate.run import evaluate

    def missing(*_):
        raise ConfigError("plot: matplotlib is not installed")

    monkeypatch.setattr("hf_longctx.evaluate.page.new_figure", missing)
    with pytest.raises(ConfigError, match="matplotlib"):
        evaluate(None, None, tmp_path / "out", tasks="needle", lengths=[128])
    assert not (tmp_path / "out").exists() and plots.new_figure is not missing


def test_answers_that_are_no_finite_numbers_have_no_interval():
    plan = plan_of(text=False)
    records = [
        record | {"expected_nll": [float("nan")]} if record["variant"] == "patched" else record
        for record in records_of(plan)
    ]
    lost = summarize(plan, records).overall.cells["patched"].nll_difference
    assert (lost.low, lost.high) == (None, None) and lost.difference != lost.difference
    assert lost.pairs == len(plan.cases)
