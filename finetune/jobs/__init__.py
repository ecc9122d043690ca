"""Jobs: their record, their states and the SQL that moves them. Torch-free, shared with the serving process."""
