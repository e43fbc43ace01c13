"""What Alembic runs to migrate: over the connection that it is given, in that connection's transaction."""

from alembic import context


def run() -> None:
    """Run the revisions that are due."""
    context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()


if hasattr(context, "config"):  # Alembic runs this file; whoever else imports it wants nothing
    run()
