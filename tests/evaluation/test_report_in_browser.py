"""The report as Chromium shows it: light and dark, wide and narrow."""

import html
import json
import re
import shutil
import subprocess

import pytest
from evaluation_helpers import keep_examples, write_answers

from keras_iris.evaluation import report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers
# Contrast of text as in WCAG 2.2, 1.4.3, of which 4.5 is level AA.
PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message || e.target.outerHTML),
                 true);
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = numbers(color).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    const color = getComputedStyle(element).backgroundColor;
    const isClear = numbers(color)[3] === 0;
    return isClear ? background(element.parentElement) : color;
  };
  const texts = [], walker = document.createTreeWalker(
    document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const [low, high] = [color, background(element)].map(luminance).sort(
      (a, b) => a - b);
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    const frame = element.closest("svg") || document.documentElement;
    const edge = frame.getBoundingClientRect();
    texts.push({
      text, contrast: (high + 0.05) / (low + 0.05),
      sticks_out: !element.closest(".scroll") &&
        (box.left < edge.left - 1 || box.right > edge.right + 1),
    });
  }
  const result = {
    errors, texts, width: innerWidth,
    is_dark: matchMedia("(prefers-color-scheme: dark)").matches,
    content_width: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType("resource").map(e => e.name),
    pictures: [...document.querySelectorAll("svg, img")].map(
      e => e.naturalWidth ?? e.getBoundingClientRect().width),
    headings: [...document.querySelectorAll("h2, body > details > summary")]
      .map(e => e.textContent),
  };
  const output = document.createElement("pre");
  output.id = "probe";
  output.textContent = JSON.stringify(result);
  parent.document.body.replaceChildren(output);
}));
</script>"""


# Windows are at least 500 pixels wide, frames as wide as they are asked to be.
FRAME = """<!DOCTYPE html><style>:root { color-scheme: light dark }</style>
<body><iframe width="%d" height="900" style="border: 0"></iframe>
<script>document.querySelector("iframe").srcdoc = %s;</script>"""


def look(page, folder, scheme, width):
    """What the probe finds in a page; no name is found in the network."""
    probed = json.dumps(page.replace("<head>", "<head>" + PROBE))
    copy = folder / "probed.html"
    copy.write_text(FRAME % (width, probed.replace("</", "<\\/")), "utf-8")
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"),
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *("--window-size=1400,900", "--hide-scrollbars"),
        *("--virtual-time-budget=5000", "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    found = re.search('<pre id="probe">(.*?)</pre>', done.stdout.decode())
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def whole_run(run_dir):
    """A run of which the report has all that it can have."""
    word = "Donaudampfschifffahrtsgesellschaft" * 4
    answers = {f"after_{i}": f"{word}\n\nSecond line" for i in range(3)}
    write_answers(run_dir, **answers)
    write_answers(run_dir / "control", **answers)
    for folder in (run_dir, run_dir / "control"):
        for iteration in range(3):
            scores = {"nll_per_token": [1.0, 2.0 - iteration]}
            keep_examples(folder, iteration, **scores)
    row = {"iteration": 2, "number": 0, "column": "annotated", "weight": 2.5}
    row |= {"prompt": f"Say {word}", "response": word}
    (run_dir / "weights.jsonl").write_text(json.dumps(row) + "\n")
    with open(run_dir / "metrics.jsonl", "a") as file:
        alarm = {"kind": "alarm", "iteration": 2, "step": 7}
        file.write(json.dumps({**alarm, "gradient_norm": 12.0}) + "\n")
    return run_dir


# Widths don't depend on colours, nor colours on widths.
@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 400)])
def test_page_in_chromium(scheme, width, whole_run, tmp_path):
    page = report(whole_run).read_text("utf-8")
    found = look(page, tmp_path, scheme, width)
    assert (found["width"], found["is_dark"]) == (width, scheme == "dark")
    assert found["errors"] == found["requests"] == []
    assert found["content_width"] == width
    assert len(found["pictures"]) == 8
    assert min(found["pictures"]) > 300
    assert len(found["texts"]) > 100
    for text in found["texts"]:
        assert text["contrast"] >= 4.5 and not text["sticks_out"], text
    assert found["headings"] == [
        "Answers to held-out prompts",
        "Responses that counted most and least",
        "What came out",
        "Scores over the run",
        "Gap and order",
        "Effective sample size and likelihood",
        "Margin and log-ratios",
        "Training, mean over the steps of an iteration",
        "Timing",
        "Alarms",
        *("Settings", "Execution", "Versions"),
        "Next",
    ]


def test_probe_finds_what_is_wrong(tmp_path):
    """A page with each of the faults, so that the test above can fail."""
    page = """<head></head><body style="background: #fff"><p
        style="color: #888">pale</p><p style="width: 900px">wide</p>
        <img src="https://example.org/a.png"><script>nothing()</script>"""
    found = look(page, tmp_path, "light", 400)
    pale, wide = found["texts"][:2]
    assert pale["contrast"] == pytest.approx(3.54, abs=0.01)  # as WebAIM's
    assert wide["contrast"] == pytest.approx(21.0)
    assert found["content_width"] > 400
    assert found["pictures"] == [0]
    assert found["requests"] == ["https://example.org/a.png"]
    script, picture = sorted(found["errors"], key=len)
    assert "nothing is not defined" in script + picture
    assert "example.org" in script + picture
