"""Every table of the metadata database, on one MetaData. Times are seconds since the epoch (UTC).

The registry owns the first block, with what was measured of engines; `finetune` owns datasets, jobs
and workers; `service` owns the idempotency keys. They are in one module so that one linear migration
history covers them and a single transaction can register a version and finish its job.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Time = sa.Double
# SQLite gives only INTEGER primary keys their automatic numbers.
_Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.String(64), nullable=False)


registry_state = sa.Table(
    "registry_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("data_id", sa.String(32)),  # of the data directory that belongs to this database
    sa.CheckConstraint("id = 1", name="ck_registry_state_single"),
)

models = sa.Table(
    "models",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("task", sa.String(64), nullable=False),
    sa.Column("last_version", sa.Integer, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("deleted_at", Time),  # the row stays, so that no version number is given twice
    sa.PrimaryKeyConstraint("tenant", "name"),
)

model_versions = sa.Table(
    "model_versions",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # reserved | ready | abandoned | deleted
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("method", sa.String(32), nullable=False),
    sa.Column("backbone", sa.String(64)),
    sa.Column("backbone_digest", sa.String(64)),
    sa.Column("job_id", sa.String(64)),
    sa.Column("manifest_sha256", sa.String(64)),
    sa.Column("labels", sa.JSON),
    sa.Column("metrics", sa.JSON),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("ready_at", Time),
    sa.PrimaryKeyConstraint("tenant", "name", "version"),
    sa.ForeignKeyConstraint(["tenant", "name"], ["models.tenant", "models.name"]),
    # A job may reserve again after a crash, but only one of its versions ever becomes ready.
    sa.Index(
        "uq_model_versions_ready_job",
        "job_id",
        unique=True,
        sqlite_where=sa.text("status = 'ready' AND job_id IS NOT NULL"),
        postgresql_where=sa.text("status = 'ready' AND job_id IS NOT NULL"),
    ),
)

aliases = sa.Table(
    "aliases",
    metadata,
    _tenant(),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("updated_at", Time, nullable=False),
    sa.PrimaryKeyConstraint("tenant", "name", "alias"),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "version"], ["model_versions.tenant", "model_versions.name", "model_versions.version"]
    ),
)

alias_history = sa.Table(
    "alias_history",
    metadata,
    sa.Column("id", _Serial, primary_key=True),
    _tenant(),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("from_version", sa.Integer),
    sa.Column("to_version", sa.Integer),  # none: the alias was deleted
    sa.Column("action", sa.String(16), nullable=False),  # publish | set | rollback | delete
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.String(1024), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Index("ix_alias_history_tenant_name_alias", "tenant", "name", "alias"),
)

deletions = sa.Table(
    "deletions",
    metadata,
    sa.Column("id", _Serial, primary_key=True),
    _tenant(),
    sa.Column("kind", sa.String(16), nullable=False),  # model | version | job | dataset
    sa.Column("name", sa.String(64), nullable=False),  # of the model, or the id
    sa.Column("version", sa.Integer),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.String(1024), nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Index("ix_deletions_tenant_kind_name", "tenant", "kind", "name"),
)

chores = sa.Table(
    "chores",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("due_at", Time, nullable=False),
)

engine_reports = sa.Table(
    "engine_reports",
    metadata,
    sa.Column("digest", sa.String(64), nullable=False),  # of the backbone, or of a version's own weights
    sa.Column("device_key", sa.String(64), nullable=False),  # device, settings and library versions
    sa.Column("device", sa.JSON, nullable=False),
    sa.Column("chosen", sa.String(64), nullable=False),
    sa.Column("engines", sa.JSON, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.PrimaryKeyConstraint("digest", "device_key"),
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    _tenant(),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # uploaded | validating | ready | invalid
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("rows", sa.BigInteger),
    sa.Column("columns", sa.JSON),
    sa.Column("report", sa.JSON),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("updated_at", Time, nullable=False),
    sa.Column("deleted_at", Time),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    _tenant(),
    sa.Column("status", sa.String(32), nullable=False),
    sa.Column("phase", sa.String(32)),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("plan", sa.JSON),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.String(128)),
    sa.Column("lease_token", sa.BigInteger, nullable=False),
    sa.Column("lease_expires_at", Time),
    sa.Column("heartbeat_at", Time),
    sa.Column("progress_at", Time),
    sa.Column("cancel_requested_at", Time),
    sa.Column("cancel_keep_best", sa.Boolean, nullable=False),
    sa.Column("progress", sa.JSON),
    sa.Column("best", sa.JSON),
    sa.Column("result", sa.JSON),
    sa.Column("error", sa.JSON),
    sa.Column("evaluation", sa.JSON),
    sa.Column("last_seq", sa.Integer, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("started_at", Time),
    sa.Column("finished_at", Time),
    sa.Index("ix_jobs_status_created_at", "status", "created_at"),
    sa.Index("ix_jobs_tenant_created_at", "tenant", "created_at"),
)

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("created_at", Time, nullable=False),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.PrimaryKeyConstraint("job_id", "seq"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("profile", sa.JSON, nullable=False),
    sa.Column("started_at", Time, nullable=False),
    sa.Column("heartbeat_at", Time, nullable=False),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    _tenant(),
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("request_sha256", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(64)),
    sa.Column("status_code", sa.Integer),  # this and the next are of earlier releases, whose processes still write them
    sa.Column("response", sa.JSON),
    sa.Column("created_at", Time, nullable=False),
    sa.PrimaryKeyConstraint("tenant", "key"),
)
