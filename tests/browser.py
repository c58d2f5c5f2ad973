"""A page in a headless Chromium (Qt WebEngine, `pip install '.[browser]'`), where there is one.

Run as a module: `python -m tests.browser PAGE SCRIPT [SCREENSHOT [DARK [WIDTHxHEIGHT]]]` prints
what the script (the body of an async function) returns, and what the console said, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"


def in_browser(page: Path, script: str, *more: str) -> dict[str, Any]:
    """{"value": what the script returned, "console": [...], "milliseconds": to load}.

    Skips the test where Qt is not installed or lacks a library of the system.
    """
    load = [sys.executable, "-c", "import PyQt6.QtWebEngineWidgets"]
    loaded = subprocess.run(load, capture_output=True, text=True)
    if loaded.returncode != 0:
        pytest.skip(f"no browser: {loaded.stderr.strip().splitlines()[-1]}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.browser", str(page), script, *more],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _main(page: str, script: str, screenshot: str = "", dark: str = "", size: str = "") -> None:
    flags = f"{_FLAGS} --blink-settings=preferredColorScheme={0 if dark else 1}"
    os.environ.update(
        QT_QPA_PLATFORM="offscreen", QT_QUICK_BACKEND="software", QTWEBENGINE_CHROMIUM_FLAGS=flags
    )
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    console: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, *_: Any) -> None:  # noqa: N802
            console.append(message)

    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.setPage(Page(view))
    width, _, height = (size or "1400x900").partition("x")
    view.resize(int(width), int(height))
    view.show()
    found: dict[str, Any] = {}

    def finish() -> None:
        if screenshot:
            view.grab().save(screenshot)
        print(json.dumps({**found, "console": console}))
        app.quit()

    def poll() -> None:
        def receive(text: str | None) -> None:
            if not text:
                QTimer.singleShot(50, poll)
                return
            found.update(json.loads(text))
            QTimer.singleShot(600 if screenshot else 0, finish)

        view.page().runJavaScript("window.__found || ''", receive)

    def loaded(ok: bool) -> None:
        assert ok, f"{page} does not load"
        timing = "performance.getEntriesByType('navigation')[0]"
        view.page().runJavaScript(
            f"(async () => {{ {script} }})().then("
            f"value => [value, null], error => [null, String(error.stack || error)]).then("
            "([value, error]) => { window.__found = JSON.stringify({value: value ?? null, error, "
            f"milliseconds: {timing}.domComplete}}) }})"
        )
        poll()

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    QTimer.singleShot(60_000, lambda: app.exit(1))
    sys.exit(app.exec())


if __name__ == "__main__":
    _main(*sys.argv[1:])
