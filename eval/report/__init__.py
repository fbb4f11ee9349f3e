"""One self-contained HTML page from raw results, or their tables as Markdown: ``python -m eval report``.

Reads every ``summary.json`` below a folder (and the raw files beside it). A module per kind of evaluation makes a section of
tables and pictures; ``page.html.j2`` is the page.
"""
