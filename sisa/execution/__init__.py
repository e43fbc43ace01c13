"""Where chains run: in this process, or as tasks of Ray workers."""
