"""Hooks of the documentation site: equations as MathML, which browsers render natively, and the command's own help."""

import html
import os
import re
import subprocess
import sys

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the command line, which typer writes from the commands' types and help, and the first picture."""
    options = ["--name", "rfclip", "--title", "Command line"]
    command = [sys.executable, "-m", "typer", "rfclip.app.cli", "utils", "docs", *options]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files.append(File.generated(config, "command-line.md", content=text))
    files.append(File.generated(config, "scene.png", abs_src_path=os.path.abspath("rfclip/tiny/scene.png")))
    return files


def on_page_content(page_html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render the equations of a page."""
    return EQUATION.sub(_mathml, page_html)


def _mathml(found: re.Match[str]) -> str:
    block = found[2] == "["
    equation = latex2mathml.converter.convert(html.unescape(found[3]), display="block" if block else "inline")
    return f'<div class="md-typeset__scrollwrap">{equation}</div>' if block else equation
