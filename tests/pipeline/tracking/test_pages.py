"""What a person sees: the pages of MLflow and the report of a finished run, in a real browser.

Each test takes a picture, in the directory MEGABASE_PICTURES if that is set: look at them after changes.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.sync import Sync
from tests.conftest import train_settings
from tests.pipeline.tracking.servers import Server
from tests.processes import Job

pytestmark = pytest.mark.distributed

CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
# Milliseconds until a page of MLflow has drawn what is waited for, on a busy machine.
WAIT_MS = 120_000


@dataclass
class Trained:
    """A finished run in MLflow.

    Attributes:
        directory: the run directory.
        page: of the run.
        model: page of its model.
    """

    directory: Path
    page: str
    model: str


@dataclass
class Tab:
    """A page in the browser, and the errors that it reported."""

    page: Any
    pictures: Path
    errors: list[str] = field(default_factory=list)

    def open(self, address: str, *texts: str) -> str:
        """Open a page; returns its text once it has all of `texts`."""
        self.page.goto(address)
        self.page.wait_for_function(
            "texts => texts.every(text => document.body.innerText.includes(text))",
            arg=list(texts),
            timeout=WAIT_MS,
        )
        return str(self.page.inner_text("body"))

    def picture(self, name: str) -> None:
        """Take a picture."""
        path = self.pictures / f"{name}.png"
        if (assistant := self.page.get_by_role("button", name="Close")).count():
            assistant.first.click()  # MLflow's chat, which takes a quarter of the page
        self.page.screenshot(path=path)
        assert path.stat().st_size > 10_000


@pytest.fixture(scope="module")
def trained(server: Server, lambda_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A real training of one rank, which sends its model."""
    root = tmp_path_factory.mktemp("pages")
    more = ["trainer.devices=1", "trainer.max_steps=10", "trainer.eval_every_steps=5", "tracking.report=true"]
    tracking = [f"tracking.uri={server.uri}", "tracking.register=phage-model"]
    job = Job("train", *train_settings(lambda_shards, root, "phage", *more, *tracking), cwd=root)
    code, messages = job.wait()
    assert code == 0, messages
    sync = Sync(root / "phage")
    sync.once()  # if MLflow took longer than the end of the training waits
    known = sync.sender.identity.read()
    page = sync.address()
    return Trained(root / "phage", page, re.sub("runs/.*[?]", f"models/{known['model']['id']}?", page))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A browser without a window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium or Chrome on this machine")
    driver = pytest.importorskip("playwright.sync_api")
    pictures = Path(os.environ.get("MEGABASE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    with driver.sync_playwright() as playwright:
        # Chromium's sandbox does not work in containers, and the pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        made = Tab(browser.new_page(viewport={"width": 1280, "height": 900}), pictures)
        made.page.on("pageerror", lambda error: made.errors.append(str(error)))
        made.page.on(
            "console", lambda message: made.errors.append(message.text) if message.type == "error" else None
        )
        yield made
        browser.close()


def test_the_page_of_the_run(tab: Tab, trained: Trained) -> None:
    about = ("Finished", "megabase train", "shards/train", "phage-model")
    metrics = ("train/loss", "valid/bits_per_base", "speed/tokens_per_second", "memory/peak_bytes")
    text = tab.open(trained.page, *about, *metrics, "checkpoint/seconds", "lsh/layer_1_balance")
    assert re.search(r"system/\S+/cpu_percent", text)
    tab.picture("mlflow-run")
    files = ("report.html", "checkpoints.json", "config.yaml", "packages.txt", "pictures")
    tab.open(trained.page.replace("?", "/artifacts?"), *files)


def test_the_page_of_the_model(tab: Tab, trained: Trained) -> None:
    tab.open(trained.model, "Ready", "phage", "shards/valid", "valid/bits_per_base", "phage-model")
    tab.picture("mlflow-model")


def test_the_report(tab: Tab, trained: Trained) -> None:
    tab.errors.clear()
    text = tab.open(RunPaths(trained.directory).report.as_uri(), "Loss", "Settings")
    assert "finished, step 10" in text and "Use of the context" in text
    widths = tab.page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) >= 6 and min(widths) > 800
    # Nothing is wider than the window, and nothing is reported as an error.
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert not tab.errors
    tab.picture("report")
