"""A real S3 server on loopback, for what reads and writes buckets."""

import socket

import pytest


@pytest.fixture(scope="module")
def s3():
    """Options for tensorstore's driver of a moto server with the bucket `runs`."""
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    running.start()
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
        yield {"endpoint": endpoint, "aws_region": "us-east-1", "aws_credentials": {"type": "environment"}}
    running.stop()
