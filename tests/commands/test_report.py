"""openelm report: where the page is, and what is no run."""

import json
import webbrowser
from pathlib import Path

import pytest

from openelm import cli


def test_the_page_is_written_and_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    (tmp_path / "config.yaml").write_text("name: small\n")
    records = [{"kind": "train", "step": step, "loss": 3.0 / step, "lr": 0.1} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.run(["report", str(tmp_path)]) == 0
    page = tmp_path / "report" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().count("</html>") == 1
    assert opened == []
    assert cli.run(["report", str(tmp_path), "--open"]) == 0
    assert opened == [page.as_uri()]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
