"""Ray Serve deployments. Empty until serving is built."""
