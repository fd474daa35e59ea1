"""Build the documentation site in build/site: `python -m tools.docs`.

The pages in docs/ read right on GitHub, where links to sources lead to files of the repository. The site has no such
files, so its pages are written anew in build/docs: a source that is linked to becomes a page, a link to a name in it
leads to the line that defines it, and an entry of the reference becomes what mkdocstrings renders.

As an extension of Markdown, this module turns equations into MathML, which browsers render natively.
"""

import ast
import html
import os
import re
import shutil
from pathlib import Path
from typing import Any

import latex2mathml.converter
import zensical
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(?<![!`])\[([^\]]+)\]\((\.\./[^)#\s]*)(?:#[^)\s]*)?\)")
ENTRY = re.compile(r"^- \[`([\w.]+)`\]\((?:\.\./)+([\w/]+)\.py\): .*(?:\n  .*)*", re.MULTILINE)
MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHIM = "https://unpkg.com/iframe-worker/shim"  # what the theme asks for where search runs from a disk


def makeExtension(**settings: object) -> Extension:
    return Equations()


class Equations(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(MathML(md), "mathml", 0)


class MathML(Postprocessor):
    def run(self, text: str) -> str:
        return EQUATION.sub(self._equation, text)

    @staticmethod
    def _equation(found: re.Match[str]) -> str:
        block = found[2] == "["
        equation = latex2mathml.converter.convert(html.unescape(found[3]), display="block" if block else "inline")
        return f'<div class="equation" tabindex="0">{equation}</div>' if block else equation


def write_pages(docs: Path, target: Path) -> None:
    """Write the site's pages, and the sources that they link to, from those in `docs`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(docs, target)
    shutil.copytree(Path(__file__).parent / "site", target / "assets")
    sources: set[Path] = set()
    for path in docs.rglob("*.md"):
        page = path.relative_to(docs)
        text = MATH.sub(r"$$\n\1$$", path.read_text("utf-8"))
        if "reference" in page.parts or page.stem == "configuration":
            text = ENTRY.sub(_documented, text)
        text = LINK.sub(lambda found, page=page: _on_the_site(found, docs, page, sources), text)
        (target / page).write_text(text, "utf-8")
    for source in sources:
        page = target / "source" / source.with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        code = (docs.parent / source).read_text("utf-8")
        page.write_text(f"---\nsearch:\n  exclude: true\n---\n# {source}\n\n~~~~python\n{code}~~~~\n", "utf-8")


def _documented(found: re.Match[str]) -> str:
    """An entry of the reference: "- [`name`](../module.py): what it is"."""
    name, module = found[1], found[2].replace("/", ".").removesuffix(".__init__")
    return f"::: {module if module.endswith(f'.{name}') else f'{module}.{name}'}"


def _on_the_site(found: re.Match[str], docs: Path, page: Path, sources: set[Path]) -> str:
    """A link of a page as it is on the site; a source that it leads to is added to `sources`."""
    text, link = found.groups()
    target = Path(os.path.normpath(docs / page.parent / link))
    if target.is_relative_to(docs):
        return found[0]
    if target.suffix != ".py":  # nor has the site what this leads to
        return text
    source = target.relative_to(docs.parent)
    sources.add(source)
    line = _line(target.read_text("utf-8"), text.strip("`"))
    address = os.path.relpath(Path("source") / source.with_suffix(".md"), page.parent)
    return f"[{text}]({address}{f'#__codelineno-0-{line}' if line else ''})"


def _line(code: str, name: str) -> int | None:
    """The line that defines a function or class, or a "Class.method"."""
    scope: Any = ast.parse(code)
    for part in name.split("."):
        scope = next((node for node in ast.iter_child_nodes(scope) if getattr(node, "name", None) == part), None)
        if scope is None:
            return None
    return scope.lineno


def build(root: Path) -> None:
    write_pages(root / "docs", root / "build" / "docs")
    shutil.rmtree(root / "build" / "site", ignore_errors=True)
    zensical.build(str(root / "mkdocs.yml"), {"strict": True, "clean": True})
    site = root / "build" / "site"
    for page in site.rglob("*.html"):
        shim = os.path.relpath(site / "assets" / "iframe-worker.js", page.parent)
        page.write_text(page.read_text("utf-8").replace(SHIM, shim), "utf-8")


if __name__ == "__main__":
    build(Path(__file__).parents[1])
