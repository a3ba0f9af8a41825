"""The door: Envoy in front of Triton, which itself listens on Unix sockets that only its owner can open."""
