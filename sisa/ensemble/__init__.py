"""The live ensemble: loading its constituents and turning their posteriors into one answer."""
