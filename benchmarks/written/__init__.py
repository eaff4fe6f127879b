"""What the programs write: files that are whole at any time (`files`), tables and their places in pages (`tables`), and
plots that can be read on a light and on a dark page (`plot_style`).
"""
