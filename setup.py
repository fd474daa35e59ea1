"""What PyPI shows is README.md, its relative links made absolute where the project has an address, its URL "Source"."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
readme = (here / "README.md").read_text("utf-8")
source = re.search(r'^Source = "(.+?)/?"$', (here / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
if source:
    for start, kind in ((r"(!\[[^\]]*\]\()", "raw"), (r"((?<!!)\[[^\]]*\]\()", "blob")):  # pictures, then pages
        readme = re.sub(start + r"(?![a-z]+:|#)", rf"\g<1>{source[1]}/{kind}/HEAD/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
