"""What the op declarations share: precision, cache bytes, paging, value checks, sample inputs."""
