import json
from html.parser import HTMLParser

import pytest

from gateskip_compress.report import summary_rows, write_report

STAGE = {
    "name": "original",
    "settings": {},
    "seconds": None,
    "perplexity": 12.345,
    "perplexity_low": 11.0,
    "perplexity_high": 14.0,
    "kl_nats": None,
    "top1_agreement": None,
    "macs_per_token": 134_500_000,
    "macs_share": 1.0,
    "prefill_tokens_per_s": 500.0,
    "decode_tokens_per_s": 20.0,
    "peak_bytes": 1_500_000_000,
    "disk_bytes": 538_000_000,
}
SMALL = {**STAGE, "name": "quantize", "settings": {"bits": 4}, "perplexity": 15.5, "kl_nats": 0.25, "macs_share": 0.875}
REPORT = {
    "command": "gateskip run r.yaml --out x",
    "environment": {"package": "0", "python": "3", "torch": "2", "transformers": "5", "device": "cpu", "threads": 2}
    | {"dtype": "float32", "date": "2026-01-01"},
    "original": {"source": "a <script>alert(1)</script> model", "family": "llama", "parameters": 134_515_008},
    "evaluation": {"text": "t.jsonl", "tokens": 4088, "window_tokens": 512, "note": ""},
    "calibration": {"text": "self", "tokens": 16384, "seconds": 90.0},
    "stages": [STAGE, {**SMALL, "disk_bytes": 182_000_000, "decode_tokens_per_s": 10.0, "top1_agreement": 0.8}],
    "bench": {"prompt_tokens": 512, "new_tokens": 32, "runs": 3, "batch": 1},
    "curve": [{"budget": 0.9, "macs_share": 0.9, "perplexity": 14.0, "kl_nats": 0.1, "top1_agreement": 0.9}],
    "speculation": None,
    "samples": [{"prompt": "<b>?", "original": "x", "compressed": "y"}],
    "notes": ["a note"],
}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_html_escapes_and_loads_nothing(tmp_path):
    html = write_report(REPORT, tmp_path)["report.html"].read_text()
    tags = Tags()
    tags.feed(html)
    assert not any(tag in ("script", "link", "img") for tag, _ in tags.seen)
    assert not any("src" in attrs for _, attrs in tags.seen)
    assert sum(tag == "tr" for tag, _ in tags.seen) == 1 + 2 + 1 + 1
    assert "slower" in html


def test_markdown_has_units_and_shows_the_unknown(tmp_path):
    text = write_report(REPORT, tmp_path)["report.md"].read_text()
    row = next(line for line in text.splitlines() if line.startswith("| original"))
    assert "12.35 (11.00–14.00) | – | –" in row or "12.34 (11.00–14.00) | – | –" in row
    assert "100.0 %" in row
    assert "182 MB (3.0 × smaller)" in text
    assert "20.0 to 10.0 tokens/s (2.00 × slower)" in text


def test_json_is_what_was_given_and_pictures_are_whole(tmp_path):
    paths = write_report(REPORT, tmp_path)
    assert json.loads(paths["report.json"].read_text()) == REPORT
    assert paths["quality.png"].read_bytes().startswith(b"\x89PNG")
    assert paths["quality.svg"].read_text().rstrip().endswith("</svg>")


def test_a_failure_leaves_older_files_alone(tmp_path):
    paths = write_report(REPORT, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report({**REPORT, "notes": [object()]}, tmp_path)
    assert {path.name: path.read_bytes() for path in paths.values()} == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_rows_for_the_terminal():
    assert summary_rows(REPORT)[1].cells == ("quantize", "15.50", "87.5 %", "182", "500", "10.0")
