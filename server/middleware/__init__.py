"""What a request passes before it comes to a controller: connection, host, origin, key, limits, body."""
