"""The pages say what is so: links lead somewhere, names exist, every Python block runs, every command can be called."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright
from tests.docs_setup import SETUP
from tilewright.__main__ import main as command_line
from tilewright.autotune import TUNABLES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/results/README.md", "findings/README.md")
]
PAGES += sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
PACKAGE_FOLDERS = "aot|autotune|backend|commands|convert|deploy|kernels|nn"
REPOSITORY_PATH = re.compile(rf"(?:bench|docs|examples|findings|tests|tilewright|{PACKAGE_FOLDERS})/[\w./*]*")
DOTTED_NAME = re.compile(r"(?:tw|tilewright)(?:\.\w+)+")
#: Only looked at where a C++ compiler is: Inductor needs one.
NEED_A_COMPILER = {"torch_compile.md"}
SLOW = {"torch_compile.md"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path, own: Path | None = None) -> list[str]:
    """Links of a page in ``folder`` to files or anchors that are not there. Links to other sites are not looked at."""
    broken = []
    for link in (a or b for a, b in LINK.findall(prose(text))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else own
        there = target is not None and target.exists()
        if not there or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page.parent, page) == []


def test_a_broken_link_is_found() -> None:
    text = (
        "# A: b\n[x](no.md) [y](README.md#no) [z](#a-b) [w](https://example.org/no) ![p](no.png) [q](README.md#limits)"
    )
    assert broken_links(text, ROOT, None) == ["no.md", "README.md#no", "#a-b", "no.png"]


def missing_names(text: str) -> list[str]:
    """What stands in backquotes and looks like a file, a command or a public name of ours, and is none."""
    missing = []
    for code in INLINE_CODE.findall(prose(text)):
        if REPOSITORY_PATH.fullmatch(code):
            bases = (ROOT, ROOT / "tilewright")
            if not any((base / code).exists() or any(base.glob(code)) for base in bases):
                missing.append(code)
        elif DOTTED_NAME.fullmatch(code.split("(")[0]) and not code.endswith((".json", ".md")):
            if not resolves(code.split("(")[0].replace("tw.", "tilewright.", 1)):
                missing.append(code)
        elif code.startswith(("make ", "python ", "tilewright ")):
            missing += [reason] if (reason := why_not_callable(code)) else []
    return missing


def resolves(dotted: str) -> bool:
    value: Any = tilewright
    for part in dotted.split(".")[1:]:
        if not hasattr(value, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{value.__name__}.{part}")
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def why_not_callable(line: str) -> str | None:
    """Why a line of shell cannot be what somebody types in the repository's root, or None."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if not words:
        return None
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return next((f"{line}: no target {word}" for word in rest if word not in targets), None)
    if program == "bash":
        return None if rest and (ROOT / rest[0]).is_file() else f"{line}: no file"
    if program.split("/")[-1] in ("python", "python3"):
        if rest[:1] == ["-m"]:
            if rest[1] in ("pip", "pytest", "venv"):
                return None
            found = importlib.util.find_spec(rest[1])
            return None if found else f"{line}: no module {rest[1]}"
        if rest[:1] == ["-c"]:
            return None
        return None if rest and (ROOT / rest[0]).exists() else f"{line}: no file"
    if program == "tilewright":
        if not rest or rest[0].isupper():
            return None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                command_line([rest[0], "--help"])
        except SystemExit as stopped:
            return f"{line}: no such command" if stopped.code else None
        return None
    if program.split("/")[-1] in ("pip", "cd", "export", "git"):
        return None
    return f"{line}: {program} is not known here"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_what_pages_name_exists(page: Path) -> None:
    assert missing_names(page.read_text(encoding="utf-8")) == []


def test_a_missing_name_is_found() -> None:
    wrong = ["tests/no.py", "make no", "python -m bench.no", "tw.no", "tilewright no", "kernels/no/*.py"]
    right = ["tests/test_docs.py", "make test", "tw.convert_model(model)", "kernels/*/reference.py", "some/other/path"]
    assert len(missing_names(" ".join(f"`{name}`" for name in wrong + right))) == len(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_shell_blocks_can_be_typed(page: Path) -> None:
    for block in blocks(page, "sh"):
        if shutil.which("bash"):
            checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stderr
        joined = block.replace("\\\n", " ")
        assert [reason for line in joined.splitlines() if (reason := why_not_callable(line))] == []


def only_python(text: str) -> Iterator[tuple[int, str]]:
    """(line of the page, source) of each Python block."""
    for found in FENCE.finditer(text):
        if found[1] == "python":
            yield text[: found.start(2)].count("\n"), found[2]


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run the Python blocks of a page from top to bottom in one namespace, before each the page's set-up.

    Each is run from a file whose line numbers are the page's: Triton reads the source of its kernels.
    """
    text = page.read_text(encoding="utf-8")
    setup = SETUP.get(page.name, "")
    space: dict[str, Any] = {"__name__": f"snippets.{page.stem}", "tw": tilewright}
    for line, block in only_python(text):
        source = folder / f"{page.stem}_{line}.py"
        source.write_text("\n" * line + block, encoding="utf-8")
        exec(compile(setup, f"set-up of {page.name}", "exec"), space)
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), space)
    return space


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name != "CONTRIBUTING.md"]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW), id=name_of(page)) for page in PYTHON_PAGES],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of CONTRIBUTING are the plugin package of ``test_plugins.py``."""
    needs = {"README.md": "transformers", "ahead-of-time.md": "triton", "emulator.md": "triton"}
    needs |= {"calibration.md": "transformers", "autotune.md": "triton", "torch_compile.md": "onnxscript"}
    if page.name in needs:
        pytest.importorskip(needs[page.name], reason=f"the page is about what needs {needs[page.name]}")
    if page.name in NEED_A_COMPILER and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler")
    if "tilewright" not in torch._dynamo.list_backends():  # not installed anew since it has an entry point
        torch._dynamo.register_backend(compiler_fn=tilewright.backend.tilewright, name="tilewright")
    monkeypatch.chdir(tmp_path)
    try:
        run_page(page, tmp_path)
    finally:
        TUNABLES.pop(f"snippets.{page.stem}", None)
    if page.name == "torch_compile.md":
        assert {each.name for each in tmp_path.iterdir()} >= {"model.export.pt2", "model.pt2", "model.onnx"}


def test_every_page_is_in_the_index_or_the_reference() -> None:
    listed = {(DOCS / (a or b).partition("#")[0]).resolve() for a, b in LINK.findall((DOCS / "README.md").read_text())}
    assert {page for page in DOCS.glob("*.md") if page.name != "README.md"} <= listed


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: docs)")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", "docs", "-W", "--keep-going", "-q", ".", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Replace the layers of" in (site / "docs" / "api" / "convert.html").read_text(encoding="utf-8")
