"""Draw the README's picture: the report of the newest quick-start run, as headless Chromium shows it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    reports = sorted(ROOT.glob("runs/quickstart-*/report.html"), key=lambda path: path.stat().st_mtime)
    if chromium is None or not reports:
        missing = "no chromium (apt-get install chromium)" if chromium is None else "no report (make quickstart)"
        print(f"error: {missing}", file=sys.stderr)
        return 42
    with tempfile.TemporaryDirectory() as profile:
        target = ROOT / "docs" / "report.png"
        size = "--window-size=1200,1500"
        where = (f"--user-data-dir={profile}", f"--screenshot={target}", size, reports[-1].as_uri())
        subprocess.run([chromium, *QUIET, *where], check=True, capture_output=True, timeout=60)
    print(f"drew {target} from {reports[-1].parent.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
