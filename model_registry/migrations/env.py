"""Alembic's entry: runs on the connection that `migrate` passes, inside its transaction."""

from alembic import context

from model_registry.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
