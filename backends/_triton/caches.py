"""The two ops that write paged caches."""
