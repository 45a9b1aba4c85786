"""The report in a real browser: chromium, driven by selenium; skipped where either is missing."""

import base64
import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imm_jax.report import comparison, live
from imm_jax.report.results import Results
from tests import report_runs

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver") or shutil.which("chromium.chromedriver")
pytestmark = pytest.mark.skipif(not (_BROWSER and _DRIVER), reason="no chromium with its driver is installed")

MANY = 100_000


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator["webdriver.Chrome"]:
  options = webdriver.ChromeOptions()
  options.binary_location = _BROWSER
  # No name resolves: what asks for anything from elsewhere fails, and is seen in the log.
  for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,900"):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=_DRIVER))
  driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
  yield driver
  driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  root = tmp_path_factory.mktemp("reports")
  live.write(report_runs.make(root / "run"), root / "page")
  return root / "page"


@pytest.fixture
def opened(browser: "webdriver.Chrome", folder: Path) -> "webdriver.Chrome":
  browser.get_log("browser")
  browser.get_log("performance")
  browser.get(f"file://{folder}/index.html")
  show_answers(browser)
  return browser


def wait(browser: "webdriver.Chrome", ready: Callable[[], object], *, seconds: float = 20) -> None:
  end = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < end, browser.find_element("tag name", "body").text[-500:]
    time.sleep(0.02)


def found(browser: "webdriver.Chrome") -> str:
  return browser.find_element("id", "found").text


def show_answers(browser: "webdriver.Chrome") -> None:
  browser.execute_script("document.getElementById('samples').scrollIntoView()")
  wait(browser, lambda: "in all" in found(browser))


def choose(browser: "webdriver.Chrome", name: str, value: str) -> None:
  """Chooses in a filter, as a reader's choice would."""
  browser.execute_script("const [id, value] = arguments, select = document.getElementById(id); select.value = value;"
                         "select.dispatchEvent(new Event('input', {bubbles: true}));", f"filter-{name}", value)


def test_charts_draw_without_network(opened):
  """They are drawn, nothing is fetched, and the browser complains of nothing."""
  images = opened.execute_script(
      "return [...document.images].map((i) => [i.complete, i.naturalWidth, i.clientWidth, i.alt.length > 0])")
  assert len(images) == 12
  for complete, width, shown, described in images:
    assert complete
    assert width > 200
    assert shown > 200
    assert described
  events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
  asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
  assert any(url.startswith("file:") and url.endswith("index.html") for url in asked)
  assert [url for url in asked if not url.startswith(("data:", "blob:", "file:"))] == []
  assert sum(url.startswith("file:") for url in asked) == 1
  assert opened.get_log("browser") == []


def test_the_policy_stops_what_would_ask_elsewhere(opened):
  opened.execute_async_script("fetch('https://example.org/').then(arguments[0], arguments[0])")
  assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


def test_what_a_model_wrote_stays_text(opened):
  choose(opened, "kind", "training samples")
  choose(opened, "round", "0")
  wait(opened, lambda: "of 18 found" in found(opened))
  # As JSON, for half a surrogate pair does not go over the wire.
  texts = json.loads(opened.execute_script(
      "return JSON.stringify([...document.querySelectorAll('.answer')].map((e) => e.textContent))"))
  assert texts[:len(report_runs.HOSTILE)] == list(report_runs.HOSTILE)
  assert opened.execute_script("return document.querySelectorAll('#list script, #list img, #list b').length") == 0
  assert opened.execute_script("return window.hacked") is None


def test_filters_and_search_find_what_the_files_hold(opened, folder: Path):
  run = folder.parent / "run"
  rows = [json.loads(line) for t in (0, 1) for line in (run / f"round_{t}/samples.jsonl").read_text().splitlines()]
  models = ("base/eval", *(f"round_{t}/eval/{kind}" for t in (0, 1) for kind in ("sft", "merged")))
  greedy = [json.loads(line) for name in models for task in ("stories", *report_runs.OOD)
            for line in (run / name / f"{task}.jsonl").read_text().splitlines()]

  def expect(count: int) -> None:
    wanted = f"of {count} found" if count else "none found"
    wait(opened, lambda: wanted in found(opened))

  expect(len(rows) + len(greedy))
  choose(opened, "kind", "training samples")
  expect(len(rows))
  choose(opened, "verdict", "right")
  expect(sum(row["correct"] for row in rows))
  choose(opened, "round", "1")
  expect(sum(row["correct"] for row in rows[18:]))
  for name in ("kind", "verdict", "round"):
    choose(opened, name, "")
  choose(opened, "task", "groups")
  expect(5 * 6)
  choose(opened, "task", "")
  query = opened.find_element("id", "query")
  query.send_keys("CASE 3?")  # in the question, whatever the case; ? is no pattern
  expect(2 * 3 + 5 * 3)
  query.clear()
  query.send_keys("(no such text")
  expect(0)
  query.clear()
  query.send_keys(" ")
  expect(len(rows) + len(greedy))
  assert opened.get_log("browser") == []


def test_pages_turn(opened):
  first = opened.find_element("css selector", "#list li").text
  assert len(opened.find_elements("css selector", "#list li")) == 25
  assert not opened.find_element("id", "previous").is_enabled()
  opened.execute_script("document.getElementById('next').click()")
  assert found(opened).startswith("26 to 50 of ")
  assert opened.find_element("css selector", "#list li").text != first
  opened.execute_script("document.getElementById('previous').click()")
  assert opened.find_element("css selector", "#list li").text == first


def test_downloads_hold_the_tables_and_the_answers(opened, folder: Path, downloads: Path):
  opened.execute_script("document.querySelector('a[download=\"accuracy.csv\"]').click()")
  wait(opened, lambda: (downloads / "accuracy.csv").exists())
  assert (downloads / "accuracy.csv").read_bytes() == (folder / "accuracy.csv").read_bytes()
  choose(opened, "kind", "training samples")
  choose(opened, "round", "1")
  wait(opened, lambda: "of 18 found" in found(opened))
  opened.execute_script("document.getElementById('save').click()")
  wait(opened, lambda: (downloads / "answers.jsonl").exists())
  saved = [json.loads(line) for line in (downloads / "answers.jsonl").read_bytes().splitlines()]
  given = (folder.parent / "run/round_1/samples.jsonl").read_text().splitlines()
  assert [row["text"] for row in saved] == [json.loads(line)["text"] for line in given]
  assert {row["round"] for row in saved} == {1}


@contextlib.contextmanager
def phone(browser: "webdriver.Chrome") -> Iterator[None]:
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                          {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
  try:
    yield
  finally:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_shows_it_without_scrolling_sideways(opened):
  with phone(opened):
    assert opened.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
    assert min(opened.execute_script("return [...document.images].map((i) => i.clientWidth)")) > 300


def test_it_can_be_read_without_eyes(opened):
  """Every control has a name, every table a caption and heads, every heading its place."""
  for holds in ("[...document.querySelectorAll('input,select')].every((e) => e.labels.length === 1)",
                "[...document.querySelectorAll('button')].every((e) => e.textContent.trim())",
                "[...document.querySelectorAll('table')].every((t) => t.caption && t.tHead)",
                "[...document.querySelectorAll('thead th')].every((c) => c.scope === 'col')",
                "document.documentElement.lang === 'en' && document.querySelectorAll('h1').length === 1",
                "(() => { const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);"
                "return ids.length === new Set(ids).size; })()"):
    assert opened.execute_script(f"return {holds}"), holds


def test_running_page_looks_for_a_newer_one(browser, folder: Path, tmp_path: Path):
  """It is the page of a run that goes on."""
  text = (folder / "index.html").read_text()
  (tmp_path / "index.html").write_text(text.replace('data-reload="0"', 'data-reload="0.2"'))
  browser.get(f"file://{tmp_path}/index.html")
  (tmp_path / "index.html").write_text(text.replace("<title>", "<title>newer "))
  wait(browser, lambda: browser.title.startswith("newer"))


@pytest.mark.full
def test_load_and_search_time(browser, tmp_path: Path):
  """A hundred thousand answers load in three seconds and are searched in one."""
  root = report_runs.make(tmp_path / "run", rounds=1)
  rng = random.Random(0)
  words = ["apples", "buys", "gives", "three", "boxes", "left", "each", "half", "then", "total"]
  with (root / "round_0/samples.jsonl").open("w") as f:
    for i in range(MANY):
      row = report_runs.row(f"stories/train/0/{i // 3}", i // 3, rng)
      row["text"] = " ".join(rng.choices(words, k=25)) + f" {row['text']}"
      f.write(json.dumps(row | {"sample": i % 3, "temperature": 0.4}) + "\n")
  live.write(root, tmp_path / "page")
  times, searches = [], []
  for _ in range(3):  # another process may be at work
    start = time.monotonic()
    browser.get(f"file://{tmp_path}/page/index.html")
    show_answers(browser)
    times.append(time.monotonic() - start)
    assert f"{MANY + 54:,} in all" in found(browser)
    start = time.monotonic()
    browser.find_element("id", "query").send_keys("case 31415?")
    wait(browser, lambda: "of 3 found" in found(browser))
    searches.append(time.monotonic() - start)
    if times[-1] < 3 and searches[-1] < 1:
      break
  size = (tmp_path / "page/index.html").stat().st_size
  print(f"{MANY} answers, page of {size / 1e6:.1f} MB: {min(times):.2f} s to load, {min(searches):.2f} s to search")
  assert min(times) < 3
  assert min(searches) < 1


def test_several_runs_are_drawn_and_filtered(browser, tmp_path: Path):
  """Runs side by side are drawn, and their answers are filtered by run."""
  long = f"star_{'x' * 80}"
  roots = [report_runs.make(tmp_path / name, method=name.partition("_")[0]) for name in ("imm", long)]
  comparison.write([Results.read(root) for root in roots], tmp_path / "page")
  browser.get_log("browser")
  browser.get(f"file://{tmp_path}/page/index.html")
  show_answers(browser)
  images = browser.execute_script("return [...document.images].map((i) => i.complete && i.naturalWidth > 200)")
  assert images == [True] * (2 + 1 + 4 + 2 + 2 + 1 + 3)
  choose(browser, "run", long)
  wait(browser, lambda: f"of {2 * 18 + 3 * 18} found" in found(browser))
  assert f"run {long}" in browser.find_element("css selector", "#list li .facts").text
  assert browser.get_log("browser") == []
  with phone(browser):
    assert browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]


def test_one_run_has_no_filter_for_runs(opened):
  assert not opened.find_element("id", "filter-run").is_displayed()
  assert opened.find_element("id", "filter-round").is_displayed()


def test_a_picture_of_the_page_is_not_blank(opened):
  opened.execute_script("scrollTo(0, 0)")
  data = base64.b64decode(opened.get_screenshot_as_base64())
  assert len(data) > 20_000
