"""Adapters as values: kept in files, planned, joined, attached to a base, and how well they fit one."""
