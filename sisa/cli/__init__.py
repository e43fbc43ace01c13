"""The command line: one small file per verb, over the library."""
