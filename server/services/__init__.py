"""What the server does, free of HTTP: services take parsed values and raise the errors of `server.errors`."""
