"""The report as PDF, printed by a Chromium or Chrome of this machine, where it has one."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rankscope.errors import MissingExtraError, StudyDirectoryError

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
TIMEOUT_SECONDS = 120


def find_browser() -> str:
    """Path of a browser that prints. Raises MissingExtraError: there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        todo = "Install one of them, or open report/index.html in any browser and print it."
        raise MissingExtraError("--pdf: neither Chromium nor Chrome is on PATH", todo)
    return found


def print_pdf(page: Path) -> bytes:
    """The page as PDF, printed without its scripts: what is printed is what lies in the page. Raises MissingExtraError:
    there is no browser; StudyDirectoryError: the browser printed nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy, printed = Path(folder, "page.html"), Path(folder, "report.pdf")
        source = page.read_text(encoding="utf-8")
        copy.write_text(re.sub(r"<script\b.*?</script>", "", source, flags=re.DOTALL), encoding="utf-8")
        command = [find_browser(), "--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={folder}"]
        command += ["--disable-dev-shm-usage", f"--print-to-pdf={printed}", copy.as_uri()]
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium's sandbox refuses root, as in most containers
            command.insert(1, "--no-sandbox")
        try:
            said = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS).stderr.decode(errors="replace")
        except subprocess.TimeoutExpired:
            said = f"no answer within {TIMEOUT_SECONDS} s"
        if printed.exists():
            return printed.read_bytes()
        reason = said.strip().rpartition("\n")[2] or "it said nothing"
        raise StudyDirectoryError(f"{command[0]} printed nothing: {reason}", f"Open {page} in a browser and print it.")
