"""The deletion handler: accept, erase, purge, repair. Every step is journaled before it is taken."""
