"""How the report's page is laid out: words of tables stay whole, and what is too wide scrolls in its own place."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.eval_cases import headers_of, plan_of, records_of

from hf_longctx.evaluate.page import TEMPLATE, environment, page, write_report
from hf_longctx.evaluate.summary import LINE, summarize

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
WIDTHS = (390, 800, 1200)  # of a phone, a tablet and a screen, in CSS pixels
LONG = ("dense", "patched", "stores.streaming.recent=1024")
# Per width: header cells and figures with a word that is broken over lines, the page's own width, tables that scroll.
MEASURE = """
function broken(cell) {
  const text = cell.firstChild, range = document.createRange();
  return cell.scrollWidth > cell.clientWidth || text !== null && [...text.data.matchAll(/\\S+/g)].some(word => {
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    return new Set([...range.getClientRects()].map(line => line.top)).size > 1;
  });
}
const found = {};
const OLD = "th, td { white-space: normal !important; overflow-wrap: anywhere; }";
for (const [name, extra] of [["own", ""], ["old", OLD]]) {
  const style = document.head.appendChild(document.createElement("style"));
  style.textContent = extra;
  for (const width of WIDTHS) {
    document.documentElement.style.width = width + "px";
    const cells = kind => [...document.querySelectorAll(kind)].filter(broken).map(cell => cell.textContent);
    found[name + width] = {
      heads: cells("th"), figures: cells("td:not(.said)"), page: document.body.scrollWidth,
      scrolled: [...document.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth).length,
    };
  }
}
document.body.textContent = "measured" + JSON.stringify(found) + "measured";
"""


def written(folder):
    plan = plan_of(LONG, "needle", lengths=(512,))
    records = records_of(plan)
    write_report(folder, summarize(plan, records), headers_of(plan), records)
    return folder / "index.html"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
def test_in_a_browser_no_cell_is_narrower_than_its_longest_word(tmp_path):
    place = written(tmp_path)
    script = f"<script>{MEASURE.replace('WIDTHS', str(list(WIDTHS)))}</script></body>"
    place.write_text(place.read_text("utf-8").replace("</body>", script), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", place.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.count("measured") == 2, f"{BROWSER}: {done.stderr}"
    found = json.loads(html.unescape(done.stdout.split("measured")[1]))
    for width in WIDTHS:
        seen = found[f"own{width}"]
        assert (seen["heads"], seen["figures"]) == ([], []), width
        assert seen["page"] <= width, "the page itself does not scroll sideways"
    assert found["own390"]["scrolled"] >= 3, "the tables do"
    assert found["old390"]["heads"] and found["old390"]["figures"], "words that may be broken are, and it is seen"


def rules() -> dict[str, str]:
    """Declarations by selector."""
    source, _, _ = environment().loader.get_source(environment(), TEMPLATE)
    style = re.search(r"<style>(.*)</style>", source, re.S)[1]
    found: dict[str, str] = {}
    for selectors, declared in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        for selector in selectors.split(","):
            found[selector.strip()] = found.get(selector.strip(), "") + declared
    return found


def test_only_what_was_said_may_be_broken_within_a_word():
    breaking = {name for name, rule in rules().items() if re.search(r"anywhere|break-word|break-all|hyphens", rule)}
    assert breaking == {"h1", "p", "td.said"}
    assert "min-width" in rules()["td.said"], "one letter per line is no width"
    assert all("overflow-x: auto" in rules()[name] for name in (".wide", "figure", "pre"))


def test_every_table_is_in_a_container_that_scrolls_and_the_page_has_the_width_of_its_screen():
    plan = plan_of(LONG)
    records = records_of(plan)
    text = page(summarize(plan, records), headers_of(plan), records, [])
    assert text.count("<table>") == text.count('<div class="wide"><table>') == 6
    assert '<meta name="viewport" content="width=device-width' in text


def test_a_table_says_of_each_cell_what_it_is():
    table = environment().get_template("table.html").module.table
    made = table(["a", "b", "c"], [["x worse", "y", "1 worse"], ["x", "y", "1"]], 2, long=(1,), mark=2)
    assert re.findall(r"<(t[dh])([^>]*)>([^<]*)</", made) == [
        *(("th", kind, word) for kind, word in ((' class="text"', "a"), (' class="said"', "b"), ("", "c"))),
        *(("td", kind, word) for kind, word in ((' class="text"', "x worse"), (' class="said"', "y"))),
        ("td", ' class="worse"', "1 worse"),
        *(("td", kind, word) for kind, word in ((' class="text"', "x"), (' class="said"', "y"), ("", "1"))),
    ]
    assert LINE.index("to dense") == 5
