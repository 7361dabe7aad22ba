"""The matrix's page in a real browser: sort, filter, ask, open a cell; by mouse and by keyboard. Needs Chromium."""

import shutil
from pathlib import Path

import pytest
from test_matrix_numbers import derived

from gateskip_compress.report.matrix import write_matrix

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A driven Chromium with the page loaded; at the end nothing may stand in its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("page")
    report = derived(["perplexity_ratio <= 1.15 and decode_speedup >= 2"], orders="light")
    path = write_matrix(report, folder)["report.html"]
    options = webdriver.ChromeOptions()
    options.binary_location = str(Path(chromium).resolve())
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get(path.as_uri())
        yield browser
        assert browser.get_log("browser") == []
    finally:
        browser.quit()


def of(page, selector):
    return page.find_elements("css selector", selector)


def shown(page):
    """Names of the rows to be seen, in order."""
    rows = of(page, "#cells tbody tr")
    return [row.find_element("css selector", ".open").text for row in rows if row.is_displayed()]


def fill(page, metric, text):
    field = of(page, f"#finder [data-metric={metric}]")[0]
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, text
    )


def test_headings_sort_both_ways_and_say_so(page):
    head = of(page, "#cells th[data-key=decode_speedup]")[0]
    button = head.find_element("css selector", "button")
    button.click()
    assert head.get_attribute("aria-sort") == "descending"  # more is better
    names = shown(page)
    assert names[0] == "gateskip + quantize + self_speculation"
    button.send_keys("\ue007")  # Enter
    assert head.get_attribute("aria-sort") == "ascending"
    assert shown(page) == names[::-1] or shown(page)[0] == "original"
    assert len(of(page, "#cells th[aria-sort]")) == 1


def test_filters_leave_what_they_say(page):
    assert "self_speculation" not in shown(page)  # refused ones are hidden at first
    of(page, "#tools [value=prune]")[0].click()
    assert sorted(shown(page)) == ["prune", "prune + quantize"]
    assert of(page, "#count")[0].text.startswith("2 of ")
    of(page, "#clear")[0].click()
    page.execute_script("document.getElementById('show').value = 'missed'")
    of(page, "#find")[0].send_keys("float weights")
    assert "quantize + prune" in shown(page)
    of(page, "#clear")[0].click()
    assert "original" in shown(page)


def test_limits_are_answered_as_they_are_typed(page):
    take = of(page, "#take")[0]
    assert take.text.startswith("Take gateskip + self_speculation, light")  # the report's own goal
    fill(page, "decode_speedup", "3")
    assert take.text.startswith("Take gateskip + quantize + self_speculation") or "quantize" in take.text
    fill(page, "perplexity_ratio", "0")
    assert take.text.startswith("No stack here meets this. Nearest: ")
    fill(page, "perplexity_ratio", "")
    fill(page, "decode_speedup", "")
    assert take.text.startswith("Fill in what matters")
    fill(page, "perplexity_ratio", "15")
    fill(page, "decode_speedup", "2")


def test_a_cell_opens_by_mouse_and_keyboard_and_closes_by_escape(page):
    dialog = of(page, "#cell")[0]
    row = next(
        row for row in of(page, "#cells tbody tr") if row.text.startswith("P\nQ") or "prune + quantize" in row.text
    )
    row.find_elements("css selector", "td")[1].click()
    assert dialog.is_displayed()
    assert "prune + quantize" in of(page, "#cell-name")[0].text
    assert "gateskip run " in of(page, "#cell-body pre")[0].text
    assert "bits: 4" in of(page, "#cell-body")[0].text
    page.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert not dialog.is_displayed()
    of(page, "#cells tbody tr .open")[0].send_keys("\ue007")
    assert dialog.is_displayed()
    of(page, "#close")[0].click()
    assert not dialog.is_displayed()
    page.execute_script("document.querySelector('.dot').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert dialog.is_displayed()
    of(page, "#close")[0].click()


def test_a_phone_scrolls_only_the_tables(page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
