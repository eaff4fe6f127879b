"""Look at the built site with a real browser, wide and narrow: what would make a reader close the tab?

    python docs/check_site.py                     # build/site, as `make docs` leaves it
    python docs/check_site.py --require-browser   # fail where there is none, instead of saying so
    python docs/check_site.py --screenshots build/screenshots

The site is served under a sub-path, as it will be. On every page nothing may be wider than the window but what scrolls
in a box of its own, at 1280 pixels no table may have to scroll, no picture and no link within the site may be broken,
and no code may be set as a quotation. The page for wrong addresses must have its style, and the search must find what
people look for. The browser is Playwright's own, or Chromium or Chrome of the machine.
"""

import argparse
import contextlib
import functools
import gzip
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag

from playwright.sync_api import Error, Page, Playwright, sync_playwright

ROOT = Path(__file__).parents[1]
SUB_PATH = "/gaussmask/"
WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SEARCHED = {  # by words of a reader, a page that must be among the first answers
    "Trainer": "integrations/",
    "lightning": "integrations/",
    "accelerate": "integrations/",
    "deepspeed": "integrations/",
    "peft": "integrations/",
    "notebook": "examples/flip_vs_glip/",
    "colab": "examples/flip_vs_glip/",
    "train_clip": "examples/train_clip/",
    "hf_clip": "examples/hf_clip/",
    "open_clip_glip": "examples/open_clip_glip/",
    "compare_methods": "examples/compare_methods/",
    "torchvision nms": "faq/",
    "CLIPVisionEmbeddings": "hosts/",
}
FIRST = 5

LOOK = """
() => {
  const scrolls = element => {
    for (let up = element; up && up !== document.body; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const name = element => `${element.tagName.toLowerCase()} ${element.textContent.trim().slice(0, 50)}`;
  const article = document.querySelector("article") || document.body;
  const width = document.documentElement.clientWidth;
  const wide = [...article.querySelectorAll("*")].filter(
    element => element.getBoundingClientRect().right > width + 1 && !scrolls(element)
  );
  return {
    page: document.documentElement.scrollWidth - width,
    wide: wide.map(name),
    scrolling: [...article.querySelectorAll(".md-typeset__scrollwrap")]
      .filter(box => box.scrollWidth > box.clientWidth + 1).map(name),
    pictures: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
    quotations: [...article.querySelectorAll("blockquote")].filter(quote => quote.querySelector("blockquote, code"))
      .map(name).concat([...article.querySelectorAll("p")].filter(text => /^>>> /.test(text.textContent)).map(name)),
    links: [...document.links].map(link => link.href),
    ids: [...document.querySelectorAll("[id]")].map(element => element.id),
  };
}
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site under the sub-path, with its own page for wrong addresses, and nothing on the terminal."""

    def translate_path(self, path: str) -> str:
        if not path.startswith(SUB_PATH):
            return str(Path(self.directory) / "nothing-here")
        return super().translate_path("/" + path.removeprefix(SUB_PATH))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        page = (Path(self.directory) / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site, while it is served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{SUB_PATH}"
    finally:
        server.shutdown()
        server.server_close()


def find_browser(playwright: Playwright) -> str | None:
    """The path of a browser."""
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)


def pages_of(site: Path) -> list[str]:
    """The addresses of all pages, below the site's."""
    return sorted(path.parent.relative_to(site).as_posix() + "/" for path in site.rglob("index.html"))


def look_at_pages(page: Page, address: str, site: Path, screenshots: Path | None) -> list[str]:
    """What is wrong with the pages."""
    wrong: list[str] = []
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    for name in (name.removeprefix("./") for name in pages_of(site)):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address + name)
            page.evaluate("document.querySelectorAll('img').forEach(image => (image.loading = 'eager'))")
            page.wait_for_load_state("networkidle")
            seen = page.evaluate(LOOK)
            where = f"{name or 'index'} at {width} px"
            if seen["page"] > 1:
                wrong.append(f"{where}: the page is {seen['page']} px wider than the window")
            wrong += [f"{where}: {thing} is wider than the window" for thing in seen["wide"][:3]]
            if width == max(WIDTHS):
                wrong += [f"{where}: a table has to be scrolled: {thing}" for thing in seen["scrolling"]]
            wrong += [f"{where}: the picture {picture} is not there" for picture in seen["pictures"]]
            wrong += [f"{where}: code set as a quotation: {thing}" for thing in seen["quotations"]]
            if screenshots is not None:
                file = f"{name.strip('/').replace('/', '-') or 'index'}-{width}.png"
                page.screenshot(path=screenshots / file, full_page=True)
        ids[address + name] = set(seen["ids"])
        links[name] = {link for link in seen["links"] if link.startswith(address)}
    for name, targets in links.items():
        for target in sorted(targets):
            place, anchor = urldefrag(target)
            place = place.removesuffix("index.html")
            if place not in ids and not (site / unquote(place.removeprefix(address))).is_file():
                wrong.append(f"{name or 'index'}: the link to {place} leads nowhere")
            elif anchor and not anchor.startswith("__") and unquote(anchor) not in ids.get(place, {unquote(anchor)}):
                wrong.append(f"{name or 'index'}: {place} has no #{anchor}")
    return wrong


def look_at_wrong_address(page: Page, address: str) -> list[str]:
    """Whether the page for wrong addresses, at any depth, looks like the others."""
    for wrong in ("nothing/", "deep/down/there/"):
        answer = page.goto(address + wrong)
        header = page.locator(".md-header")
        if answer is None or answer.status != 404 or not header.count():
            return [f"{wrong} does not show the page for wrong addresses"]
        if header.evaluate("element => getComputedStyle(element).position") != "sticky":
            return [f"{wrong}: the page for wrong addresses has no style"]
    return []


def look_things_up(page: Page, address: str) -> list[str]:
    """What the search does not find."""
    wrong = []
    page.set_viewport_size({"width": max(WIDTHS), "height": 900})
    for words, wanted in SEARCHED.items():
        page.goto(f"{address}?q={words}")
        found: list[str] = []
        with contextlib.suppress(Error):  # nothing found is an answer
            page.wait_for_selector(".md-search-result__item", timeout=10_000)
            found = page.eval_on_selector_all(
                ".md-search-result__item", "items => items.map(item => item.querySelector('a').href)"
            )
        pages = [link.removeprefix(address).partition("?")[0].partition("#")[0] for link in found]
        if wanted not in pages[:FIRST]:
            wrong.append(f"the search for {words!r} finds {pages[:FIRST]}, and not {wanted}")
    return wrong


def look_at_sitemap(site: Path) -> list[str]:
    """Whether the sitemap names every page."""
    sitemap = (site / "sitemap.xml").read_text(encoding="utf-8")
    packed = gzip.decompress((site / "sitemap.xml.gz").read_bytes()).decode()
    missing = [name for name in pages_of(site) if name != "./" and f"/{name}</loc>" not in sitemap]
    return [f"the sitemap leaves out {name}" for name in missing] + ["sitemap.xml.gz is another"] * (packed != sitemap)


def main() -> None:
    """Look, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=ROOT / "build" / "site")
    parser.add_argument("--require-browser", action="store_true")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of every page")
    given = parser.parse_args()
    if given.screenshots is not None:
        given.screenshots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, served(given.site) as address:
        browser = find_browser(playwright)
        if browser is None:
            said = f"no browser: neither {', '.join(BROWSERS)} nor Playwright's own (playwright install chromium)"
            sys.exit(said) if given.require_browser else print(f"The site was not looked at: {said}")
            return
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = window.new_page()
        wrong = look_at_sitemap(given.site) + look_at_pages(page, address, given.site, given.screenshots)
        wrong += look_at_wrong_address(page, address) + look_things_up(page, address)
        window.close()
    print("\n".join(wrong) or f"{len(pages_of(given.site))} pages look right at {' and '.join(map(str, WIDTHS))} px")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
