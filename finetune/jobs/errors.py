"""Errors of the job store.

JobError
├── JobNotFound            no such job for this tenant
├── JobNotCancellable      the job has ended already
├── JobNotPausable         the job neither waits in the queue nor runs
├── JobNotResumable        the job is not paused
├── JobNotDeletable        the job has not ended
├── LeaseLost              another worker holds the job now; nothing was written
└── IdempotencyMismatch    the key was used for another request
"""

from __future__ import annotations


class JobError(Exception):
    """Base of all errors of this package."""


class JobNotFound(JobError):
    """No such job for this tenant."""


class JobNotCancellable(JobError):
    """The job has ended already."""


class JobNotPausable(JobError):
    """The job neither waits in the queue nor runs."""


class JobNotResumable(JobError):
    """The job is not paused."""


class JobNotDeletable(JobError):
    """The job has not ended."""


class LeaseLost(JobError):
    """The lease was taken by another worker, or the job has ended; the write did not happen."""


class IdempotencyMismatch(JobError):
    """The key was used before for a request with another body."""
