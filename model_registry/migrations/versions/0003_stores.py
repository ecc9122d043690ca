"""Deletions with their audit, chores that one process does at a time, and the data directory that belongs here."""

import sqlalchemy as sa
from alembic import op

revision = "0003_stores"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("registry_state", sa.Column("data_id", sa.String(length=32), nullable=True))
    op.add_column("models", sa.Column("deleted_at", sa.Double(), nullable=True))
    op.create_table(
        "deletions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(length=1024), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deletions")),
    )
    op.create_index("ix_deletions_tenant_kind_name", "deletions", ["tenant", "kind", "name"], unique=False)
    op.create_table(
        "chores",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chores")),
    )
    op.execute("INSERT INTO chores (name, due_at) VALUES ('sweep', 0), ('retention', 0)")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_history()
        _guard_in_sqlite("alias_history")
        _guard_in_sqlite("deletions")
        return
    op.alter_column("alias_history", "to_version", existing_type=sa.Integer(), nullable=True)
    op.execute(
        "CREATE TRIGGER deletions_append_only BEFORE UPDATE OR DELETE ON deletions "
        "FOR EACH STATEMENT EXECUTE FUNCTION polyhead_refuse_change()"
    )


def downgrade() -> None:
    op.drop_table("chores")
    op.drop_table("deletions")
    op.drop_column("models", "deleted_at")
    op.drop_column("registry_state", "data_id")


def _rebuild_history() -> None:
    """SQLite changes no column in place; with the table its triggers go."""
    with op.batch_alter_table("alias_history", recreate="always") as batch:
        batch.alter_column("to_version", existing_type=sa.Integer(), nullable=True)


def _guard_in_sqlite(table: str) -> None:
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'this table is append-only'); END"
        )
