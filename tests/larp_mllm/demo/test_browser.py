"""The page of larp-mllm demo in headless Chromium."""

import importlib.util
import os
from pathlib import Path

from larp_mllm.demo.models import Models
from tests.larp_mllm.tiny import colourful_mllm

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def still():
    """docs/demo_still.py as a module; skips where a browser or a package is missing."""
    for package in ("gradio", "selenium"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("demo_still", ROOT / "docs/demo_still.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := module.missing():
        pytest.skip(f"{missing} not installed: apt-get install chromium chromium-driver")
    return module


@pytest.mark.slow
def test_a_prompt_is_typed_and_a_video_plays_and_a_broken_upload_gives_a_message(still, tmp_path, monkeypatch):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    colourful_mllm().save(tmp_path / "mllm")
    (tmp_path / "broken.mp4").write_text("hello")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from larp_mllm.demo.page import serve

    (tmp_path / "results").mkdir()
    with serve(Models(str(tmp_path / "mllm")), tmp_path / "results") as url, still.browser() as driver:
        driver.get(url)
        assert still.generate(driver, "a person surfing") > 0
        playing = "return document.querySelector('#generated-0 video').currentTime > 0"
        WebDriverWait(driver, 60).until(lambda _: driver.execute_script(playing))
        picture = os.environ.get("LARP_DEMO_PICTURE", str(tmp_path / "page.png"))
        driver.save_screenshot(picture)
        assert len(Image.open(picture).convert("RGB").getcolors(1 << 24)) > 100

        def tab(title: str) -> None:
            driver.find_element(By.XPATH, f"//button[@role='tab'][contains(., '{title}')]").click()

        tab("Reconstruct")
        still.found(driver, "#reconstruct")
        driver.find_element(By.CSS_SELECTOR, "#original input[type=file]").send_keys(str(tmp_path / "broken.mp4"))
        WebDriverWait(driver, 60).until(lambda _: list((tmp_path / "files").rglob("broken.mp4")))
        message = ""

        def shown(_) -> bool:
            nonlocal message
            driver.find_element(By.ID, "reconstruct").click()
            message = still.found(driver, "[data-testid=toast-body]", seconds=20).text
            return "broken.mp4: does not begin like a video file" in message

        WebDriverWait(driver, 60).until(shown, message)
        assert str(tmp_path) not in message
        driver.execute_script(
            "document.querySelectorAll('[data-testid=toast-close]').forEach(button => button.click())"
        )
        tab("Sample a class")
        # The generator of the package is there at once: its classes can be chosen.
        body = driver.find_element(By.TAG_NAME, "body").text
        assert "the one that comes with larp-mllm" in body and "training/train_generator.py" not in body
        tab("Text to video")
        before = driver.execute_script("return document.querySelector('#generated-0 video').currentSrc")
        still.generate(driver, "another prompt")
        WebDriverWait(driver, 120).until(
            lambda _: driver.execute_script("return document.querySelector('#generated-0 video').currentSrc") != before
        )
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded and not [name for name in loaded if not name.startswith((url, "blob:", "data:"))]
