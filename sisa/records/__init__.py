"""Rows: opening a source, its canonical form, and the partitions of a store. Only here are tables opened.

``source`` opens tables, ``schema`` holds a recipe against one, ``encode`` gives rows their canonical form
and ``digest`` their keyed digests; ``ingest`` brings a source into a store, ``partition`` keeps it there.
"""
