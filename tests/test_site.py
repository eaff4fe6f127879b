"""The site of the documentation: the pages that are made for it, its versions, and what the browser's check sees."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mkdocs", reason="needs the dependency group docs")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
deploy = runpy.run_path(str(ROOT / ".ci" / "deploy_docs.py"))


# The pages


@pytest.fixture(scope="module")
def settings():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def test_every_program_and_the_notebook_are_in_the_navigation(settings):
    import site_pages

    named = str(settings["nav"])
    assert {"train_clip.py", "hf_clip.py"} <= set(site_pages.PROGRAMS)
    assert all(site_pages.page_of(name) in named for name in (*site_pages.PROGRAMS, site_pages.NOTEBOOK.name))


def test_the_page_of_a_program_has_its_first_lines_its_options_and_where_more_about_it_stands():
    import site_pages

    readme = "# All\n\n## Big runs\n\nTake `train_clip.py`.\n\n### Slurm, say\n\nhf_clip.py"
    page = site_pages.program_page("train_clip.py", "options\n--epochs", readme)
    assert page.startswith("# train_clip.py\n\n")
    assert "[Big runs](index.md#big-runs)" in page
    assert "slurm" not in page.partition("\n\n[Source]")[2].partition("\n")[0]
    assert "torchrun --standalone" in page
    assert page.endswith("```text\noptions\n--epochs\n```\n")


def test_links_of_the_examples_lead_to_pages_of_the_site_or_to_the_repository():
    import site_pages

    text = "[a](train_clip.py) [b](../docs/claims.md#x) [c](clip_step.py) [d](#here) [e](https://x.org) ![f](a.png)"
    changed = site_pages.with_links(text.replace("a.png", "cifar10_curves.png"), ROOT / "examples")
    source = f"{site_pages.SOURCE}/examples/clip_step.py"
    wanted = f"[a](train_clip.md) [b](../claims.md#x) [c]({source}) [d](#here) [e](https://x.org)"
    assert changed == f"{wanted} ![f](cifar10_curves.png)"


def test_programs_tell_their_options():
    import site_help

    said = subprocess.run(
        [sys.executable, site_help.__file__, "run_notebook.py"], capture_output=True, text=True, check=True
    ).stdout
    assert "--in-place" in said
    assert str(ROOT) not in said


def test_names_lead_to_the_api_and_to_the_repository():
    import site_links
    from mkdocs.structure.files import Files

    def target(text):
        return site_links.target_of(text, Files([]))

    assert target("gaussmask.attach(model, drop)") == "api/#gaussmask.attach.attach"
    assert target("functional.keep_probability") == "api/#gaussmask.functional.keep_probability"
    assert target("gaussmask.plot.compare_drops(image, drops)") == "api/#gaussmask.plot.compare_drops"
    assert target("tests/test_oracle.py") == f"{site_links.REPOSITORY}/blob/main/tests/test_oracle.py"
    assert target("tests/nothing.py") is None
    assert target("model.train()") is None


def test_cells_of_a_table_that_folds_have_the_heads_of_their_columns():
    import site_links

    row = "<tr><td>CLIPVisionEmbeddings</td><td>1</td></tr>"
    table = f"<table><tr><th>family</th><th>kept</th></tr>{row}</table>"
    assert site_links._foldable(table).count('data-head="kept">1<') == 1
    assert 'data-head="family">CLIPVision<wbr>Embeddings<' in site_links._foldable(table)


def test_the_speed_ups_in_a_sentence_are_those_of_the_tables():
    text = " ".join((ROOT / "docs" / "performance.md").read_text("utf-8").split())
    said = re.search(r"On an H200 these are (.*?) times\. The ceiling", text)[1]
    found = []
    for name in ("h200-clip", "cpu-clip"):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))["rows"]
        found += [
            f"{row['speed_up']:.2f}" for row in rows if row["contender"] == "gaussmask pixels" and "speed_up" in row
        ]
    assert re.findall(r"\d\.\d\d", said) == found


# The versions


def test_which_version_is_the_latest():
    version_of, is_latest = deploy["version_of"], deploy["is_latest"]
    assert [version_of(name) for name in ("main", "v1.2.3", "v2.0.0rc1")] == ["dev", "1.2.3", "2.0.0rc1"]
    assert is_latest("dev", ["dev"])
    assert not is_latest("dev", ["dev", "0.1.0"])
    assert is_latest("0.10.0", ["dev", "0.9.1"])
    assert not is_latest("0.9.2", ["dev", "0.10.0"])
    assert not is_latest("1.0.0rc1", ["dev", "0.10.0"])
    with pytest.raises(SystemExit, match="no version: feature"):
        version_of("feature")


def test_versions_lie_beside_each_other_and_the_root_leads_to_the_latest(tmp_path, monkeypatch):
    pytest.importorskip("mike")
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Here\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nsite_url: https://example.org/x/\ntheme: {name: material}\n")

    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout

    git("init", "--initial-branch", "main")
    git("add", ".")
    git("commit", "--message", "x")
    deploy["main"]("main")
    assert git("show", "gh-pages:latest") == "dev"
    assert "/x/dev/assets/" in git("show", "gh-pages:404.html")
    deploy["main"]("v1.2.3")
    deploy["main"]("main")
    assert git("show", "gh-pages:latest") == "1.2.3"
    assert "/x/1.2.3/assets/" in git("show", "gh-pages:404.html")
    assert "latest/" in git("show", "gh-pages:index.html")
    assert set(git("ls-tree", "--name-only", "gh-pages").split()) >= {"1.2.3", "dev", "latest", "versions.json"}


# The check in a browser


@pytest.fixture(scope="module")
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    import check_site

    with sync_api.sync_playwright() as playwright:
        browser = check_site.find_browser(playwright)
        if browser is None:
            pytest.skip("needs a browser")
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield window.new_page()
        window.close()


GOOD = '<div style="overflow: auto"><div style="width: 2000px">wide</div></div><a href="">here</a><h2 id="there">x</h2>'
FAULTS = {
    '<div style="width: 2000px">wide</div>': "div wide is wider than the window",
    '<img src="nothing.png">': "nothing.png is not there",
    '<a href="nothing/">x</a>': "the link to ",
    '<a href="#nowhere">x</a>': "has no #nowhere",
    "<blockquote><blockquote><p>drop = 1</p></blockquote></blockquote>": "code set as a quotation",
    '<div class="md-typeset__scrollwrap" style="overflow: auto"><div style="width: 2000px">x</div></div>': "scrolled",
}


@pytest.mark.parametrize(("fault", "said"), [("", None), *FAULTS.items()], ids=lambda value: str(value)[:20])
def test_the_check_sees_what_is_wrong_with_a_page(fault, said, page, tmp_path):
    import check_site

    (tmp_path / "index.html").write_text(f"<!DOCTYPE html><body><article>{GOOD}{fault}</article></body>")
    (tmp_path / "404.html").write_text("<!DOCTYPE html><body>wrong</body>")
    with check_site.served(tmp_path) as address:
        wrong = check_site.look_at_pages(page, address, tmp_path, None)
        assert check_site.look_at_wrong_address(page, address)
    if said is None:
        assert wrong == []
    else:
        assert any(said in line for line in wrong), wrong


def test_the_check_says_that_there_is_no_browser(tmp_path):
    pytest.importorskip("playwright.sync_api")
    without = {**os.environ, "PATH": "", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "docs" / "check_site.py"), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=without)
    assert "was not looked at: no browser" in told.stdout
    told = subprocess.run([*command, "--require-browser"], capture_output=True, text=True, env=without)
    assert told.returncode == 1
    assert "no browser" in told.stderr
