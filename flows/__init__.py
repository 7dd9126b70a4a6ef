"""Prefect flows: order, retries, caching, artifacts. No maths."""
