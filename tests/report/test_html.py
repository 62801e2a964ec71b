"""The report: every section, nothing fetched, everything escaped, and a report from whatever part is there."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from llamax.report.content import sections
from llamax.report.findings import answer, remarks, warnings
from llamax.report.html import write_report
from llamax.report.study import load_study

from .make_study import LAW, TARGET, add_fits, make_study, optimum, reclaim

KEYS = ["summary", "warnings", "valleys", "allocation", "curves", "fit", "prediction", "runs", "plan", "method"]
PICTURES = {
    *("valleys", "optimal-n", "optimal-d", "curves-flops", "curves-tokens"),
    *("fit", "residuals", "extrapolation", "claim"),
}


class Page(HTMLParser):
    """The tags and the visible text of a page; unbalanced tags are an error."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "study"
    make_study(folder, rows=40)
    add_fits(folder, bootstrap=40)
    return folder


@pytest.fixture
def study(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "study")


def pictures(study):
    blocks = [block for part in sections(study) for block in part.blocks]
    return {p.name: p for block in blocks for p in getattr(block, "pictures", ())}


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_every_section_and_figure_is_there(finished):
    html = write_report(finished, timings={"plan": 1.5, "train": 371.0}).read_text()
    page = Page(html)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == KEYS
    assert set(pictures(load_study(finished))) == PICTURES
    assert sum(tag == "svg" for tag, _ in page.tags) == len(PICTURES)
    text = " ".join(page.text)
    accounts = ("step, sum over runs", "90\u00a0% step, 6\u00a0% compile")
    for part in ("jax", "0.10.2", "6\u00a0min 11\u00a0s", "lr = 4e-3", "prediction", "α", *accounts):
        assert part in text
    markdown = (finished / "report.md").read_text()
    assert all(f"## {part.title.partition(':')[0]}" in markdown for part in sections(load_study(finished)))


def test_nothing_is_fetched_and_nothing_runs(finished):
    html = write_report(finished).read_text()
    tags = Page(html).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    addresses = [v for _, attrs in tags for k, v in attrs.items() if k in ("src", "href", "xlink:href", "action")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)


def test_colours_follow_the_theme_and_ids_are_unique(finished):
    html = write_report(finished).read_text()
    body = html[html.index("<body") :]
    assert not re.search(r"#0[12]00[0-9a-f]{2}", html), "a placeholder colour was left"
    assert not re.search(r"(?:fill|stroke): ?#", body), "a fixed colour would vanish in one of the themes"
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= set(re.findall(r"--(\w+):", html))
    ids = [attrs["id"] for _, attrs in Page(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_figures_draw_the_numbers(finished):
    drawn = pictures(load_study(finished))
    valleys = drawn["valleys"].svg
    assert valleys.count("<title>minimum at") == 4
    assert len(re.findall(r"<title>[^<]*: N \d", valleys)) == 28, "one point a run, each with its hover text"
    assert all(f"C = {label}" in valleys for label in ("10¹¹", "3×10¹¹", "10¹²", "3×10¹²"))
    assert "measured" in drawn["claim"].svg
    standalone = drawn["fit"].standalone()
    assert 'xmlns="http://www.w3.org/2000/svg"' in standalone
    assert "#0200" not in standalone


def test_the_page_is_the_same_every_time(finished):
    first = write_report(finished).read_text()
    assert write_report(finished).read_text() == first


def test_findings_state_the_law_that_made_the_runs(finished):
    study = load_study(finished)
    words = " ".join(answer(study))
    exponent = float(re.search(r"best N grows as C\^([\d.]+)", words)[1])
    assert exponent == pytest.approx(LAW["beta"] / (LAW["alpha"] + LAW["beta"]), abs=0.02)
    assert "4 of 4 compute budgets" in words
    n, d = study.law_optimum(TARGET)
    assert n == pytest.approx(optimum(TARGET), rel=0.1)
    assert 6 * n * d == pytest.approx(TARGET)
    assert study.held_out["name"] == "prediction"
    assert len(study.cells) == 28


# ---------------------------------------------------------------- warnings
@pytest.mark.parametrize(("shift", "inside"), [(0.0, True), (0.05, False)])
def test_the_interval_is_said_to_hold_or_to_be_missed(study, shift, inside):
    claim = load_study(study).prediction
    (run,) = study.glob("prediction-*")
    change(run / "result.json", eval_loss=claim["loss"] + shift)
    loaded = load_study(study)
    assert ("inside the 95 % interval" in answer(loaded)[-1]) is inside
    assert any("interval was missed" in word for word in warnings(loaded)) is not inside


def test_valleys_off_the_grid_are_said(study):
    fits = json.loads((study / "fits.json").read_text())
    for budget in fits["approach2"]["budgets"][:2]:
        budget["interior"] = False
    change(study / "fits.json", **fits)
    words = " ".join(warnings(load_study(study)))
    assert "off the grid at 2 budgets (C = 10¹¹, 3×10¹¹)" in words
    assert "Only 2 budgets with an interior minimum" in words


def test_troubled_runs_are_said(study):
    runs = sorted(p for p in study.iterdir() if (p / "result.json").exists())
    change(runs[0] / "result.json", status="diverged", cause="loss above 4 x the average", eval_loss=None)
    change(runs[1] / "result.json", epochs=3.4)
    change(runs[2] / "result.json", fingerprint="other")
    (runs[3] / "metrics.jsonl").write_text("{")
    words = " ".join(warnings(load_study(study)))
    for part in ("1 run diverged", "loss above 4 x", "up to 3.4 epochs", "2 different data sets", "unreadable lines"):
        assert part in words


def test_warnings_of_plan_fit_and_prediction_are_repeated_once(study):
    for name in ("plan", "fits"):
        change(study / f"{name}.json", warnings=["the very same words at 1.5e+12"])
    reclaim(study, warnings=["the very same words at 1.5e+12"])
    assert remarks(load_study(study)).count("The very same words at 1.5×10¹².") == 1


# ---------------------------------------------------------------- missing parts
@pytest.mark.parametrize("missing", ["fits.json", "predictions.jsonl", "plan.json"])
def test_a_missing_file_is_said(study, missing):
    for file in study.glob(f"{missing}*"):
        file.unlink()
    html = write_report(study).read_text()
    assert [attrs["id"] for tag, attrs in Page(html).tags if tag == "section"] == KEYS
    assert "Missing:" in html


def test_damaged_files_are_said(study):
    files = ("fits.json", "plan.json", "study.yaml")
    for file in files:
        (study / file).write_text("{ not: [data")
    html = write_report(study).read_text()
    assert html.count("<section") == len(KEYS)
    assert all(f"{file}: not readable" in html for file in files)


def test_a_claim_that_was_edited_is_said_and_not_shown(study):
    ledger = study / "predictions.jsonl"
    ledger.write_text(ledger.read_text().replace('"loss":', '"loss":1', 1))
    loaded = load_study(study)
    assert "record 0 (line 1) was edited" in " ".join(warnings(loaded))
    assert answer(loaded)[-1] == "No prediction has been written down yet."


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_few_runs_still_give_a_report(tmp_path, keep):
    truth = make_study(tmp_path, budgets=(1e11,), sizes=3, rows=20, held_out=False)
    for name in sorted(truth)[keep:]:
        shutil.rmtree(tmp_path / name)
    (tmp_path / "plan.json").unlink()
    html = write_report(tmp_path).read_text()
    assert html.count("<section") == len(KEYS)
    assert "Missing:" in html


def test_hostile_fits_do_not_break_the_report(study):
    nothing = {"approach2": {"budgets": [None, {"budget": "x"}, {"budget": 1e11}]}, "approach3": {"params": {"E": "?"}}}
    claim = {"loss": 2.0, "flops": None, "interval": "wide", "measured": None}
    html = write_report(study, fits=nothing, prediction=claim).read_text()
    assert html.count("<section") == len(KEYS)


def test_a_single_run_has_a_report(finished, tmp_path):
    run = shutil.copytree(next(p for p in finished.iterdir() if (p / "result.json").exists()), tmp_path / "run")
    assert "1 run finished" in write_report(run).read_text()


# ---------------------------------------------------------------- escaping
def test_text_from_data_is_escaped(study):
    evil = '<script>alert("1")</script>|`&'
    runs = sorted(p for p in study.iterdir() if (p / "result.json").exists())
    change(runs[0] / "result.json", status="diverged", cause=evil, name=evil)
    change(runs[1] / "result.json", name=evil)
    change(runs[2] / "env.json", versions={evil: evil})
    change(study / "plan.json", warnings=[evil], rules={evil: evil})
    reclaim(study, rule=evil)
    (study / "study.yaml").write_text(json.dumps({"name": evil}))
    runs[3].rename(runs[3].with_name("a<b>&-00000000"))
    html = write_report(study).read_text()
    assert not {tag for tag, _ in Page(html).tags} & {"script", "b"}
    assert "&lt;script&gt;" in html
    markdown = (study / "report.md").read_text()
    assert not re.search(r"(?<!\\)<", markdown)
    widths = {}
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert widths.setdefault("now", cells) == cells, line
        else:
            widths.clear()
