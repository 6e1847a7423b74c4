"""The page in a browser: it loads from disk without errors, finds, sorts and lights up patches."""

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipsae.evaluation.interventions import Reasons
from clipsae.naming.names import Names
from clipsae.naming.vocabulary import Vocabulary
from clipsae.visualization.page.images import Effects, ImageActivations
from clipsae.visualization.page.serve import PageServer
from clipsae.visualization.page.write import Examined, image_content, write_page, write_pictures
from clipsae.visualization.references import BINS, References, Source

webdriver = pytest.importorskip("selenium.webdriver")

M, K, R, GRID, N = 3000, 4, 3, (3, 4), 40
CLASSES = [f"class {i}" for i in range(7)] + ['<b>bold & "quoted"</b>']
CONCEPTS = ["colour=red", "colour=blue", "shape=ring"]
PATCHES = GRID[0] * GRID[1]
DEAD = 17
NAMELESS = 21  # no concept stands out


def made_up() -> References:
    generator = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    values = rand(M, K).sort(descending=True).values
    index = torch.randint(N, (M, K), generator=generator)
    frequency, tokens = rand(M), rand(M) * 0.1 + 0.01
    tokens[DEAD] = frequency[DEAD] = 0
    index[DEAD] = -1
    sampled = torch.randint(N, (M, R), generator=generator)
    sampled[DEAD] = -1
    concept = torch.randint(1, 3, (M,), generator=generator)
    concept[[100, 2000]] = 0  # the two that are red
    certainty = rand(M)
    certainty[[100, 2000]] = torch.tensor([0.2, 0.3])
    concept[NAMELESS] = -1
    return References(
        values=values,
        index=index,
        label=torch.randint(7, (M, K), generator=generator),
        maps=(rand(M, K, PATCHES) * 255).to(torch.uint8),
        scale=values,
        class_token=values,
        sample_values=values[:, :R] / 2,
        sample_index=sampled,
        sample_label=torch.randint(7, (M, R), generator=generator),
        sample_maps=torch.zeros(M, R, PATCHES, dtype=torch.uint8),
        sample_scale=values[:, :R],
        sample_class_token=values[:, :R],
        frequency=frequency,
        token_frequency=tokens,
        strength=rand(M),
        entropy=rand(M),
        top_label=torch.randint(8, (M,), generator=generator),
        histogram=torch.randint(9, (M, BINS), generator=generator),
        source=Source("made up", "test", N, GRID, CLASSES, CONCEPTS, "attributes"),
        monosemanticity=torch.where(tokens > 0, rand(M), torch.nan),
        concept=concept,
        concept_score=certainty,
        concept_precision=certainty,
        concept_recall=certainty,
        concept_covered=torch.full((M,), 0.9),
        base=torch.tensor([0.125, 0.1, 0.25]),
        leading=torch.tensor([[300, 100], [1, 2], [-1, -1]]),
        leading_precision=torch.tensor([[0.75, 0.5], [0.6, 0.4], [0.0, 0.0]]),
    )


EFFECTS = Effects(
    latent=torch.tensor([5, 100, 100, 100, 100]),
    label=torch.tensor([0, 0, 2, 3, 7]),
    change=torch.tensor([1.0, 0.25, -0.5, 0.75, 0.004]),
    images=torch.tensor([1, 3, 1, 2, 9]),
)


def normaliser(logits: list[float]) -> float:
    return math.log(sum(math.exp(x) for x in logits))


# Without latent 5 the logit of class 3 is lower by 0.25, but its margin over class 2 larger by 0.5;
# latent 6 is what class 2 would be predicted without.
LOGITS, WITHOUT = [5.0, 4.0, 1.0], [[4.75, 3.25, 1.0], [3.5, 4.0, 2.0]]
WHY = Reasons(
    classes=[3, 2, 0],
    logits=LOGITS,
    normaliser=normaliser(LOGITS),
    latents=[5, 6],
    means=[0.15, 0.06],
    without=WITHOUT,
    normalisers=[normaliser(logits) for logits in WITHOUT],
    instead=[3, 2],
)
NAMES = {i: f"test/class {i % 8}/photo number {i}.jpg" for i in range(N)}


def activations(index: int) -> ImageActivations:
    """Latent 5 on patch 1 alone, latent 6 on the patches 0 and 11."""
    tokens: list[tuple[list[int], list[float]]] = [([7], [1.0])]
    tokens += [([], []) for _ in range(PATCHES)]
    tokens[1 + 0] = ([6], [0.5])
    tokens[1 + 1] = ([5], [2.0])
    tokens[1 + 11] = ([6], [0.25])
    prediction = [(3, 0.8), (2, 0.1)]
    means = [0.15, 0.06]
    return ImageActivations(index, 3, tokens, [5, 6], means, prediction, prediction, WHY)


WORDS = ["dotted", "striped", "red", "ring"]
STRIPES, DOTS = 40, 41  # latents, named so; the name of the second is not to be trusted


def naming() -> Names:
    """All latents are called "red", with scores at chance, but two; of these, examples that lie on
    the words."""
    low = torch.full((M,), 0.45)
    low[STRIPES] = 0.8
    texts = ["red"] * M
    texts[STRIPES], texts[DOTS], texts[DEAD] = "striped", "dotted", ""
    examples = torch.tensor([[0.0, 0, 1, 1]]).repeat(M, 1)
    examples[STRIPES], examples[DOTS] = torch.eye(4)[1], torch.eye(4)[0]
    examples[DEAD] = 0
    best = torch.tensor([[2, 3]]).repeat(M, 1)
    best[DEAD] = -1
    return Names(
        vocabulary=Vocabulary(WORDS, torch.eye(4)),
        best=best,
        best_scores=torch.tensor([[0.5, 0.25]]).repeat(M, 1),
        text=texts,
        score=low + 0.1,
        low=low,
        high=low + 0.2,
        control=torch.full((M,), 0.5),
        threshold=0.6,
        judge="clip",
        source="openai:seer",
        explained=torch.arange(M) == STRIPES,
        examples=torch.nn.functional.normalize(examples, dim=-1),
    )


def examined(predictions: bool = True, names: Names | None = None) -> Examined:
    generator = torch.Generator().manual_seed(1)
    images = [activations(0), activations(3)]
    if not predictions:
        images = [replace(image, clip=[], sae=[], why=None) for image in images]
    return Examined(
        about={"SAE": "made up", "In the store": "it"},
        references=made_up(),
        rows=torch.randn(M, 16, generator=generator),
        neighbours=(torch.arange(M)[:, None].roll(1), torch.full((M, 1), 0.5)),
        effects=EFFECTS if predictions else None,
        images=images,
        ranking={1: [100, 5], 2: [5, 7, 100]} if predictions else None,
        names=names,
    )


def write(folder: Path, models: dict[str, Examined], thumbnails: bool = True) -> str:
    folder.mkdir()
    write_page(
        folder,
        models,
        title="topk on <things>",
        thumbnails=thumbnails,
        names=NAMES if thumbnails else None,
    )
    if thumbnails:
        for i in range(N):
            pixels = torch.full((3, 12, 12), 6 * i, dtype=torch.uint8)
            write_pictures(folder, i, pixels, own_page=i in (0, 3))
    return f"file://{folder}/index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("page") / "with", {"topk": examined()})


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> str:
    """Two SAEs, the first named: the second has its rows, moved by one place, but the latent 9,
    whose counterpart is no nearer than chance."""
    first = examined(names=naming())
    rows = first.rows.roll(1, dims=0)
    generator = torch.Generator().manual_seed(5)
    rows[10] = torch.randn(16, generator=generator)
    second = replace(examined(), rows=rows)
    folder = tmp_path_factory.mktemp("page") / "two"
    return write(folder, {"topk": first, "other": second})


@pytest.fixture(scope="module")
def browser() -> Iterator:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,860"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver, log_output=subprocess.DEVNULL)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


def go(browser, url: str, wanted: str) -> None:
    """Open a view and wait for an element of it."""
    browser.get("about:blank")
    browser.get(url)
    wait(browser, f"return document.querySelector({wanted!r})")


def wait(browser, script: str):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda b: b.execute_script(script))


def listed(browser) -> list[int]:
    """The latents in sight, from the top."""
    rows = browser.execute_script(
        "return [...document.querySelectorAll('.item')].map(r => [parseFloat(r.style.top), "
        "parseInt(r.querySelector('.id').textContent)])"
    )
    return [m for _, m in sorted(rows)]


def type_into_search(browser, text: str, count: str) -> None:
    browser.execute_script(
        "const s = document.querySelector('input[type=search]'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        text,
    )
    wait(browser, f"return document.querySelector('[role=status]').textContent === {count!r}")


def test_every_view_loads_without_errors_and_asks_for_nothing_outside(browser, page):
    browser.get_log("browser")
    browser.get_log("performance")
    for view, wanted in (
        ("", ".item"),
        ("latent/100", ".picture canvas"),
        (f"latent/{DEAD}", "h1"),
        ("concepts", "[data-concept] img"),
        ("images", ".picture img"),
        ("image/3", "tr[data-latent]"),
        ("map", ".legend span"),
        ("about", "kbd"),
        ("kept", "h1"),
        ("beside/100/5", ".side canvas"),
        ("compare", "p"),
        ("latent/99999", "p"),
    ):
        go(browser, f"{page}#/{view}", f"main {wanted}")
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    asked = [message for message in asked if "Network.requestWillBeSent" in message]
    assert asked
    assert not [message for message in asked if '"url":"http' in message]


def test_the_list_holds_few_rows_sorts_and_searches(browser, page):
    made = made_up()
    go(browser, f"{page}#/", ".item")
    assert len(listed(browser)) < 60
    expected = sorted(set(range(M)) - {DEAD}, key=lambda m: (-made.concept_score[m].item(), m))
    assert listed(browser) == expected[: len(listed(browser))]

    browser.execute_script("document.querySelector('[data-key=frequency]').click()")
    expected = sorted(set(range(M)) - {DEAD}, key=lambda m: (-made.frequency[m].item(), m))
    assert listed(browser) == expected[: len(listed(browser))]
    assert browser.execute_script("return location.hash") == "#/latents?sort=frequency"
    browser.execute_script("document.querySelector('[data-key=frequency]').click()")
    assert listed(browser)[0] == expected[-1]
    scroll = "document.querySelector('.scroll').scrollTop = 48 * 1500"
    browser.execute_script(
        f"{scroll}; document.querySelector('.scroll').dispatchEvent(new Event('scroll'))"
    )
    assert expected[::-1][1500] in listed(browser)

    # "red" is a concept, though no label holds the word: those that lead it come first, in their
    # order, whatever their best concept; a number is a latent's own.
    browser.execute_script("document.querySelector('[data-key=concept]').click()")
    type_into_search(browser, "red", "3 of 3,000")
    assert listed(browser) == [300, 100, 2000]
    said = browser.execute_script("return document.querySelectorAll('.item .concept')[0].innerText")
    assert said == "colour=red\n75.0 %, chance 12.5 %"
    # By which no column is in order.
    assert not browser.find_elements("css selector", ".heads [aria-sort]")
    assert browser.find_element("css selector", ".tools .best").is_displayed()
    browser.execute_script("document.querySelector('[data-key=gain]').click()")
    assert listed(browser)[0] == 100  # as is asked for: what helps most
    assert browser.find_element("css selector", ".heads [aria-sort]").text == "Helps ↓"
    assert not browser.find_element("css selector", ".tools .best").is_displayed()
    type_into_search(browser, "", "2,999 of 3,000")
    assert listed(browser)[:2] == [5, 100]
    said = browser.execute_script("return document.querySelectorAll('.item .helps')[1].innerText")
    assert said == "class 3 +0.75"
    type_into_search(browser, "2999", "1 of 3,000")
    assert listed(browser) == [2999]
    named = (made.top_label == 7) & made.alive
    type_into_search(browser, "<b>bold", f"{int(named.sum())} of 3,000")
    assert '<b>bold & "quoted"</b>' in browser.find_element("css selector", ".item .label").text
    type_into_search(browser, "nothing like it", "0 of 3,000")
    type_into_search(browser, "", "2,999 of 3,000")


def test_keys_lead_from_the_list_to_a_latent_and_on(browser, page):
    go(browser, f"{page}#/latent/100", "h1")
    browser.execute_script(
        "dispatchEvent(new Event('x'));"
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))"
    )
    wait(browser, "return document.querySelector('.item')")
    first = listed(browser)
    body = browser.find_element("css selector", "body")
    body.send_keys("j", "j", "\n")
    wait(browser, f"return location.hash === '#/latent/{first[2]}'")
    wait(browser, f"return document.querySelector('h1')?.textContent === 'Latent {first[2]}'")
    browser.find_element("css selector", "body").send_keys("k")
    wait(browser, f"return location.hash === '#/latent/{first[1]}'")
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element("css selector", "body").send_keys("t")
    assert before != browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )


LIT = """
const c = document.querySelector('.look canvas');
const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
return [...Array(c.width * c.height).keys()].filter(p => d[4 * p + 3] > 0)
"""


def test_patches_show_their_latents_and_latents_their_patches(browser, page):
    from selenium.webdriver import ActionChains

    go(browser, f"{page}#/image/3", "tr[data-latent='5']")
    assert not browser.find_elements("css selector", ".steer, button.off")  # no server, no switch
    frame = browser.find_element("css selector", ".look .framed")
    side = frame.size["width"]
    assert browser.execute_script(LIT) == []
    # The patch 1: first row, second of four columns.
    at = (round(side * (1.5 / 4 - 0.5)), round(side * (0.5 / 3 - 0.5)))
    ActionChains(browser).move_to_element_with_offset(frame, *at).perform()
    rows = "return [...document.querySelectorAll('tr[data-latent]')].map(r => +r.dataset.latent)"
    said = "return document.querySelector('.look [role=status]').textContent"
    wait(browser, f"{said}.startsWith('Patch in row 1, column 2')")
    assert browser.execute_script(rows) == [5]
    assert browser.execute_script(LIT) == [1]
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    wait(browser, rows.replace("return", "return 2 ===") + ".length")
    assert browser.execute_script(rows) == [6, 5]  # by what they do to the prediction
    row = browser.find_element("css selector", "tr[data-latent='6']")
    assert "+1.50" in row.text
    assert "class 2" in row.text  # what would be predicted without it
    assert 'margin of "class 3" over "class 2" (its logit less that one\'s, +1.00)' in (
        browser.execute_script(said)
    )
    ActionChains(browser).move_to_element(row).perform()
    assert browser.execute_script(LIT) == [0, 11]


def test_reasons_by_logit_margin_and_probability(browser, page):
    go(browser, f"{page}#/image/0", "tr[data-latent='5']")
    choose = (
        "const s = document.querySelector(`select[aria-label='${arguments[0]}']`);"
        "s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    )
    table = (
        "return [...document.querySelectorAll('tr[data-latent]')].map(r => [+r.dataset.latent,"
        "r.children[4].textContent, r.children[4].classList.contains('good')])"
    )
    said = "return document.querySelector('.look [role=status]').textContent"

    def reasons(measure: str, other: int | None = None) -> list:
        browser.execute_script(choose, "Measured by", measure)
        if other is not None:
            browser.execute_script(choose, "Compared with", str(other))
        return browser.execute_script(table)

    def expected(of) -> list:
        effects = {m: of(LOGITS) - of(WITHOUT[i]) for i, m in enumerate([5, 6])}
        order = sorted(effects, key=lambda m: -abs(effects[m]))
        return [[m, f"{effects[m]:+.2f}", effects[m] > 0] for m in order]

    assert reasons("logit") == expected(lambda x: x[0]) == [[6, "+1.50", True], [5, "+0.25", True]]
    assert 'How much higher CLIP\'s logit of "class 3"' in browser.execute_script(said)
    assert reasons("margin", 2) == expected(lambda x: x[0] - x[1])
    assert reasons("margin", 2)[1] == [5, "-0.50", False]  # it narrows the margin
    assert reasons("margin", 0) == expected(lambda x: x[0] - x[2])
    probability = expected(lambda x: 100 * math.exp(x[0]) / sum(map(math.exp, x)))
    for found, wanted in zip(reasons("probability"), probability, strict=True):
        assert found[0::2] == wanted[0::2]
        assert float(found[1]) == pytest.approx(float(wanted[1]), abs=0.015)  # of rounded logits
    points = browser.execute_script(said)
    assert f"({100 * math.exp(5) / sum(map(math.exp, LOGITS)):.1f} %)" in points
    # What was chosen stays for the next image.
    go(browser, f"{page}#/image/3", "tr[data-latent='5']")
    reasons("margin", 2)


def test_images_are_named_by_their_files(browser, page):
    go(browser, f"{page}#/image/3", "main h1")
    assert browser.find_element("css selector", "h1 + span").text == NAMES[3]
    go(browser, f"{page}#/images", "a.picture")
    files = "return [...document.querySelectorAll('.caption.file')].map(f => f.textContent)"
    assert browser.execute_script(files) == [NAMES[0], NAMES[3]]
    type_into_search(browser, "3.jpg", "1 of 2")
    type_into_search(browser, "", "2 of 2")
    go(browser, f"{page}#/latent/100", ".picture canvas")
    index = made_up().index[100].tolist()
    assert browser.execute_script(files) == [NAMES[i] for i in index]
    titles = "return [...document.querySelectorAll('.picture img')].map(i => [i.title, i.alt])"
    for (title, alt), i in zip(browser.execute_script(titles), index, strict=True):
        assert title == NAMES[i]
        assert alt.startswith(f"{NAMES[i]}: ")


def test_no_concept_is_named_where_none_stands_out(browser, page):
    go(browser, f"{page}#/latent/{NAMELESS}", ".picture canvas")
    facts = browser.find_element("css selector", "dl.facts").text
    assert "Concept\nnone stands out" in facts
    assert browser.find_element("css selector", "h1 + span").text.startswith("no name (label: ")
    go(browser, f"{page}#/latent/2000", ".picture canvas")
    text = browser.find_element("css selector", "main").text
    assert "30.0 % of its activation on patches with a colour lies on red, where chance" in text
    assert "would give 12.5 %: 2.4 times as much" in text


def test_a_latent_shows_the_classes_that_it_helps_hurts_and_is_kept_for(browser, page):
    sections = """
    return Object.fromEntries([...document.querySelectorAll('section')].map(s =>
      [s.querySelector('h2').firstChild.textContent,
       [...s.querySelectorAll('li')].map(l => l.innerText.replace(/\\s+/g, ' '))]))
    """
    go(browser, f"{page}#/latent/100", "main .picture canvas")
    found = browser.execute_script(sections)
    assert found["Helps"] == ["class 3 2 images +0.75", "class 0 3 images +0.25"]
    assert found["Hurts"] == ["class 2 1 image -0.50"]
    assert found["Top-n"] == ["class 1 n ≥ 1", "class 2 n ≥ 3"]
    go(browser, f"{page}#/latent/7", "main .picture canvas")
    found = browser.execute_script(sections)
    assert (found["Helps"], found["Hurts"], found["Top-n"]) == ([], [], ["class 2 n ≥ 2"])


def test_the_latents_that_lead_a_concept(browser, page):
    go(browser, f"{page}#/concepts", "[data-concept]")
    found = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('[data-concept]')].map(c => "
        "[c.dataset.concept, [...c.querySelectorAll('a')].map(a => a.innerText)]))"
    )
    assert found == {
        "colour=red": ["300 75.0 %", "100 50.0 %"],
        "colour=blue": ["1 60.0 %", "2 40.0 %"],
        "shape=ring": [],
    }
    browser.execute_script("document.querySelector('[data-latent=\"300\"]').click()")
    wait(browser, "return document.querySelector('h1')?.textContent === 'Latent 300'")
    leads = browser.execute_script("return document.querySelectorAll('dl.facts')[1].innerText")
    assert leads == "colour=red\n75.0 % (chance 12.5 %), the first"


def test_a_link_leads_to_a_list_as_it_was_filtered(browser, page):
    made = made_up()
    link = "#/latents?concept=colour%3Dred&low=1&high=99.5&ms=0.05&sort=frequency&up=yes"
    go(browser, f"{page}{link}", ".item")
    passing = (made.concept == 0) & (made.frequency >= 0.01) & (made.frequency <= 0.995)
    passing &= made.monosemanticity >= 0.05
    kept = sorted(passing.nonzero().flatten().tolist(), key=lambda m: float(made.frequency[m]))
    assert listed(browser) == kept
    assert browser.execute_script("return document.querySelector('.filters').open")
    assert browser.execute_script("return location.hash") == link
    go(browser, f"{page}#/map?colour=label&zoom=3&x=0.2&y=-0.1", ".legend span")
    assert browser.execute_script("return document.querySelector('select').value") == "label"
    wait(browser, "return location.hash === '#/map?colour=label&zoom=3&x=0.2&y=-0.1'")
    go(browser, f"{page}#/image/3?latent=6", "tr.at[data-latent='6']")
    assert browser.execute_script(LIT) == [0, 11]


def test_examples_across_the_range(browser, page):
    go(browser, f"{page}#/latent/100", ".picture canvas")
    browser.execute_script("document.querySelector('[data-kind=range]').click()")
    shown = "return [...document.querySelectorAll('.caption.file')].map(f => f.textContent)"
    expected = [NAMES[i] for i in made_up().sample_index[100].tolist()]
    assert browser.execute_script(shown) == expected
    assert browser.execute_script("return location.hash") == "#/latent/100?examples=range"
    browser.execute_script("document.querySelector('[data-kind=\"\"]').click()")
    assert len(browser.execute_script(shown)) == K


def test_names_and_the_search_by_meaning(browser, two):
    go(browser, f"{two}#/latents", ".item")
    assert listed(browser)[0] == STRIPES  # of trusted names the best score first
    row = browser.execute_script("return document.querySelector('.item .called').innerText")
    assert row == "striped\nscore 0.9 (0.8 to 1)"
    rest = browser.execute_script("return document.querySelectorAll('.item .called')[1].innerText")
    assert rest.startswith("no name")
    type_into_search(browser, "stripes", "1 of 3,000")
    browser.execute_script("document.querySelector('[data-by=meaning]').click()")
    wait(browser, "return document.querySelector('.best').textContent.includes('“striped”')")
    assert listed(browser)[0] == STRIPES
    type_into_search(browser, "dots", "2,999 of 3,000")
    wait(browser, "return document.querySelector('.best').textContent.includes('“dotted”')")
    assert listed(browser)[0] == DOTS
    wait(browser, "return location.hash === '#/latents?q=dots&by=meaning'")
    type_into_search(browser, "qqqq", "2,999 of 3,000")
    wait(browser, "return document.querySelector('.best').textContent.startsWith('no word')")
    go(browser, f"{two}#/latents?named=yes", ".item")
    assert listed(browser) == [STRIPES]
    go(browser, f"{two}#/latent/{DOTS}", ".name-score")
    said = browser.find_element("css selector", ".name-score").text
    assert "“dotted”" in said
    assert "No name, as the low end is not above 0.6" in said
    assert said.startswith("Of all words")
    go(browser, f"{two}#/latent/{STRIPES}", ".name-score")
    said = browser.find_element("css selector", ".name-score").text
    assert said.startswith("openai:seer calls it “striped”.")
    go(browser, f"{two}#/about", "h1")
    assert "of 1 latents what openai:seer says" in browser.find_element("css selector", "main").text


def test_two_saes_side_by_side(browser, two):
    browser.get_log("browser")
    go(browser, f"{two}#/compare", ".pair")
    pairs = "return [...document.querySelectorAll('.pair')].map(p => +p.dataset.latent)"
    assert set(browser.execute_script(pairs)) == {9, DEAD - 1}  # whose counterpart is dead
    go(browser, f"{two}#/compare?show=with&q=striped", ".pair")
    text = browser.find_element("css selector", ".pair").text
    assert text.startswith(f"{STRIPES} striped (0.9)")
    assert "1 ⇄" in text
    assert f"{STRIPES + 1} " in text
    browser.find_element("css selector", ".pair .cosine").click()
    wait(browser, "return document.querySelectorAll('.side .picture canvas').length === 8")
    link = browser.execute_script("return location.hash")
    assert link == f"#/beside/{STRIPES}/{STRIPES + 1}?other=other"
    assert "Cosine of the decoder rows 1;" in browser.find_element("css selector", "main").text
    go(browser, f"{two}#/compare/3", ".side [data-latent='5']")
    captions = "return [...document.querySelectorAll('.side .picture')].map(p => p.innerText)"
    found = browser.execute_script(captions)
    assert len(found) == 4
    assert "⇄ 6 (1)" in found[0]
    # Views of the second: its links stay with it.
    go(browser, f"{two}#/latent/7?sae=other", ".picture canvas")
    assert browser.execute_script("return document.getElementById('sae').value") == "other"
    heads = browser.execute_script(
        "return [...document.querySelectorAll('h2')].map(h => h.firstChild.textContent)"
    )
    assert "In topk" in heads
    browser.find_element("css selector", "nav a").click()
    wait(browser, "return location.hash.includes('sae=other') && document.querySelector('.item')")
    assert browser.get_log("browser") == []


def test_notes_and_a_shortlist_are_kept_and_exported(browser, page, tmp_path):
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Page.setDownloadBehavior", folder)
    go(browser, f"{page}#/latent/100", ".kept .star")
    browser.execute_script("localStorage.clear()")
    go(browser, f"{page}#/latent/100", ".kept .star")
    browser.find_element("css selector", ".star").click()
    browser.find_element("css selector", ".note").send_keys("looks red")
    browser.find_element("css selector", ".kept .card").click()
    card = downloaded(tmp_path / "topk-100.md")
    assert card.startswith("# topk, latent 100: colour=red\n")
    assert "- Note: looks red" in card
    assert f"![](thumbs/0/{made_up().index[100, 0]}.jpg)" in card
    go(browser, f"{page}#/latents?kept=yes", ".item .mark")
    assert listed(browser) == [100]
    go(browser, f"{page}#/kept", ".keptrow")
    assert "looks red" in browser.find_element("css selector", ".keptrow").text
    browser.find_element("css selector", ".export").click()
    text = downloaded(tmp_path / "shortlist.json")
    entry = {"sae": "topk", "latent": 100, "note": "looks red", "marked": True}
    assert json.loads(text)["latents"] == [entry]
    browser.find_element("css selector", ".keptrow button").click()
    assert not browser.find_elements("css selector", ".keptrow")
    chosen = browser.find_element("css selector", "input[type=file]")
    chosen.send_keys(str(tmp_path / "shortlist.json"))
    wait(browser, "return document.querySelectorAll('.keptrow').length === 1")
    (tmp_path / "other.json").write_text("{}")
    chosen.send_keys(str(tmp_path / "other.json"))
    said = "return document.querySelector('[role=status]').textContent"
    wait(browser, f"{said}.includes('it is no shortlist')")
    browser.execute_script("localStorage.clear()")


def downloaded(file: Path) -> str:
    end = time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return file.read_text()


def test_it_fits_a_phone(browser, two):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for view, wanted in (
            ("", ".item"),
            ("latents?low=1", ".filters[open]"),
            ("latent/100", "canvas"),
            ("beside/100/7", "canvas"),
            ("image/0", "tr[data-latent]"),
            ("compare", ".pair"),
            ("compare/0", "canvas"),
            ("concepts", "[data-concept]"),
            ("map", ".legend span"),
            ("kept", "h1"),
        ):
            go(browser, f"{two}#/{view}", f"main {wanted}")
            wide = browser.execute_script(
                "return Math.max(document.documentElement.scrollWidth,"
                "document.getElementById('main').scrollWidth)"
            )
            assert wide <= 360, view
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pictures_and_predictions_can_be_left_out(browser, tmp_path):
    url = write(tmp_path / "without", {"topk": examined(predictions=False)}, thumbnails=False)
    assert not list(tmp_path.glob("without/**/*.jpg"))
    browser.get_log("browser")
    headings = "return [...document.querySelectorAll('h2')].map(h => h.firstChild.textContent)"
    for view, wanted in (
        ("", ".item"),
        ("images", "a.picture"),
        ("latent/100", "canvas"),
        ("image/3", "tr[data-latent='5']"),
    ):
        go(browser, f"{url}#/{view}", f"main {wanted}")
        assert browser.execute_script("return document.images.length") == 0
        assert not {"Helps", "Hurts", "Top-n"} & set(browser.execute_script(headings))
    assert browser.execute_script(headings) == []
    assert "Why" not in browser.find_element("css selector", "main").text
    assert browser.get_log("browser") == []


def test_latents_are_switched_off_and_on_where_a_server_is_behind_the_page(browser, page):
    asked = []

    def steer(name: str, image: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        asked.append((name, image, strengths))
        return [(6, 0.7), (3, 0.2)]

    def explain(name: str, picture: bytes) -> dict:
        asked.append((name, picture))
        return image_content(activations(-1))

    folder = Path(page.removeprefix("file://")).parent
    with PageServer(folder, steer, explain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get_log("browser")
        go(browser, f"{server.url}#/image/3", "tr[data-latent='6'] button.off")
        browser.find_element("css selector", "tr[data-latent='6'] button.off").click()
        then = "return document.querySelector('.steer [role=status]').textContent"
        wait(browser, f"{then}.includes('class 6')")
        assert asked == [("topk", 3, {6: 0.0})]
        pressed = "return document.querySelector('tr[data-latent=\"6\"] button').ariaPressed"
        assert browser.execute_script(pressed) == "true"
        browser.find_element("css selector", ".steer input[type=number]").send_keys("100", "\n")
        wait(browser, "return document.querySelectorAll('.steer .bars li input').length === 2")
        wait(browser, f"{then}.includes('class 6')")
        strongest = made_up().scale[100].max().item()
        assert asked[-1][2] == {6: 0.0, 100: pytest.approx(strongest, rel=0.01)}
        # Its link switches the same.
        link = browser.execute_script("return location.hash")
        assert link.startswith("#/image/3?set=6%3A0%2C100%3A")
        del asked[:]
        go(browser, f"{server.url}{link}", "tr[data-latent='6'] button.off")
        wait(browser, f"{then}.includes('class 6')")
        assert asked[0][2][6] == 0.0
        # A picture of one's own.
        (folder.parent / "cat.png").write_bytes(b"a picture")
        go(browser, f"{server.url}#/images", ".drop input")
        browser.find_element("css selector", ".drop input").send_keys(
            str(folder.parent / "cat.png")
        )
        wait(browser, "return document.querySelector('h1')?.textContent === 'Your picture'")
        assert asked[-1] == ("topk", b"a picture")
        assert browser.find_elements("css selector", "tr[data-latent='5']")
        assert browser.get_log("browser") == []
        server.shutdown()
