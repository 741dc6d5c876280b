"""Reads documents from text, JSON lines and parquet files, plain or compressed."""
