"""Takes a picture of `larp-mllm demo`, eval/results/demo.png, in headless Chromium.

    python docs/demo_still.py --model runs/mllm --prompt "a person surfing"

Needs the extra `demo`, selenium, and Debian's packages chromium and chromium-driver.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1280, 840)
# A picture of so many colours stays under 150 kB.
COLOURS = 128
_DURATION = "const video = document.querySelector(arguments[0] + ' video'); return video ? video.duration : null"


def missing() -> str:
    """What a browser needs and is not installed; empty if nothing is missing."""
    return " and ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


@contextmanager
def browser() -> Iterator["Chrome"]:
    """Chromium without a window, which reaches no host but this one."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        *("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size={},{}".format(*SIZE)),
        *("autoplay-policy=no-user-gesture-required", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def found(driver: "Chrome", selector: str, seconds: float = 120):
    """The element of a CSS selector, as soon as it is shown."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import visibility_of_element_located
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, seconds).until(visibility_of_element_located((By.CSS_SELECTOR, selector)), selector)


def generate(driver: "Chrome", prompt: str, seconds: float = 300) -> float:
    """Type a prompt, press the button, and return the duration in seconds of the video that appears."""
    from selenium.webdriver.support.wait import WebDriverWait

    box = found(driver, "#prompt textarea")
    box.clear()
    box.send_keys(prompt)
    found(driver, "#generate").click()
    return WebDriverWait(driver, seconds).until(lambda _: driver.execute_script(_DURATION, "#generated-0"))


def main() -> None:
    """Serve the page, make a video, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a language model")
    parser.add_argument("--prompt", default="a person surfing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from larp_mllm.demo.models import Models
        from larp_mllm.demo.page import serve

        from PIL import Image

        with serve(Models(arguments.model), folder) as url, browser() as driver:
            driver.get(url)
            print(f"a video of {generate(driver, arguments.prompt, seconds=1200):.1f} s")
            time.sleep(2)
            driver.save_screenshot(f"{folder}/page.png")
        picture = Image.open(f"{folder}/page.png").convert("RGB").quantize(COLOURS)
        picture.save(ROOT / "eval/results/demo.png", optimize=True)


if __name__ == "__main__":
    main()
