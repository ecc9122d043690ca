"""The HTTP interface: one file per resource, errors mapped to status codes at this edge only."""
