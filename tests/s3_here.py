"""An object store on loopback, for tests of s3:// addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def own_s3(*buckets: str) -> Iterator[str]:
    """An empty store with these buckets; its address and credentials stand in the environment while the block runs."""
    import boto3
    import httpx
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with patch.dict(os.environ, environment):
            for bucket in buckets:
                boto3.client("s3").create_bucket(Bucket=bucket)
            yield environment["AWS_ENDPOINT_URL"]
    finally:
        httpx.post(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset")  # all servers of a process share one store
        server.stop()
