"""What Alembic reads: how to run migrations, and the revisions of the ledger's tables."""
