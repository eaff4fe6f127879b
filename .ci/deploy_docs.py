"""Put the documentation of this checkout on the branch gh-pages, as the version that a branch or a tag stands for.

    python .ci/deploy_docs.py main      # dev
    python .ci/deploy_docs.py v1.2.3    # 1.2.3, and "latest" unless a later one is there

Before the first release "latest" is dev. The root leads to "latest", and has the page for wrong addresses, which GitHub
shows for every address that is not there. Pushing is left to the caller.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

BRANCH = "gh-pages"


def main(name: str) -> None:
    """Deploy, and set what the root shows."""
    subprocess.run(["git", "fetch", "--quiet", "origin", f"{BRANCH}:{BRANCH}"], capture_output=True)  # none at first
    version = version_of(name)
    known = [entry["version"] for entry in json.loads(shown("versions.json") or "[]")]
    aliases = ["latest"] if is_latest(version, known) else []
    run_mike("deploy", "--update-aliases", version, *aliases)
    if aliases:
        run_mike("set-default", "latest")
        put("404.html", shown(f"{version}/404.html"))


def version_of(name: str) -> str:
    """Of a branch or a tag."""
    if name == "main":
        return "dev"
    if not re.fullmatch(r"v\d+(\.\w+)*", name):
        raise SystemExit(f"no version: {name}; expected main, or a tag like v1.2.3")
    return name[1:]


def is_latest(version: str, known: list[str]) -> bool:
    """Whether "latest" leads to this one: the highest release, and dev until there is a release."""
    releases = [numbers(other) for other in known if re.fullmatch(r"[\d.]+", other)]
    if version == "dev":
        return not releases
    return re.fullmatch(r"[\d.]+", version) is not None and all(numbers(version) >= other for other in releases)


def numbers(version: str) -> list[int]:
    """To be compared."""
    return [int(number) for number in version.split(".")]


def run_mike(*arguments: str) -> None:
    """With the mike of this environment, which builds with mkdocs."""
    programs = Path(sys.executable).parent
    command = [str(programs / "mike"), arguments[0], "--branch", BRANCH, *arguments[1:]]
    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"})


def shown(path: str) -> str:
    """A file of the branch; nothing where it is not there."""
    found = subprocess.run(["git", "show", f"{BRANCH}:{path}"], capture_output=True, text=True, encoding="utf-8")
    return found.stdout if found.returncode == 0 else ""


def put(path: str, text: str) -> None:
    """A file into the root of the branch, by a commit of its own."""

    def git(*arguments: str, given: str | None = None) -> str:
        told = subprocess.run(
            ["git", *arguments], input=given, capture_output=True, text=True, encoding="utf-8", check=True
        )
        return told.stdout.strip()

    blob = git("hash-object", "-w", "--stdin", given=text)
    others = [line for line in git("ls-tree", BRANCH).splitlines() if line.partition("\t")[2] != path]
    tree = git("mktree", given="\n".join([*others, f"100644 blob {blob}\t{path}"]) + "\n")
    if tree != git("rev-parse", f"{BRANCH}^{{tree}}"):
        commit = git("commit-tree", tree, "-p", BRANCH, "-m", f"{path} of the latest version")
        git("update-ref", f"refs/heads/{BRANCH}", commit)


if __name__ == "__main__":
    main(sys.argv[1])
