"""Files of the repository that a page links (``../results/...``) become part of the site, so that every link is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"(\]\()\.\./(?!\.\.)([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link outside ``docs/``; a link to nothing stays one, and the strict build names it."""
    root = Path(config.docs_dir).parent
    for page in files.documentation_pages():
        for _, target in OUTSIDE.findall(page.content_string):
            if (root / target).is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(root / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links from ``docs/`` to the repository at the site's copies."""
    return OUTSIDE.sub(r"\1\2", markdown) if "/" not in page.file.src_uri else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Names in docstrings without their Sphinx roles: ``:class:`~a.b.C``` as ``C``."""
    return re.sub(r":(?:class|meth|mod|func|data):\s*<code>(?:~[\w.]*\.)?([^<]*)</code>", r"<code>\1</code>", html)
