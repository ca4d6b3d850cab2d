"""The commands of a person at a terminal: `chat`, `generate`, `inspect`, `sessions`, `bench`, `completion`; a file each."""
