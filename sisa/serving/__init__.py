"""The aggregator API: predictions over HTTP under a lease on the ensemble version, deletions, and the operator's page."""
