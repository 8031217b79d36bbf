"""Sets of images to every number about them, and the page that shows them: what evaluate.py does.

imagesets.py finds and decodes, statistics.py reads moments, extractors.py and store.py bring images through networks
once, measuring.py computes, table.py, reports.py and webpage.py show, papers.py knows the papers' set-ups, toyworld.py
the embedded world, final.py what a training run reports. May import `metrics`, `text` (its towers judge images),
`data`, `weights` and `run`; must not know how images were made.
"""
