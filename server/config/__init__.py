"""The settings of the server, and the sources they come from."""
