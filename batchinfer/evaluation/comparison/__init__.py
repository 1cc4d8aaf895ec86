"""Many models and formats side by side: a spec, one process for each entry, table and pictures.

Must not know: how a perplexity is computed, and click.
"""
